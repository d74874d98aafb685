"""Stage ``head_estimates``: what one forward and one backward pass tell about every head, and the clean readings.

Shape suffixes: N traces of one role and half, H heads of the model in order, M readings of the meter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from clifflab.artifacts import write_safetensors
from clifflab.config import ModelSpec, Study
from clifflab.errors import InputError
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.head_units import INPUTS, chosen_traces, joined, shard_traces, sweep_tools, trace_shards
from clifflab.sweep import attribution, direct_effects
from clifflab.sweep.plain import plain_sweep

NO_LENS = "the refusal log-odds cannot be read: the model's last step is not a norm and a projection"


class HeadEstimatesStep(Step):
    """Direct effects, first-order estimates and clean readings; a unit is a shard of traces."""

    name = "head_estimates"
    inputs = INPUTS
    suffix = ".safetensors"

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Not to a model that a repair makes, unless the repair asks for it."""
        return model is not None and study.searches(model)

    def settings(self, study: Study) -> Any:
        """Traces, intervention and positions."""
        names = {"positions", "traces", "controls", "gamma", "replace", "renormalise", "attacked", "plain"}
        return study.heads.model_dump(mode="json", include={*names, "batch_size", "only"})

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """All estimates, trace by trace."""
        return [layout.folder(model) / "head_estimates.safetensors"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Shards of the chosen traces."""
        assert model is not None
        if chosen_traces(context, model).reason:
            return []
        return trace_shards(context, self.name, model, [("", {})])

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Estimate one shard."""
        assert unit.model is not None
        tools, settings = sweep_tools(context, unit.model), context.study.heads
        if tools is None:
            write_safetensors(context.part(unit), {"none": torch.zeros(1)}, _meta({"reason": NO_LENS}))
            return {"rows": 0}
        loaded, heads, meter, change = tools.loaded, tools.heads, tools.meter, tools.intervention
        rows: dict[str, list[Any]] = {"clean": [], "direct": [], **{f"attribution.{p}": [] for p in settings.positions}}
        no_direct = ""
        traces = shard_traces(context, unit)
        for trace in traces:
            rows["clean"].append(plain_sweep(loaded, heads, [trace], [], meter, change, "closing")[0].clean)
            try:
                rows["direct"].append(direct_effects(loaded, heads, trace, meter).heads[0])
            except InputError as error:  # the other methods do not need what it needs of the architecture
                no_direct = error.problem
                rows["direct"].append(np.full(len(heads), np.nan))
            for positions in settings.positions:
                estimates = attribution(loaded, heads, trace, meter, change, positions)
                rows[f"attribution.{positions}"].append(estimates)
        tensors = {name: torch.from_numpy(np.stack(values).astype(np.float32)) for name, values in rows.items()}
        about = {"reason": "", "heads": [layer.heads for layer in heads.layers], "no_direct": no_direct}
        write_safetensors(context.part(unit), tensors, _meta(about))
        return {"rows": len(traces), "tokens": sum(len(trace.ids) for trace in traces)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the shards."""
        assert model is not None
        about: dict[str, Any] = {"reason": chosen_traces(context, model).reason, "heads": [], "no_direct": ""}
        parts = []
        for unit in self.plan(context, model):
            with safe_open(context.part(unit), framework="np") as file:
                about |= json.loads(file.metadata()["about"])
                parts.append((unit, {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
        tensors: dict[str, torch.Tensor] = {"none": torch.zeros(1)}
        if not about["reason"]:
            names = ("clean", "direct", *(f"attribution.{p}" for p in context.study.heads.positions))
            for (role, half), arrays in joined(parts, names).items():
                tensors |= {f"{role}.{half}.{name}": torch.from_numpy(array) for name, array in arrays.items()}
        write_safetensors(self.outputs(context.layout, model)[0], tensors, _meta(about))
        return {"traces": sum(len(t) for name, t in tensors.items() if name.endswith(".clean")), **_said(about)}


def _meta(about: dict[str, Any]) -> dict[str, str]:
    """Metadata of a file: a single entry, since safetensors writes several in any order."""
    return {"about": json.dumps(about)}


def _said(about: dict[str, Any]) -> dict[str, str]:
    return {"reason": about["reason"]} if about["reason"] else {}


@dataclass(frozen=True)
class Estimates:
    """What the step found.

    Attributes:
        reason: Why it found nothing; empty where it did.
        heads_per_layer: The model's heads.
        no_direct: Why there are no direct effects; empty where there are.
        arrays: By ``role.half.name``: ``clean [N, M]``, ``direct [N, H]`` (the probe's logit),
            ``attribution.POSITIONS [N, H, 2]`` (logit, log-odds).
    """

    reason: str
    heads_per_layer: list[int]
    no_direct: str
    arrays: dict[str, npt.NDArray[np.float64]]

    def of(self, role: str, half: str, name: str) -> npt.NDArray[np.float64]:
        """One array; of no traces where the role has none."""
        key = f"{role}.{half}.{name}"
        if key in self.arrays:
            return self.arrays[key]
        like = next(array for other, array in self.arrays.items() if other.endswith(f".{name}"))
        return np.zeros((0, *like.shape[1:]))


def kept_estimates(context: Context, model: str) -> Estimates:
    """The step's result, read once as long as its file stays the same."""
    path = context.layout.folder(model) / "head_estimates.safetensors"

    def read() -> Estimates:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
        return Estimates(about["reason"], about["heads"], about["no_direct"], arrays)

    return context.once(f"estimates:{model}", [path], read)
