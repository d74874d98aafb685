"""Stage ``truncation``: cut the thinking short, close it, and see whether the model still refuses.

The intention to refuse may be there early and be lost only at the end; then less thinking means more refusals, or as
many. Each trace keeps a share of its own thinking, the closing tokens follow, and the model answers anew.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_json, read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study, TracesConfig
from clifflab.engines import Request, TransformersEngine, row_seed
from clifflab.models.loading import LoadedModel
from clifflab.science.judges import Verdict, judge
from clifflab.science.probe import TRAIN_POSITIONS, sigmoid
from clifflab.science.stats import GroupBootstrap, column_means, widened
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.duplicates import group_clusters, group_splits
from clifflab.stages.readout import kept_readers, read_traces
from clifflab.stages.traces import spans_of
from clifflab.text.spans import Spans

SHARES = ("refused", "complied", "degenerate")


class TruncationStep(Step):
    """A unit is a batch of traces at one share of their thinking."""

    name = "truncation"
    inputs = ("prompts", "duplicates", "traces", "judge", "probe", "controls")

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Not to a model that a repair makes, unless the repair asks for it."""
        return model is not None and study.searches(model)

    def settings(self, study: Study) -> Any:
        """The experiment, and the sampling of the study."""
        sampling = study.traces.model_dump(mode="json", include={"temperature", "top_p"})
        return {**study.truncation.model_dump(mode="json"), **sampling, "bootstrap": study.cliff.bootstrap}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Every cut trace with its outcome, and the figures."""
        return [layout.folder(model) / "truncation.parquet", layout.folder(model) / "truncation.json"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of the chosen traces, once for each share."""
        assert model is not None
        settings, chosen = context.study.truncation, chosen_traces(context, model)
        return [
            Unit(self.name, model, f"{round(1000 * kept):04d}-{start:06d}", {"kept": kept, "start": start})
            for kept in settings.kept
            for start in range(0, len(chosen), settings.batch_size)
        ]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Cut, close, answer, judge and score one batch."""
        assert unit.model is not None
        settings, study = context.study.truncation, context.study
        loaded, kept, start = context.loaded(unit.model), unit.payload["kept"], unit.payload["start"]
        rows = chosen_traces(context, unit.model)[start : start + settings.batch_size]
        table = context.table(context.layout.folder(unit.model) / "traces.parquet")
        traces = table.take(pa.array(rows, pa.int64())).to_pylist()
        cut = [_cut(loaded, trace, kept) for trace in traces]
        room = [loaded.context - len(trace["token_ids"]) for trace in cut]
        answering = [i for i, tokens in enumerate(room) if tokens > 0]
        requests = [
            Request(
                tuple(cut[i]["token_ids"]),
                row_seed(study.seed, f"{cut[i]['trace_id']}/{kept}"),
                min(settings.max_new_tokens, room[i]),
            )
            for i in answering
        ]
        sampling = TracesConfig(temperature=study.traces.temperature, top_p=study.traces.top_p)
        written = TransformersEngine(loaded).generate(requests, sampling) if requests else []
        completions = dict(zip(answering, written, strict=True))
        # Canonical closing tokens may be longer than the trace's own: such a trace may not fit for scoring either.
        fitting = [i for i, tokens in enumerate(room) if tokens >= 0]
        finals = dict(zip(fitting, _finals(context, unit.model, loaded, [cut[i] for i in fitting]), strict=True))
        records = []
        for i, trace in enumerate(cut):
            final = finals.get(i)
            response, verdict = None, Verdict("", "the context has no room for a response")
            if i in completions:
                ids = [*trace["token_ids"], *completions[i].ids]
                response = loaded.renderer.texts(ids, _with_response(spans_of(trace), len(ids)))[1]
                verdict = judge(response, closed=True)
            names = ("row", "model", "trace_id", "id", "sample", "set", "label", "group")
            records.append(
                {
                    **{name: trace[name] for name in names},
                    "kept": kept,
                    "thinking_tokens": trace["closing_start"] - trace["thinking_start"],
                    "response": response,
                    "outcome": verdict.outcome or None,
                    "outcome_reason": verdict.reason,
                    "final": None if final is None else final[:, 0].tolist(),
                    "final_refits": None if final is None else final[:, 1:].ravel().tolist(),
                }
            )
        write_parquet(context.part(unit), pa.Table.from_pylist(records, schema=_PART))
        return {"rows": len(records), "tokens": sum(len(c.ids) for c in written)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the batches; shares and means by set and share kept."""
        assert model is not None
        out, out_json = self.outputs(context.layout, model)
        parts = [read_parquet(context.part(unit)) for unit in self.plan(context, model)]
        table = pa.concat_tables(parts) if parts else _PART.empty_table()
        for index, positions in enumerate(TRAIN_POSITIONS):
            finals = [None if row is None else row[index] for row in table["final"].to_pylist()]
            table = table.append_column(f"final_{positions}", pa.array(finals, pa.float32()))
        write_parquet(out, table.select(tables.TRUNCATION.names).cast(tables.TRUNCATION))
        write_json(out_json, self._figures(context, table))
        return {"traces": table.num_rows}

    def _figures(self, context: Context, table: pa.Table) -> dict[str, Any]:
        study, rows = context.study, table.to_pylist()
        if not rows:
            left_out = not study.truncation.traces
            return {"reason": "truncation.traces is 0" if left_out else "no trace of this model has thinking to cut"}
        clusters = group_clusters(context)
        sets: dict[str, list[dict[str, Any]]] = {}
        for name in [prompt_set.name for prompt_set in study.prompts]:
            own = [row for row in rows if row["set"] == name]
            if not own:
                continue
            bootstrap = GroupBootstrap([clusters[row["group"]] for row in own], study.cliff.bootstrap, study.seed)
            kept_N = np.asarray([row["kept"] for row in own])
            outcomes = np.asarray([row["outcome"] for row in own], dtype=object)
            judged = np.asarray([row["outcome"] is not None for row in own])
            sets[name] = [
                {
                    "kept": kept,
                    **{o: bootstrap.rate(outcomes == o, judged & (kept_N == kept)).as_dict() for o in SHARES},
                    "final": _final_figures(own, kept_N == kept, bootstrap),
                }
                for kept in study.truncation.kept
            ]
        return {"sets": sets}


def chosen_traces(context: Context, model: str) -> list[int]:
    """Indices of the traces to cut: of each set a seeded choice of closed, thinking traces.

    Where there is a probe they are of groups that it has not seen.
    """
    folder, study = context.layout.folder(model), context.study
    path = folder / "traces.parquet"
    columns = ["trace_id", "set", "group", "closed", "thinking_start", "closing_start"]

    def choose() -> list[int]:
        splits, trained = group_splits(context), read_json(folder / "probes.json")["trained"]
        members: dict[str, list[tuple[str, int]]] = {}
        for index, trace in enumerate(context.table(path).select(columns).to_pylist()):
            if trace["closed"] and trace["closing_start"] > trace["thinking_start"]:
                if trained and splits[trace["group"]] in ("train", "validation"):
                    continue
                rank = hashlib.sha256(f"truncation:{study.seed}:{trace['trace_id']}".encode()).hexdigest()
                members.setdefault(trace["set"], []).append((rank, index))
        return sorted(index for own in members.values() for _, index in sorted(own)[: study.truncation.traces])

    return context.once(f"truncation:{model}", [path, context.layout.root / "clusters.parquet"], choose)


def _cut(loaded: LoadedModel, trace: dict[str, Any], kept: float) -> dict[str, Any]:
    """The trace with a share of its thinking, from the start, closed and without a response.

    A whole thinking keeps the model's own closing tokens. After a cut come the closing tokens of the format; a token
    that the tokenizer would merge across the cut stays apart, as when the model itself stops there.
    """
    spans = spans_of(trace)
    ids = trace["token_ids"]
    stop = spans.thinking_start + round(kept * spans.thinking_tokens)
    whole = stop == spans.closing_start
    closing = ids[stop : spans.response_start] if whole else loaded.renderer.encode(loaded.renderer.form.close_text)
    cut = [*ids[:stop], *closing]
    return {**trace, "token_ids": cut, "closing_start": stop, "response_start": len(cut), "closed": True}


def _with_response(spans: Spans, end: int) -> Spans:
    return Spans(spans.prefix_end, spans.thinking_start, spans.closing_start, spans.response_start, end, True)


def _finals(context: Context, model: str, loaded: LoadedModel, cut: list[dict[str, Any]]) -> list[Any]:
    """Final score of each cut trace by each kind of probe and its refits, ``[2, 1 + R]``; ``None`` without a probe."""
    if not read_json(context.layout.folder(model) / "probes.json")["trained"]:
        return [None] * len(cut)
    readers = kept_readers(context, model)
    return [
        np.stack(
            [
                sigmoid(np.concatenate([[logits.probes[k, layer, -1]], logits.members[p][: readers.refits, -1]]))
                for p, k, layer in readers.logistic
            ]
        )
        for logits in read_traces(loaded, cut, readers)
    ]


def _final_figures(rows: list[dict[str, Any]], mask: npt.NDArray[np.bool_], bootstrap: GroupBootstrap) -> Any:
    """Mean final score of the masked rows by each kind of probe; ``None`` without a probe."""
    like = next((row for row in rows if row["final"] is not None), None)
    if like is None:
        return None
    absent = {name: [np.nan] * len(like[name]) for name in ("final", "final_refits")}  # what did not fit the context
    finals, flat = (
        np.asarray([row[name] or absent[name] for row in rows], dtype=np.float64) for name in ("final", "final_refits")
    )
    refits = flat.reshape(*finals.shape, -1)
    return {
        positions: widened(
            bootstrap.mean(finals[:, k], mask, (0.0, 1.0)).as_dict(), column_means(refits[mask, k]), (0.0, 1.0)
        )
        for k, positions in enumerate(TRAIN_POSITIONS)
    }


_PART = pa.schema(
    [field for field in tables.TRUNCATION if not field.name.startswith("final_")]
    + [pa.field("final", pa.list_(pa.float64())), pa.field("final_refits", pa.list_(pa.float64()))]
)
