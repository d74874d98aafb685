"""Stage ``heads``: the exact effect of removing each head, and the table of all methods (SPEC section 4).

Shape suffixes: N traces of one role and half, H heads that are swept, M readings of the meter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load_file

from clifflab import tables
from clifflab.artifacts import write_json, write_parquet, write_safetensors
from clifflab.config import ModelSpec, Study
from clifflab.errors import InputError
from clifflab.models.heads import Head
from clifflab.science.effects import Paired, best_first, top_count
from clifflab.stages.base import Context, Layout, Step, Unit
from clifflab.stages.head_estimates import kept_estimates
from clifflab.stages.head_figures import head_figures
from clifflab.stages.head_tables import Search
from clifflab.stages.head_units import (
    INPUTS,
    RANKING,
    chosen_traces,
    head_list,
    joined,
    layers_of,
    search_settings,
    shard_traces,
    sweep_tools,
    trace_shards,
)
from clifflab.sweep import sweep


class HeadsStep(Step):
    """A unit sweeps the heads of a block of layers over a shard of traces, at every kind of positions."""

    name = "heads"
    inputs = (*INPUTS, "head_estimates")
    suffix = ".safetensors"

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Not to a model that a repair makes, unless the repair asks for it."""
        return model is not None and study.searches(model)

    def settings(self, study: Study) -> Any:
        """The search; what joint removal alone needs is left out."""
        return {k: v for k, v in search_settings(study).items() if k not in ("random_draws", "candidates")}

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Every head by every method, and what follows from it."""
        return [layout.folder(model) / "heads.parquet", layout.folder(model) / "heads.json"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Shards of traces times blocks of layers; none where heads are only estimated."""
        assert model is not None
        layers = len(kept_estimates(context, model).heads_per_layer)
        swept = {layer for layer, _ in swept_heads(context, model)}
        blocks = layers_of(layers, context.study.heads.layer_block)
        cuts = [
            (f"-{first:04d}", {"first": first, "last": last})
            for first, last in blocks
            if any(first <= layer < last for layer in swept)
        ]
        return trace_shards(context, self.name, model, cuts) if cuts else []

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Sweep one block of layers over one shard."""
        assert unit.model is not None
        settings, tools = context.study.heads, sweep_tools(context, unit.model)
        assert tools is not None  # the estimates were made with it
        swept = _block(swept_heads(context, unit.model), unit)
        traces = shard_traces(context, unit)
        sets = [[head] for head in swept]
        effects: dict[str, list[Any]] = {positions: [] for positions in settings.positions}
        for trace in traces:
            for positions in settings.positions:
                found = sweep(
                    tools.loaded, tools.heads, trace, sets, tools.meter, tools.intervention, positions,
                    settings.budget_mb,
                )  # fmt: skip
                effects[positions].append(found.effects)
        tensors = {name: torch.from_numpy(np.stack(found).astype(np.float32)) for name, found in effects.items()}
        write_safetensors(context.part(unit), tensors, {})
        tokens = sum(len(trace.ids) for trace in traces)
        return {"rows": len(traces), "heads": len(swept), "tokens": tokens}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the units; means, intervals, verdicts."""
        assert model is not None
        out, out_json = self.outputs(context.layout, model)
        estimates = kept_estimates(context, model)
        if estimates.reason:
            write_parquet(out, tables.HEADS.empty_table())
            write_json(out_json, {"reason": estimates.reason, "total": sum(estimates.heads_per_layer)})
            return {"heads": 0, "reason": estimates.reason}
        if estimates.no_direct and context.study.heads.method == "direct":
            raise InputError("heads.method", "direct", estimates.no_direct, "use attribution or exact")
        swept = swept_heads(context, model)
        exact = _exact(context, self.plan(context, model), swept, len(estimates.heads_per_layer))
        search = Search.of(context, model, estimates, swept, exact)
        write_parquet(out, pa.Table.from_pylist(search.rows(), schema=tables.HEADS))
        decode = context.renderer(model).decode
        write_json(out_json, head_figures(search, decode))
        return {"heads": len(swept), "suppression": len(search.suppression(context.study.heads.positions[0]))}


def swept_heads(context: Context, model: str) -> list[Head]:
    """The heads that are swept exactly: all, those with the best estimates, or none."""
    settings, estimates = context.study.heads, kept_estimates(context, model)
    if estimates.reason or settings.method in ("direct", "attribution"):
        return []
    looked_at = head_list(estimates.heads_per_layer, settings.only)
    if settings.method == "exact":
        return looked_at
    every = head_list(estimates.heads_per_layer, ())
    values_NH2 = estimates.of("attacked", RANKING, f"attribution.{settings.positions[0]}")
    means_H2 = Paired.of(values_NH2, chosen_traces(context, model).clusters["attacked", RANKING]).mean
    mine = [every.index(head) for head in looked_at]
    best = set(best_first(means_H2[mine, 1])[: top_count(settings.screen, len(every))])
    return [head for place, head in enumerate(looked_at) if place in best]


def _exact(
    context: Context, units: list[Unit], swept: list[Head], layers: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """Effects by role and half and positions, ``[N, H, M]``, the blocks of layers joined along the heads."""
    blocks = [
        joined([(unit, load_file(context.part(unit))) for unit in units if unit.payload["first"] == first], positions)
        for positions in [context.study.heads.positions]
        for first, _ in layers_of(layers, context.study.heads.layer_block)
        if any(unit.payload["first"] == first for unit in units)
    ]
    found = {
        key: {name: np.concatenate([block[key][name] for block in blocks], axis=1) for name in blocks[0][key]}
        for key in (blocks[0] if blocks else ())
    }
    assert all(array.shape[1] == len(swept) for arrays in found.values() for array in arrays.values())
    return found


def _block(swept: list[Head], unit: Unit) -> list[Head]:
    return [head for head in swept if unit.payload["first"] <= head[0] < unit.payload["last"]]
