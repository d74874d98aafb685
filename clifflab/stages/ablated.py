"""Stage ``ablated``: what the model writes, and how it reads benign text, with heads removed (SPEC section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.engines import Completion, Request, TransformersEngine, row_seed
from clifflab.models.heads import heads_of
from clifflab.models.intervene import Intervention
from clifflab.models.loading import LoadedModel
from clifflab.models.perplexity import Reading, total_nll
from clifflab.science.judges import Verdict, judge
from clifflab.stages.ablation_plan import Row, ablated_heads, experiment
from clifflab.stages.base import Context, Layout, Step, Unit, chunks
from clifflab.stages.traces import spans_of, spans_written
from clifflab.text.spans import Spans

_PERPLEXITY = "perplexity"
_NO_ROOM = "the context has no room for it"


class AblatedStep(Step):
    """A unit is a batch of rows: conditions and prompts to write for, or conditions and texts to read.

    The rows of one batch may have different heads removed. A row is drawn by the random numbers of its trace, so that
    all conditions of a trace are paired, and the unchanged model writes what it wrote in the step ``traces``.
    """

    name = "ablated"
    inputs = ("prompts", "duplicates", "traces", "judge", "heads")

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Not to a model that a repair makes, unless the repair asks for it."""
        return model is not None and study.searches(model)

    def settings(self, study: Study) -> Any:
        """The experiment, and the sampling of the study."""
        sampling = study.traces.model_dump(mode="json", exclude={"samples", "batch_size"})
        return {**study.ablation.model_dump(mode="json"), **sampling, "judge": study.judge.kind}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Every trace with its outcome, every reading, and which heads each condition removes."""
        names = ("ablation_traces.parquet", "ablation_perplexity.parquet", "ablation_conditions.json")
        return [layout.folder(model) / name for name in names]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of rows to write for each treatment of the thinking, then of rows to read."""
        assert model is not None
        plan, size = experiment(context, model), context.study.ablation.batch_size
        return [
            Unit(self.name, model, f"{number}-{kind}-{unit.key}", {"rows": kind, **unit.payload})
            for number, (kind, rows) in enumerate([*plan.rows, (_PERPLEXITY, plan.perplexity)])
            for unit in chunks(len(rows), size, self.name, model)
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Write or read one batch."""
        assert unit.model is not None
        plan, kind = experiment(context, unit.model), unit.payload["rows"]
        start, stop = unit.payload["start"], unit.payload["stop"]
        loaded = context.loaded(unit.model)
        removed = ablated_heads(context, unit.model, heads_of(loaded))
        rows = dict([*plan.rows, (_PERPLEXITY, plan.perplexity)])[kind][start:stop]
        table = context.table(context.layout.folder(unit.model) / "traces.parquet")
        traces = table.take(pa.array([index for _, index in rows], pa.int64())).to_pylist()
        heads = [removed[number] for number, _ in rows]
        base = [_base(context, unit.model, row, trace) for row, trace in zip(rows, traces, strict=True)]
        if kind == _PERPLEXITY:
            read = _read(context, loaded, traces, heads)
            records = [{**old, **new} for old, new in zip(base, read, strict=True)]
            schema, tokens = tables.ABLATION_PERPLEXITY, sum(record["tokens"] for record in records)
        else:
            written = _write(context, loaded, kind, traces, heads)
            names = ["/".join(f"{layer}.{head}" for layer, head in members) for members in heads]
            extra = [{"row": 0, "thinking": kind, "heads": name} for name in names]
            records = [{**old, **mode, **new} for old, mode, new in zip(base, extra, written, strict=True)]
            schema = _PART
            tokens = sum(record["thinking_tokens"] + record["response_tokens"] for record in records)
        write_parquet(context.part(unit), pa.Table.from_pylist([{"row": 0, **r} for r in records], schema=schema))
        return {"rows": len(records), "tokens": tokens}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the batches."""
        assert model is not None
        plan = experiment(context, model)
        parts: dict[bool, list[pa.Table]] = {
            False: [_PART.empty_table()],
            True: [tables.ABLATION_PERPLEXITY.empty_table()],
        }
        for unit in self.plan(context, model):
            parts[unit.payload["rows"] == _PERPLEXITY].append(read_parquet(context.part(unit)))
        written, read = (_numbered(pa.concat_tables(parts[kind])) for kind in (False, True))
        out, out_perplexity, out_conditions = self.outputs(context.layout, model)
        keys = zip(*(written[name].to_pylist() for name in ("fraction", "kind", "draw", "heads")), strict=True)
        heads = {(fraction, kind, draw): names for fraction, kind, draw, names in keys}
        write_parquet(out, written.drop_columns(["heads"]))
        write_parquet(out_perplexity, read)
        conditions = [{**asdict(c), "heads": heads.get((c.fraction, c.kind, c.draw), "")} for c in plan.conditions]
        write_json(
            out_conditions,
            {
                "reason": plan.reason,
                "halves": dict(plan.halves),
                "conditions": [{**c, "heads": c["heads"].split("/") if c["heads"] else []} for c in conditions],
            },
        )
        return {"traces": written.num_rows, "readings": read.num_rows}


def _base(context: Context, model: str, row: Row, trace: dict[str, Any]) -> dict[str, Any]:
    condition = experiment(context, model).conditions[row[0]]
    names = ("model", "trace_id", "id", "sample", "set", "label", "group")
    return {**{name: trace[name] for name in names}, **asdict(condition)}


def _write(
    context: Context,
    loaded: LoadedModel,
    thinking: str,
    traces: Sequence[dict[str, Any]],
    heads: Sequence[tuple[tuple[int, int], ...]],
) -> list[dict[str, Any]]:
    """Write every row anew, from its prompt or from the end of its closing tokens, and judge it by rules."""
    study, settings = context.study, context.study.ablation
    requests: dict[int, Request] = {}
    for row, trace in enumerate(traces):
        start = trace["prefix_end"] if thinking == "regenerated" else trace["response_start"]
        used = start - trace["prefix_end"]
        # A thinking that was read from a file may be longer than the study's limit: the limit is then its response's.
        budget = study.traces.max_new_tokens - (used if trace["source"] == "generated" else 0)
        limit = min(budget, loaded.context - start)
        if limit > 0:
            seed = row_seed(study.seed, trace["trace_id"])
            requests[row] = Request(tuple(trace["token_ids"][:start]), seed, limit, used, heads[row])
    engine = TransformersEngine(loaded, heads_of(loaded), Intervention(settings.gamma, None, settings.renormalise))
    written = engine.generate(list(requests.values()), study.traces) if requests else []
    completions = dict(zip(requests, written, strict=True))
    return [_record(loaded, trace, thinking, completions.get(row)) for row, trace in enumerate(traces)]


def _record(loaded: LoadedModel, trace: dict[str, Any], thinking: str, completion: Completion | None) -> dict[str, Any]:
    """Text, lengths and outcome of one completion."""
    old = trace["token_ids"]
    if completion is None:
        nothing = {"thinking_text": None, "response": None, "thinking_tokens": 0, "response_tokens": 0}
        judged = {"closed": False, "finish_reason": None, "outcome": None, "outcome_reason": _NO_ROOM}
        return {**nothing, **judged, "as_before": False}
    if thinking == "regenerated":
        prompt_ids = old[: trace["prefix_end"]]
        ids, spans = [*prompt_ids, *completion.ids], spans_written(loaded, prompt_ids, completion)
    else:
        ids, own = [*old[: trace["response_start"]], *completion.ids], spans_of(trace)
        spans = Spans(own.prefix_end, own.thinking_start, own.closing_start, own.response_start, len(ids), True)
    thought, response = loaded.renderer.texts(ids, spans)
    verdict: Verdict = judge(response, spans.closed)
    return {
        "thinking_text": thought,
        "response": response,
        "thinking_tokens": spans.closing_start - spans.thinking_start,
        "response_tokens": spans.end - spans.response_start,
        "closed": spans.closed,
        "finish_reason": completion.finish_reason,
        "outcome": verdict.outcome,
        "outcome_reason": verdict.reason,
        "as_before": ids == old,
    }


def _read(
    context: Context,
    loaded: LoadedModel,
    traces: Sequence[dict[str, Any]],
    heads: Sequence[tuple[tuple[int, int], ...]],
) -> list[dict[str, Any]]:
    """How probable the changed model finds what the unchanged one wrote: thinking, closing tokens and response."""
    settings = context.study.ablation
    readings = [
        Reading(tuple(trace["token_ids"]), trace["prefix_end"], removed)
        for trace, removed in zip(traces, heads, strict=True)
    ]
    sums = total_nll(loaded, heads_of(loaded), readings, Intervention(settings.gamma, None, settings.renormalise))
    return [
        {"tokens": len(reading.ids) - reading.start, "nll": nll} for reading, nll in zip(readings, sums, strict=True)
    ]


def _numbered(table: pa.Table) -> pa.Table:
    rows = pa.array(range(table.num_rows), pa.int64())
    return table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)


_PART = tables.ABLATION_TRACES.append(pa.field("heads", pa.string()))
