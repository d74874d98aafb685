"""Stage ``cliff``: score every closed trace, measure its cliff, and draw curves and intervals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_json, read_parquet, write_json, write_parquet
from clifflab.config import Study
from clifflab.errors import TraceError
from clifflab.stages.base import Context, Layout, Step, Unit, chunks
from clifflab.stages.controls import cluster_folds
from clifflab.stages.duplicates import group_clusters, group_splits
from clifflab.stages.openings import opening_ids, opening_lens
from clifflab.stages.readout import kept_readers, read_traces, record
from clifflab.stages.scored import Scored, curve_table
from clifflab.stages.summary import summary
from clifflab.stages.traces import reject


class CliffStep(Step):
    """All probes of all layers in one forward pass per batch; only numbers leave the model, never states."""

    name = "cliff"
    merge_loads = True  # whether it has a lens for its opening words
    inputs = ("prompts", "duplicates", "traces", "judge", "probe", "controls")

    def settings(self, study: Study) -> Any:
        """Window, curves and bootstrap."""
        return study.cliff.model_dump(mode="json")

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Cliffs and curves of all layers, token scores of the reported ones, all rejects, and the model's figures."""
        names = ("cliffs.parquet", "curves.parquet", "scores.parquet", "rejects.parquet", "summary.json")
        return [layout.folder(model) / name for name in names]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of closed traces; none without a probe."""
        folder = context.layout.folder(model)
        if not read_json(folder / "probes.json")["trained"]:
            return []
        return chunks(len(_closed(context, model)), context.study.cliff.batch_size, self.name, model)

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Score and measure one batch."""
        assert unit.model is not None
        settings, readers = context.study.cliff, kept_readers(context, unit.model)
        loaded, lens = context.loaded(unit.model), opening_lens(context, unit.model)
        folds, clusters = cluster_folds(context, unit.model), group_clusters(context)
        table = context.table(context.layout.folder(unit.model) / "traces.parquet")
        rows = _closed(context, unit.model)[unit.payload["start"] : unit.payload["stop"]]
        traces = table.take(pa.array(rows, pa.int64())).to_pylist()
        records = [
            record(trace, logits, readers, folds[clusters[trace["group"]]], settings.window, settings.bins)
            for trace, logits in zip(traces, read_traces(loaded, traces, readers, lens), strict=True)
        ]
        write_parquet(context.part(unit), pa.Table.from_pylist(records))
        return {"rows": len(records), "tokens": sum(len(trace["token_ids"]) for trace in traces)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the batches; means, curves and intervals."""
        assert model is not None
        scored = self._scored(context, model)
        cliffs, curves, scores, rejects, figures = self.outputs(context.layout, model)
        write_parquet(cliffs, scored.cliff_table())
        write_parquet(curves, curve_table(scored, context.study))
        write_parquet(scores, scored.score_table())
        write_parquet(rejects, self._rejects(context, model, scored))
        found = {**summary(scored, context.study), "closing": self._closing(context, model)}
        if scored.traces:
            found["openings"] = self._openings(context, model)
        write_json(figures, found)
        return {"traces": len(scored.traces)}

    def _openings(self, context: Context, model: str) -> dict[str, Any]:
        """The two sets of opening tokens as text, and whether the model has a lens for them."""
        refusal, compliance = opening_ids(context, model)
        renderer = context.loaded(model).renderer
        return {
            "refusal": [renderer.decode([token]) for token in refusal],
            "compliance": [renderer.decode([token]) for token in compliance],
            "lens": opening_lens(context, model) is not None,
        }

    def _rejects(self, context: Context, model: str, scored: Scored) -> pa.Table:
        """Everything that went in and did not come out scored: prompts, traces, and closed traces without a probe."""
        unclosed = TraceError("unclosed", "the thinking never ended: counted as an outcome, never scored")
        no_probe = TraceError("no_probe", scored.reason)
        done = {trace["row"] for trace in scored.traces}
        left = [
            reject(self.name, trace, unclosed if trace["outcome"] == "unclosed" else no_probe)
            for trace in scored.everything
            if trace["row"] not in done
        ]
        files = (context.layout.root / "prompt_rejects.parquet", context.layout.folder(model) / "trace_rejects.parquet")
        return pa.concat_tables([*map(read_parquet, files), pa.Table.from_pylist(left, schema=tables.REJECTS)])

    def _closing(self, context: Context, model: str) -> dict[str, Any]:
        """The most frequent closing tokens, and in what share of the closed traces they stand."""
        table = context.table(context.layout.folder(model) / "traces.parquet")
        columns = ["token_ids", "closing_start", "response_start"]
        traces = table.select(columns).take(pa.array(_closed(context, model), pa.int64())).to_pylist()
        found = Counter(tuple(t["token_ids"][t["closing_start"] : t["response_start"]]) for t in traces)
        if not found:
            return {"tokens": [], "share": None}
        (ids, count), *_ = found.most_common(1)
        renderer = context.loaded(model).renderer
        return {"tokens": [renderer.decode([token]) for token in ids], "share": count / len(traces)}

    def _scored(self, context: Context, model: str) -> Scored:
        folder = context.layout.folder(model)
        about = read_json(folder / "probes.json")
        columns = ["row", "model", "trace_id", "id", "sample", "set", "label", "group", "prompt"]
        traces = context.table(folder / "traces.parquet").select(columns).to_pylist()
        outcomes = context.table(folder / "outcomes.parquet")["outcome"].to_pylist()
        splits, clusters = group_splits(context), group_clusters(context)
        everything = [
            {**trace, "outcome": outcome, "split": splits[trace["group"]], "cluster": clusters[trace["group"]]}
            for trace, outcome in zip(traces, outcomes, strict=True)
        ]
        units = self.plan(context, model)
        if not units:
            return Scored.nothing(everything, about["reason"] or "no trace closed its thinking")
        records = [record for unit in units for record in read_parquet(context.part(unit)).to_pylist()]
        words = context.table(folder / "baselines.parquet")
        bag = {
            row: np.nan if logit is None else logit
            for row, logit in zip(words["row"].to_pylist(), words["bag_of_words"].to_pylist(), strict=True)
        }
        return Scored.from_records(everything, records, kept_readers(context, model), context.study.cliff.bins, bag)


def _closed(context: Context, model: str | None) -> list[int]:
    """Indices of the closed traces in the traces table."""
    path = context.layout.folder(model) / "traces.parquet"
    closed = context.table(path)["closed"]
    return context.once(f"closed:{model}", [path], lambda: np.flatnonzero(closed.to_numpy()).tolist())
