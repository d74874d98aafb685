"""Stage ``head_sets``: heads removed together. One head may stand in for another, so that neither shows alone.

Shape suffixes: N traces of one role and half, S sets of heads, R readings (the probe's logit, the refusal log-odds).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from clifflab.artifacts import read_json, write_json, write_safetensors
from clifflab.config import Study
from clifflab.science.effects import Paired, best_first, top_count
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.head_joint import Joint, joint_figures
from clifflab.stages.head_plan import Heads, dose_fractions, joint, planned_sets
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
_STARTS = 4  # candidates behind which all heads are swept again
_PARTNERS = 8  # best pairs whose heads the greedy search tries further on


class HeadSetsStep(Step):
    """A unit removes every set on a shard of traces; the greedy search, whose steps need all traces, is one unit."""

    name = "head_sets"
    inputs = (*INPUTS, "heads")
    suffix = ".safetensors"

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
        tensors = {
            positions: _effects(context, tools, traces, sets, positions) for positions in context.study.heads.positions
        }
        write_safetensors(
            context.part(unit),
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()},
            {},
        )
        return {"rows": len(traces), "sets": len(sets), "tokens": sum(len(trace.ids) for trace in traces)}

    def _greedy(self, context: Context, unit: Unit, tools: Tools) -> dict[str, Any]:
        """Find the best pair of a candidate and any swept head, then add heads that raise the log-odds most.

        A head that another one stands in for shows when that one is gone: behind each of the first candidates all heads
        are swept again. Choices are made on the ranking half; the sets on the way are then removed on the other.
        """
        assert unit.model is not None
        plan, chosen, settings = (
            planned_sets(context, unit.model),
            chosen_traces(context, unit.model),
            context.study.heads,
        )
        positions = settings.positions[0]
        total = sum(layer.heads for layer in tools.heads.layers)
        limit = max(
            2, min(len(plan.candidates), max(2, *(top_count(share, total) for share in dose_fractions(context))))
        )
        halves = {half: chosen.rows["attacked", half] for half in (RANKING, REPORTING)}
        traces = {half: sweep_traces(context, unit.model, rows) for half, rows in halves.items()}
        path: list[Heads] = []
        found: list[npt.NDArray[np.float32]] = []

        def step(tried: Sequence[Heads]) -> list[int]:
            """Remove each set, go on with the best one where it raises the log-odds; the sets' places, best first."""
            effects_NSR = _effects(context, tools, traces[RANKING], tried, positions)
            means = Paired.of(effects_NSR[..., 1].astype(np.float64), chosen.clusters["attacked", RANKING]).mean
            order = best_first(means)
            if not path or means[order[0]] > reached[-1]:
                reached.append(float(means[order[0]]))
                path.append(tried[order[0]])
                found.append(effects_NSR[:, order[0]])
            return order

        reached: list[float] = []
        starts, pool = plan.candidates[:_STARTS], plan.swept
        pairs = list(dict.fromkeys(joint((start, head)) for start in starts for head in pool if head != start))
        places = step(pairs) if pairs else []
        pair = path[0] if pairs else starts[:1]  # a model of one head has no pairs
        partners = [head for place in places[:_PARTNERS] for head in pairs[place]]
        path, found, reached = [], [], []
        step([(head,) for head in pair])
        if pairs:
            step([pair])
        rest = list(dict.fromkeys([*plan.candidates, *partners]))
        while 2 <= len(path) < limit:
            have = path[-1]
            tried = [joint((*have, head)) for head in rest if head not in have]
            if not tried or (step(tried) and path[-1] == have):
                break
        tensors = {RANKING: np.stack(found, 1), REPORTING: _effects(context, tools, traces[REPORTING], path, positions)}
        parts = [*((head,) for head in pair), pair]
        for half in (RANKING, REPORTING):
            tensors[f"pair.{half}"] = _effects(context, tools, traces[half], parts, positions)
        tensors["pair"] = np.asarray(pair, dtype=np.int32)
        order = [next(head for head in new if head not in old) for old, new in zip([(), *path], path, strict=False)]
        tensors["order"] = np.asarray(order, dtype=np.int32)
        write_safetensors(
            context.part(unit),
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()},
            {},
        )
        every = [*traces[RANKING], *traces[REPORTING]]
        return {"rows": len(every), "heads": len(path), "tokens": sum(len(trace.ids) for trace in every)}

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
