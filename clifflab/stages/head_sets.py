"""Stage ``head_sets``: heads removed together. One head may stand in for another, so that neither shows alone.

Shape suffixes: N traces of one role and half, S sets of heads, R readings (the probe's logit, the refusal log-odds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from clifflab.artifacts import read_json, write_json, write_safetensors
from clifflab.config import ModelSpec, Study
from clifflab.science.effects import top_count
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.head_greedy import greedy_search
from clifflab.stages.head_joint import Joint, joint_figures
from clifflab.stages.head_plan import Heads, dose_fractions, planned_sets
from clifflab.stages.head_units import (
    INPUTS,
    RANKING,
    REPORTING,
    Tools,
    chosen_traces,
    joined,
    search_settings,
    shard_traces,
    sweep_tools,
    sweep_traces,
    trace_shards,
)
from clifflab.sweep import Positions, SweepTrace, sweep

_GREEDY = "greedy"


class HeadSetsStep(Step):
    """A unit removes every set on a shard of traces; the greedy search, whose steps need all traces, is one unit."""

    name = "head_sets"
    inputs = (*INPUTS, "heads")
    suffix = ".safetensors"

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Not to a model that a repair makes, unless the repair asks for it."""
        return model is not None and study.searches(model)

    def settings(self, study: Study) -> Any:
        """The search, and the fractions of the ablation."""
        return {**search_settings(study), "fractions": list(study.ablation.fractions)}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Joint effects."""
        return [layout.folder(model) / "head_sets.json"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Shards of attacked and benign traces, and the greedy search."""
        assert model is not None
        plan = planned_sets(context, model)
        if plan.reason:
            return []
        shards = trace_shards(context, self.name, model, [("", {})])
        mine = [unit for unit in shards if plan.sets(unit.payload["role"], unit.payload["half"])]
        return [*mine, Unit(self.name, model, _GREEDY, {"role": _GREEDY})]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Remove the sets on one shard, or search."""
        assert unit.model is not None
        plan, tools = planned_sets(context, unit.model), sweep_tools(context, unit.model)
        assert tools is not None  # the heads were swept with it
        if unit.payload["role"] == _GREEDY:
            return self._greedy(context, unit, tools)
        sets = plan.sets(unit.payload["role"], unit.payload["half"])
        traces = shard_traces(context, unit)
        tensors: dict[str, np.ndarray] = {
            positions: _effects(context, tools, traces, sets, positions) for positions in context.study.heads.positions
        }
        _write(context, unit, tensors)
        return {"rows": len(traces), "sets": len(sets), "tokens": sum(len(trace.ids) for trace in traces)}

    def _greedy(self, context: Context, unit: Unit, tools: Tools) -> dict[str, Any]:
        assert unit.model is not None
        plan, chosen = planned_sets(context, unit.model), chosen_traces(context, unit.model)
        traces = {
            half: sweep_traces(context, unit.model, chosen.rows["attacked", half]) for half in (RANKING, REPORTING)
        }
        positions = context.study.heads.positions[0]
        total = sum(layer.heads for layer in tools.heads.layers)
        most = max(top_count(share, total) for share in dose_fractions(context))
        tensors = greedy_search(
            lambda half, sets: _effects(context, tools, traces[half], sets, positions),
            chosen.clusters["attacked", RANKING],
            plan.candidates,
            plan.swept,
            limit=max(2, min(len(plan.candidates), most)),
        )
        _write(context, unit, tensors)
        every = [*traces[RANKING], *traces[REPORTING]]
        return {"rows": len(every), "heads": len(tensors["order"]), "tokens": sum(len(trace.ids) for trace in every)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the shards; joint effects with intervals."""
        assert model is not None
        out, plan = self.outputs(context.layout, model)[0], planned_sets(context, model)
        if plan.reason:
            write_json(out, {"reason": plan.reason})
            return {"sets": 0, "reason": plan.reason}
        parts = [(unit, load_file(context.part(unit))) for unit in self.plan(context, model)]
        shards = [part for part in parts if part[0].key != _GREEDY]
        effects = joined(shards, context.study.heads.positions)
        gap = read_json(context.layout.folder(model) / "heads.json")["gap"]
        found = Joint(plan, effects, chosen_traces(context, model).clusters, gap, context.study.heads.threshold)
        figures = joint_figures(found, context.study.heads.positions, parts[-1][1])
        write_json(out, figures)
        return {"sets": len(plan.sets("attacked", REPORTING))}


def _write(context: Context, unit: Unit, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    write_safetensors(context.part(unit), tensors, {})


def _effects(
    context: Context, tools: Tools, traces: Sequence[SweepTrace], sets: Sequence[Heads], positions: Positions
) -> npt.NDArray[np.float32]:
    """Effects of each set on the probe's logit and on the refusal log-odds, ``[N, S, 2]``."""
    budget = context.study.heads.budget_mb
    swept = [
        sweep(tools.loaded, tools.heads, trace, sets, tools.meter, tools.intervention, positions, budget)
        for trace in traces
    ]
    effects = np.stack([found.effects[:, [0, -1]] for found in swept])
    return np.ascontiguousarray(effects, dtype=np.float32)
