"""Stage ``controls``: what a sceptic asks of the probes, at the reported layer (SPEC section 2).

Refits to resampled groups, cross-fitting by group, shuffled labels, and a bag of words on the thinking.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import safe_open

from clifflab import tables
from clifflab.artifacts import read_json, write_json, write_parquet, write_safetensors
from clifflab.config import Study
from clifflab.science.controls import (
    bag_of_words,
    group_folds,
    resampled_weights,
    selectivity,
    shuffled_labels,
)
from clifflab.science.probe import SPLITS, TRAIN_POSITIONS, Direction, fit_logistic, quality, trace_means, trace_weights
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.capture import probe_examples
from clifflab.stages.duplicates import group_clusters
from clifflab.stages.probe import read_layer

_REFITS = 5  # refits in a unit
NO_WORDS = "no thinking to read words from"


class ControlsStep(Step):
    """Logistic probes alone; a unit is a handful of refits, all folds, all shuffles, or the bag of words."""

    loads = False
    name = "controls"
    inputs = ("prompts", "duplicates", "traces", "judge", "capture", "probe")
    suffix = ".safetensors"

    def settings(self, study: Study) -> Any:
        """How many of each; the probes' own settings come in by stage ``probe``."""
        return {"probe": study.probe.model_dump(mode="json"), "bootstrap": study.cliff.bootstrap}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Weights of all refits and folds, the figures, and the bag of words' reading of each trace."""
        names = ("controls.safetensors", "controls.json", "baselines.parquet")
        return [layout.folder(model) / name for name in names]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Units of both kinds of training positions; none without a probe."""
        if not read_json(context.layout.folder(model) / "probes.json")["trained"]:
            return []
        settings = context.study.probe
        units = [Unit(self.name, model, "words", {"kind": "words"})]
        for positions in TRAIN_POSITIONS:
            for start in range(0, settings.refits, _REFITS):
                draws = {"start": start, "stop": min(start + _REFITS, settings.refits)}
                key = f"{positions}-refits-{start:03d}"
                units.append(Unit(self.name, model, key, {"kind": "refits", "positions": positions, **draws}))
            for kind in ("folds", "shuffles"):
                units.append(Unit(self.name, model, f"{positions}-{kind}", {"kind": kind, "positions": positions}))
        return units

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Fit one unit's probes."""
        assert unit.model is not None
        if unit.payload["kind"] == "words":
            tensors, figures = _words(context, unit.model)
        else:
            states = _states(context, unit.model, unit.payload["positions"])
            payload = {**unit.payload, "model": unit.model}
            work = {"refits": _refits, "folds": _folds, "shuffles": _shuffles}[unit.payload["kind"]]
            tensors, figures = work(context, states, payload)
        write_safetensors(context.part(unit), tensors, {"figures": json.dumps(figures)})
        return {"rows": len(tensors)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join weights and figures."""
        assert model is not None
        out, out_json, out_table = self.outputs(context.layout, model)
        tensors: dict[str, list[torch.Tensor]] = {}
        figures: dict[str, Any] = {"crossfit": {}, "selectivity": {}, "bag_of_words": {}}
        words: torch.Tensor | None = None
        for unit in self.plan(context, model):
            kind, positions = unit.payload["kind"], unit.payload.get("positions")
            with safe_open(context.part(unit), framework="pt") as file:
                found = json.loads(file.metadata()["figures"])
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if kind == "words":
                figures["bag_of_words"], words = found, parts["logits"]
            elif kind == "shuffles":
                figures["selectivity"][positions] = found
            else:
                for name in ("w", "b"):
                    tensors.setdefault(f"{positions}.{kind}.{name}", []).append(parts[name])
                if kind == "folds":
                    figures["crossfit"][positions] = found
        stacked = {name: torch.cat(parts) for name, parts in tensors.items()}
        write_safetensors(out, stacked or {"none": torch.zeros(1)}, {"trained": str(bool(stacked)).lower()})
        write_json(out_json, figures)
        write_parquet(out_table, _baseline_table(context, model, words))
        return {"probes": sum(len(part) for name, part in stacked.items() if name.endswith(".b"))}


def cluster_folds(context: Context, model: str) -> dict[str, int]:
    """Fold of every cluster of the study, balanced over the classes that a cluster has examples of."""
    examples = probe_examples(context, model)
    kinds = dict.fromkeys(group_clusters(context).values(), "")
    for cluster, label in zip(examples.clusters, examples.labels, strict=True):
        if str(label) not in kinds[cluster]:
            kinds[cluster] = "".join(sorted(kinds[cluster] + str(label)))
    return group_folds(kinds, context.study.probe.folds, context.study.seed)


@dataclass(frozen=True)
class _States:
    """States of the reported layer at the positions of one kind of probe, with what is known of each row."""

    states: npt.NDArray[np.float32]
    example: npt.NDArray[np.intp]
    labels: npt.NDArray[np.bool_]
    clusters: npt.NDArray[np.object_]
    splits: npt.NDArray[np.str_]

    def fit(self, rows_N: npt.NDArray[np.bool_], labels_E: npt.NDArray[np.bool_], c: float) -> Direction:
        """A probe of these rows, each trace of the same weight."""
        example = self.example[rows_N]
        labels = labels_E[example]
        return fit_logistic(self.states[rows_N], labels, trace_weights(example, labels), c)


def _states(context: Context, model: str, positions: str) -> _States:
    examples = probe_examples(context, model)
    probes = read_json(context.layout.folder(model) / "probes.json")["probes"]
    states_ND, example_N, final_N = read_layer(context, model, probes[f"{positions}.logistic"]["reported_layer"])
    chosen = np.ones_like(final_N) if positions == "all" else final_N
    return _States(
        states_ND[chosen],
        example_N[chosen],
        np.asarray(examples.labels, dtype=bool),
        np.asarray(examples.clusters, dtype=object),
        np.asarray(examples.splits),
    )


def _refits(context: Context, states: _States, payload: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Probes of resampled training groups."""
    rows_N = states.splits[states.example] == "train"
    example = states.example[rows_N]
    labels, groups = states.labels[example], states.clusters[example]
    weights = trace_weights(example, labels)
    probes = []
    for draw in range(payload["start"], payload["stop"]):
        drawn = resampled_weights(weights, groups, labels, context.study.seed, draw)
        used = drawn > 0
        probes.append(fit_logistic(states.states[rows_N][used], labels[used], drawn[used], context.study.probe.c))
    return _stack(probes), {}


def _folds(context: Context, states: _States, payload: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """One probe a fold, fitted to all groups outside it; its figures are over all examples, each by its own fold."""
    study, folds = context.study, cluster_folds(context, payload["model"])
    fold_E = np.asarray([folds[cluster] for cluster in states.clusters])
    probes = []
    means_E = np.full(len(states.labels), np.nan)
    for fold in range(study.probe.folds):
        outside = fold_E[states.example] != fold
        classes = set(states.labels[states.example[outside]].tolist())
        if len(classes) < 2:  # all groups of a class sit in this fold: it has no probe and its traces no score
            probes.append(Direction(np.full(states.states.shape[1], np.nan, dtype=np.float32), float("nan")))
            continue
        probe = states.fit(outside, states.labels, study.probe.c)
        probes.append(probe)
        members, means = trace_means(probe.logits(states.states[~outside]), states.example[~outside])
        means_E[members] = means
    read = np.isfinite(means_E)
    groups = list(states.clusters[read])
    return _stack(probes), quality(means_E[read], states.labels[read], groups, study.cliff.bootstrap, study.seed)


def _shuffles(context: Context, states: _States, payload: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Selectivity: the probe against probes of labels that were dealt anew to whole groups."""
    study = context.study
    row_split = states.splits[states.example]
    train, test = row_split == "train", row_split == "test"
    probes, right, fitted = [], [], []
    for draw in range(-1, study.probe.shuffles):  # -1: the true labels
        labels_E = states.labels.copy()
        for split in SPLITS if draw >= 0 else ():  # within splits, so that none is left without a class
            own = states.splits == split
            labels_E[own] = shuffled_labels(list(states.clusters[own]), labels_E[own], study.seed, draw)
        probe = states.fit(train, labels_E, study.probe.c)
        accuracy = {}
        for name, rows in (("train", train), ("test", test)):
            members, means = trace_means(probe.logits(states.states[rows]), states.example[rows])
            accuracy[name] = ((means > 0) == labels_E[members], members)
        probes.append(probe)
        right.append(accuracy["test"][0])
        fitted.append(accuracy["train"][0].mean())
    groups = list(states.clusters[accuracy["test"][1]])
    figures = selectivity(
        right[0], np.stack(right[1:], axis=1), np.asarray(fitted[1:]), groups, study.cliff.bootstrap, study.seed
    )
    return _stack(probes[1:]), figures


def _words(context: Context, model: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Bag of words: a logit for every trace that thought (NaN elsewhere), and its figures on test examples."""
    study, examples = context.study, probe_examples(context, model)
    traces = context.table(context.layout.folder(model) / "traces.parquet").select(["thinking"]).to_pylist()
    texts = [trace["thinking"] or "" for trace in traces]
    logits = np.full(len(texts), np.nan)
    thought = np.asarray([bool(text.strip()) for text in texts])
    labels = np.zeros(len(texts), dtype=bool)
    labels[examples.rows] = examples.labels
    split = np.full(len(texts), "", dtype=object)
    split[examples.rows] = examples.splits
    train = thought & (split == "train")
    if not labels[train].any() or labels[train].all():
        return {"logits": torch.from_numpy(logits)}, {"reason": NO_WORDS}
    chosen = np.flatnonzero(thought)
    found = bag_of_words([texts[i] for i in chosen], train[chosen], labels[chosen], study.probe.c)
    logits[chosen] = found
    groups = np.full(len(texts), "", dtype=object)
    groups[examples.rows] = examples.clusters
    test = thought & (split == "test")
    if not labels[test].any() or labels[test].all():
        return {"logits": torch.from_numpy(logits)}, {"reason": "too few test traces think"}
    figures = quality(logits[test], labels[test], list(groups[test]), study.cliff.bootstrap, study.seed)
    return {"logits": torch.from_numpy(logits)}, figures


def _baseline_table(context: Context, model: str, words: torch.Tensor | None) -> pa.Table:
    path = context.layout.folder(model) / "traces.parquet"
    traces = context.table(path).select(["row", "trace_id"])
    values = np.full(traces.num_rows, np.nan) if words is None else words.numpy()
    column = pa.array(values.astype(np.float32), from_pandas=True)  # NaN becomes null
    return pa.table([*traces.columns, column], schema=tables.BASELINES)


def _stack(probes: list[Direction]) -> dict[str, torch.Tensor]:
    return {
        "w": torch.from_numpy(np.stack([probe.w for probe in probes])),
        "b": torch.tensor([probe.b for probe in probes], dtype=torch.float32),
    }
