"""Stage ``corpus_cliff``: the cliff of every trace of the corpus, by the probes that the study reports.

Shape suffixes: Q probes of one kind, T scored tokens of one trace, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clifflab import tables
from clifflab.artifacts import read_json, read_parquet, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.models.forward import split_on_oom, states_at
from clifflab.models.loading import LoadedModel
from clifflab.science.cliff import MEASURES, measure
from clifflab.science.stats import Floats
from clifflab.stages.base import CORPUS, Context, Layout, Step, Unit, chunks
from clifflab.stages.readout import Readers, kept_readers
from clifflab.stages.traces import spans_of


class CorpusCliffStep(Step):
    """A unit is one batch of closed traces; its file holds finished rows, so that joining them needs no memory."""

    name = "corpus_cliff"
    inputs = ("corpus_traces", "corpus_judge", "probe", "controls")

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """A corpus is scored for the models that are repaired with it."""
        return model is not None and study.repairs(model)

    def settings(self, study: Study) -> Any:
        """The plateau's window."""
        return {"window": study.cliff.window}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Cliffs of the reported logistic probes."""
        return [layout.folder(model, CORPUS) / "cliffs.parquet"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of closed traces; none without a probe."""
        assert model is not None
        if not read_json(context.layout.folder(model) / "probes.json")["trained"]:
            return []
        return chunks(len(_closed(context, model)), context.study.repair.batch_size, self.name, model)

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Score and measure one batch."""
        assert unit.model is not None
        folder = context.layout.folder(unit.model, CORPUS)
        chosen = pa.array(_closed(context, unit.model)[unit.payload["start"] : unit.payload["stop"]], pa.int64())
        traces = context.table(folder / "traces.parquet").take(chosen).to_pylist()
        outcomes = context.table(folder / "outcomes.parquet")["outcome"].take(chosen).to_pylist()
        readers, window = kept_readers(context, unit.model), context.study.cliff.window
        read = read_logistic(context.loaded(unit.model), traces, readers)
        rows = [
            row
            for trace, outcome, logits in zip(traces, outcomes, read, strict=True)
            for row in cliff_rows({**trace, "outcome": outcome}, logits, readers, window)
        ]
        write_parquet(context.part(unit), pa.Table.from_pylist(rows, schema=tables.CLIFFS))
        return {"rows": len(traces), "tokens": sum(len(trace["token_ids"]) for trace in traces)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the batches."""
        parts = [read_parquet(context.part(unit)) for unit in self.plan(context, model)]
        table = pa.concat_tables([tables.CLIFFS.empty_table(), *parts])
        write_parquet(self.outputs(context.layout, model)[0], table)
        return {"rows": table.num_rows}


def read_logistic(
    loaded: LoadedModel, traces: list[dict[str, Any]], readers: Readers, *, refits: bool = False
) -> list[dict[str, Floats]]:
    """Logits of the reported logistic probe of each kind at the scored tokens, ``[Q, T]``, of each trace.

    Args:
        loaded: The model.
        traces: Rows of the traces table.
        readers: The probes.
        refits: Read the refits of each probe too; Q is then 1 and their number, else 1.
    """
    spans = [spans_of(trace) for trace in traces]
    probes = {}
    for kind, k, layer in readers.logistic:
        members = [part[: readers.refits if refits else 0] for part in readers.members[kind]]
        weights_QD, biases_Q = (
            torch.cat([own[k, layer][None], others]).to(loaded.device)
            for own, others in zip((readers.weights, readers.biases), members, strict=True)
        )
        probes[kind] = layer, weights_QD, biases_Q
    found: list[dict[str, Floats]] = [{} for _ in traces]

    def run(part: Any) -> list[None]:
        def on_states(b: int, layer: int, states_TD: Any) -> None:
            for kind, (own, weights_QD, biases_Q) in probes.items():
                if own == layer:
                    found[part[b]][kind] = (weights_QD @ states_TD.T + biases_Q[:, None]).cpu().numpy()

        ids = [traces[i]["token_ids"][: spans[i].response_start] for i in part]
        layers = sorted({layer for layer, _, _ in probes.values()})
        states_at(loaded, ids, [spans[i].scored for i in part], layers, on_states)
        return []

    split_on_oom(run, range(len(traces)))
    return found


def cliff_rows(
    trace: dict[str, Any], logits: dict[str, Floats], readers: Readers, window: tuple[float, float]
) -> list[dict[str, Any]]:
    """A trace's rows of ``tables.CLIFFS``, one for each kind of probe.

    Args:
        trace: Row of the traces table, with its ``outcome``.
        logits: From :func:`read_logistic`.
        readers: The probes.
        window: The plateau's part of the thinking.
    """
    spans = spans_of(trace)
    names = ("row", "model", "trace_id", "id", "sample", "set", "label", "group", "outcome")
    about = {**{name: trace[name] for name in names}, "cluster": trace["group"], "split": CORPUS}
    about |= {"thinking_tokens": spans.thinking_tokens, "closing_tokens": spans.closing_tokens}
    rows = []
    for kind, _, layer in readers.logistic:
        found = measure(logits[kind][None], spans.thinking_tokens, window)
        values = {name: found.scores[name].item() for name in MEASURES}
        values |= {f"{name}_logit": found.logits[name].item() for name in MEASURES}
        drops = {
            "closing_drops": found.drops[0, 0, : spans.closing_tokens].tolist(),
            "closing_drops_logit": found.drops_logit[0, 0, : spans.closing_tokens].tolist(),
        }
        key = {"train_positions": kind, "estimator": "logistic", "layer": layer, "reported": True}
        numbers = {name: value if np.isfinite(value) else None for name, value in values.items()}
        finite = {name: [v if np.isfinite(v) else None for v in drop] for name, drop in drops.items()}
        rows.append({**about, **key, **numbers, **finite})
    return rows


def _closed(context: Context, model: str) -> list[int]:
    """Indices of the corpus traces whose thinking ended."""
    path = context.layout.folder(model, CORPUS) / "traces.parquet"
    closed = context.table(path)["closed"]
    return context.once(f"closed:{model}/{CORPUS}", [path], lambda: np.flatnonzero(closed.to_numpy()).tolist())
