"""Stage ``traces``: prompts to token-exact traces, generated or read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clifflab import tables
from clifflab.artifacts import read_parquet, write_parquet
from clifflab.config import ModelSpec, Study, TracesConfig
from clifflab.engines import Completion, Request, TransformersEngine, row_seed
from clifflab.errors import TraceError
from clifflab.models.loading import LoadedModel
from clifflab.stages.base import Context, Layout, Step, Unit, chunks
from clifflab.stages.prompts import pack_rejects, unpack_rejects
from clifflab.text.spans import Spans


class TracesStep(Step):
    """Writes ``samples`` traces for every prompt; a unit is one batch, fixed by the study and not by the workers.

    Args:
        branch: Whose prompts: those of the study, or those of its ``corpus``, one trace each.
    """

    def __init__(self, branch: str = "") -> None:
        self.branch = branch
        self.name = f"{branch}_traces" if branch else "traces"
        self.inputs = (branch or "prompts",)

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """A corpus is answered by the models that are repaired with it."""
        return not self.branch or (model is not None and study.repairs(model))

    def settings(self, study: Study) -> Any:
        """Sampling."""
        return self._sampling(study).model_dump(mode="json")

    def _sampling(self, study: Study) -> TracesConfig:
        if not self.branch:
            return study.traces
        return study.traces.model_copy(update={"samples": 1, "batch_size": study.repair.batch_size})

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Traces and the prompts that could not become one."""
        folder = layout.folder(model, self.branch)
        return [folder / "traces.parquet", folder / "trace_rejects.parquet"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of consecutive (prompt, sample) rows."""
        prompts = pq.read_metadata(self._prompts(context)).num_rows
        sampling = self._sampling(context.study)
        return chunks(prompts * sampling.samples, sampling.batch_size, self.name, model)

    def _prompts(self, context: Context) -> Path:
        return context.layout.root / f"{self.branch or 'prompts'}.parquet"

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Generate or render one batch."""
        assert unit.model is not None
        loaded, sampling = context.loaded(unit.model), self._sampling(context.study)
        prompts = context.table(self._prompts(context))
        wanted: list[tuple[int, int, dict[str, Any]]] = []
        for row in range(unit.payload["start"], unit.payload["stop"]):
            index, sample = divmod(row, sampling.samples)
            prompt = prompts.slice(index, 1).to_pylist()[0]
            if not prompt["existing"] or sample == 0:  # an existing trace is one trace, whatever the samples
                wanted.append((row, sample, prompt))
        traces: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        todo: list[tuple[dict[str, Any], list[int]]] = []
        for row, sample, prompt in wanted:
            base = _base(context, unit.model, row, sample, prompt)
            try:
                if prompt["existing"]:
                    traces.append(_existing(loaded, base, prompt))
                else:
                    todo.append((base, _prompt_ids(loaded, prompt)))
            except TraceError as error:
                rejects.append(reject(self.name, base, error))
        if todo:
            seed, limit = context.study.seed, sampling.max_new_tokens
            requests = [
                Request(tuple(ids), row_seed(seed, base["trace_id"]), min(limit, loaded.context - len(ids)))
                for base, ids in todo
            ]
            completions = TransformersEngine(loaded).generate(requests, sampling)
            for (base, prompt_ids), completion in zip(todo, completions, strict=True):
                spans = spans_written(loaded, prompt_ids, completion)
                ids = [*prompt_ids, *completion.ids]
                traces.append(_finish(loaded, base, ids, spans, completion.finish_reason, "generated"))
        traces.sort(key=lambda trace: trace["row"])
        write_parquet(context.part(unit), pack_rejects(pa.Table.from_pylist(traces, schema=tables.TRACES), rejects))
        tokens = sum(len(trace["token_ids"]) for trace in traces)
        return {"rows": len(traces), "rejects": len(rejects), "tokens": tokens}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the batches."""
        parts = [read_parquet(context.part(unit)) for unit in self.plan(context, model)]
        rejects = [row for part in parts for row in unpack_rejects(part)]
        table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
        out, out_rejects = self.outputs(context.layout, model)
        write_parquet(out, table)
        write_parquet(out_rejects, pa.Table.from_pylist(rejects, schema=tables.REJECTS))
        return {"traces": table.num_rows, "rejects": len(rejects)}


def reject(stage: str, trace: dict[str, Any], error: TraceError) -> dict[str, Any]:
    """A reject's row for one trace."""
    return {
        "stage": stage,
        "set": trace["set"],
        "source": trace["trace_id"],
        "source_row": trace["row"],
        "id": trace["id"],
        "reason": error.reason,
        "detail": error.detail,
    }


def _base(context: Context, model: str, row: int, sample: int, prompt: dict[str, Any]) -> dict[str, Any]:
    """The columns that do not depend on what the model writes."""
    users = [turn["content"] for turn in prompt["messages"] if turn["role"] == "user"]
    return {
        "row": row,
        "model": model,
        "trace_id": f"{prompt['set']}/{prompt['id']}#{sample}",
        "id": prompt["id"],
        "sample": sample,
        "set": prompt["set"],
        "label": prompt["label"],
        "group": prompt["group"],
        "prompt": users[-1],
    }


def _prompt_ids(loaded: LoadedModel, prompt: dict[str, Any]) -> list[int]:
    ids = loaded.renderer.prompt_ids(prompt["messages"])
    if len(ids) >= loaded.context:
        raise TraceError("too_long", f"{len(ids)} prompt tokens fill the context of {loaded.context}")
    return ids


def spans_written(loaded: LoadedModel, prompt_ids: Sequence[int], completion: Completion) -> Spans:
    """Token borders of what the model wrote from a prompt."""
    spans = loaded.renderer.parse(list(prompt_ids), completion.ids)
    if completion.finish_reason == "length" and spans.response_start == spans.end:
        # Cut before the response began: which closing token is the last one is not known.
        spans = replace(spans, closing_start=spans.end, closed=False)
    return spans


def _existing(loaded: LoadedModel, base: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    ids, spans = loaded.renderer.render(prompt["messages"], prompt["thinking"], prompt["response"])
    if len(ids) > loaded.context:
        raise TraceError("too_long", f"{len(ids)} tokens exceed the context of {loaded.context}")
    return _finish(loaded, base, ids, spans, "stop", "existing")


def _finish(
    loaded: LoadedModel, base: dict[str, Any], ids: list[int], spans: Spans, reason: str, source: str
) -> dict[str, Any]:
    thinking, response = loaded.renderer.texts(ids, spans)
    return {
        **base,
        "thinking": thinking,
        "response": response,
        "token_ids": ids,
        "prefix_end": spans.prefix_end,
        "thinking_start": spans.thinking_start,
        "closing_start": spans.closing_start,
        "response_start": spans.response_start,
        "closed": spans.closed,
        "finish_reason": reason,
        "source": source,
    }


def spans_of(trace: dict[str, Any]) -> Spans:
    """Token borders of a row of the traces table."""
    names = ("prefix_end", "thinking_start", "closing_start", "response_start", "closed")
    return Spans(end=len(trace["token_ids"]), **{name: trace[name] for name in names})
