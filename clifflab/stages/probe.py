"""Stage ``probe``: train and judge the probes of every layer, and choose the reported layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from clifflab.artifacts import write_json, write_safetensors
from clifflab.config import Study
from clifflab.science.probe import (
    ESTIMATORS,
    FITTERS,
    TRAIN_POSITIONS,
    Direction,
    choose_layer,
    quality,
    trace_means,
    trace_weights,
)
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.capture import CaptureStep, probe_examples

PROBES = tuple((positions, estimator) for positions in TRAIN_POSITIONS for estimator in ESTIMATORS)


class ProbeStep(Step):
    """Fits both estimators at both kinds of positions; a unit is one layer."""

    loads = False
    name = "probe"
    inputs = ("duplicates", "traces", "judge", "capture")
    suffix = ".safetensors"

    def settings(self, study: Study) -> Any:
        """The probes, and the bootstrap of their figures."""
        return {"probe": study.probe.model_dump(mode="json"), "bootstrap": study.cliff.bootstrap}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Weights, and all about them."""
        return [layout.folder(model) / "probes.safetensors", layout.folder(model) / "probes.json"]

    def plan_reads(self, context: Context, model: str | None) -> list[Path]:
        """The first captured batch names the layers."""
        return [context.part(unit) for unit in CaptureStep().plan(context, model)[:1]]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """One unit a layer; none where there are too few examples."""
        capture = CaptureStep().plan(context, model)
        if not capture:
            return []
        with safe_open(context.part(capture[0]), framework="pt") as file:
            layers = sum(name.startswith("layer.") for name in file.keys())  # noqa: SIM118 - no mapping
        return [Unit(self.name, model, f"{layer:04d}", {"layer": layer}) for layer in range(layers)]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Fit and judge one layer's probes."""
        assert unit.model is not None
        examples = probe_examples(context, unit.model)
        states_ND, example_N, final_N = read_layer(context, unit.model, unit.payload["layer"])
        labels = np.asarray(examples.labels, dtype=bool)
        splits = np.asarray(examples.splits)
        clusters = np.asarray(examples.clusters, dtype=object)
        tensors: dict[str, torch.Tensor] = {}
        figures: dict[str, Any] = {}
        for positions, estimator in PROBES:
            looked_at = np.ones_like(final_N) if positions == "all" else final_N
            train = looked_at & (splits[example_N] == "train")
            weights = trace_weights(example_N[train], labels[example_N[train]])
            fit = FITTERS[estimator]
            probe: Direction = fit(states_ND[train], labels[example_N[train]], weights, context.study.probe.c)
            key = f"{positions}.{estimator}"
            tensors[f"{key}.w"] = torch.from_numpy(probe.w)
            tensors[f"{key}.b"] = torch.tensor(probe.b, dtype=torch.float32)
            figures[key] = {}
            for split in ("validation", "test"):
                rows = looked_at & (splits[example_N] == split)
                members, means = trace_means(probe.logits(states_ND[rows]), example_N[rows])
                figures[key][split] = quality(
                    means, labels[members], list(clusters[members]), context.study.cliff.bootstrap, context.study.seed
                )
        write_safetensors(context.part(unit), tensors, {"figures": json.dumps(figures)})
        return {"rows": len(states_ND)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Stack the layers and choose the reported one of each probe."""
        assert model is not None
        out, out_json = self.outputs(context.layout, model)
        units = self.plan(context, model)
        examples = probe_examples(context, model)
        about: dict[str, Any] = {
            "trained": bool(units),
            "reason": examples.shortage or None,
            "model": context.identities.models[model],
            "examples": _example_counts(examples.labels, examples.splits),
            "settings": self.settings(context.study),
            "probes": {},
        }
        if not units:
            write_safetensors(out, {"none": torch.zeros(1)}, {"trained": "false"})
            write_json(out_json, about)
            return {"probes": 0, "reason": examples.shortage}
        tensors: dict[str, list[torch.Tensor]] = {}
        layers: list[dict[str, Any]] = []
        for unit in units:
            with safe_open(context.part(unit), framework="pt") as file:
                layers.append(json.loads(file.metadata()["figures"]))
                for name in file.keys():  # noqa: SIM118 - no mapping
                    tensors.setdefault(name, []).append(file.get_tensor(name))
        for positions, estimator in PROBES:
            key = f"{positions}.{estimator}"
            figures = [layer[key] for layer in layers]
            reported = choose_layer([figure["validation"]["auroc"] for figure in figures])
            about["probes"][key] = {"reported_layer": reported, "layers": figures}
        about["template_hash"] = context.renderer(model).template_hash
        write_safetensors(out, {name: torch.stack(parts) for name, parts in tensors.items()}, {"trained": "true"})
        write_json(out_json, about)
        return {"probes": len(PROBES) * len(units)}


def read_layer(context: Context, model: str, layer: int) -> tuple[Any, Any, Any]:
    """States ``[N, D]`` of one layer with each row's example and whether it is the final position."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for unit in CaptureStep().plan(context, model):
        with safe_open(context.part(unit), framework="pt") as file:
            parts.append(tuple(file.get_tensor(name) for name in (f"layer.{layer}", "example", "is_final")))
    states, example, final = (torch.cat(columns).numpy() for columns in zip(*parts, strict=True))
    return states, example, final


def _example_counts(labels: list[int], splits: list[str]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for label, split in zip(labels, splits, strict=True):
        name = "harmful_refused" if label else "benign_complied"
        counts.setdefault(split, {"harmful_refused": 0, "benign_complied": 0})[name] += 1
    return counts
