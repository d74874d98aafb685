"""The exact sweep, fast: every set of heads is a row that joins the batch at its lowest layer (SPEC section 4).

Layers below a change are never run again, since the residual stream entering each block is kept. With changes at the
closing tokens alone, only those tokens are run again: all rows share the prefix's keys and values. Rows of all layers
travel through the blocks together, so that each block's weights are read once a batch.

Shape suffixes: R rows (row 0 is the unchanged model), C tokens that are run again, D width, M readings, S sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from clifflab.errors import InterventionError
from clifflab.models.forward import not_finite, split_on_oom
from clifflab.models.heads import Head, HeadMap
from clifflab.models.intervene import Intervention, chosen_masks
from clifflab.models.loading import LoadedModel
from clifflab.sweep.attention import UnsupportedAttentionError
from clifflab.sweep.clean import CleanPass, changed_heads, clean_pass
from clifflab.sweep.types import Meter, Positions, SweepTrace, Swept

_CPU_TOKENS = 4096  # of a batch on a CPU: beyond it, activations fall out of the cache and nothing is gained
_SHARES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def sweep(
    loaded: LoadedModel,
    heads: HeadMap,
    trace: SweepTrace,
    sets: Sequence[Sequence[Head]],
    meter: Meter,
    intervention: Intervention,
    positions: Positions,
    budget_mb: int = 512,
    share: bool = True,
) -> Swept:
    """Readings of one trace with each set of heads changed; equal to :func:`clifflab.sweep.plain.plain_sweep`.

    Args:
        loaded: The model.
        heads: Its heads.
        trace: The trace.
        sets: Sets of heads, changed together.
        meter: What is read; a direction below all heads of a set has no reading of it (NaN).
        intervention: What is done to the heads.
        positions: At the closing tokens, or at all tokens.
        budget_mb: Memory for the activations of one batch.
        share: Whether changes at closing tokens may run those alone; whole sequences otherwise.

    Raises:
        InputError: A head or a direction is not the model's.
        InterventionError: A change did not take place.
    """
    meter.check(loaded)
    for members in sets:
        heads.check(members, "heads")
    shared = share and positions == "closing" and trace.closing_start > 0 and shares_prefix(loaded, heads)
    lowest = [min((layer for layer, _ in members), default=0) for members in sets]
    order = sorted(range(len(sets)), key=lambda s: lowest[s])
    changed = np.full((len(sets), meter.width), np.nan, dtype=np.float64)
    clean = np.full(meter.width, np.nan, dtype=np.float64)
    with clean_pass(loaded, heads, trace, trace.closing_start if shared else 0) as base:
        where_C = torch.ones(base.tokens, dtype=torch.bool)
        if positions == "closing" and not shared:
            where_C[: trace.closing_start] = False
        size = _rows(loaded, heads, base, len(trace.ids), budget_mb)

        def run(part: Sequence[int]) -> list[None]:
            got = _batch(base, heads, [sets[s] for s in part], [lowest[s] for s in part], meter, intervention, where_C)
            # Effects are differences within one batch, so that rounding which depends on its shape cancels.
            base_row = _whole(clean, got[0])
            changed[list(part)] = got[1:] - got[:1] + base_row
            return []

        for begin in range(0, max(len(order), 1), size):
            split_on_oom(run, order[begin : begin + size])
    return Swept(clean, changed)


def shares_prefix(loaded: LoadedModel, heads: HeadMap) -> bool:
    """Whether the model's attention can run its last tokens over a shared prefix; tried once, on a short sequence.

    Where it cannot, sweeps at closing positions run whole sequences: slower, and equally exact.
    """
    if loaded.model not in _SHARES:
        _SHARES[loaded.model] = _try_sharing(loaded, heads)
    return _SHARES[loaded.model]


def _try_sharing(loaded: LoadedModel, heads: HeadMap) -> bool:
    """Run the blocks of a short sequence again from its middle on, and compare with the model's own states."""
    ids = loaded.renderer.prompt_ids([{"role": "user", "content": "hello"}])
    if len(ids) < 2:
        return False
    trace = SweepTrace(tuple(ids), len(ids) // 2)
    try:
        with clean_pass(loaded, heads, trace, trace.closing_start) as base:
            assert base.prefix is not None
            if any(layer.attention not in base.prefix.layers for layer in heads.layers):
                return False
            states = base.entering[0].expand(2, -1, -1)
            for layer in range(len(loaded.blocks) - 1):
                states = base.block(layer, states)
                own = base.entering[layer + 1]
                scale = float(own.abs().max())
                tolerance = 1e-4 if own.dtype == torch.float32 else 5e-2
                if not bool(((states - own).abs().max() <= tolerance * scale).item()):
                    return False
    except (UnsupportedAttentionError, KeyError):
        return False
    return True


def _batch(
    base: CleanPass,
    heads: HeadMap,
    sets: Sequence[Sequence[Head]],
    lowest: Sequence[int],
    meter: Meter,
    intervention: Intervention,
    where_C: torch.Tensor,
) -> np.ndarray:
    """Readings of the unchanged model and of each set, ``[1 + S, M]``; sets ascend by their lowest layer."""
    loaded = base.loaded
    masks = chosen_masks(heads, [[], *sets])
    from_end_1C = torch.arange(base.tokens - 1, -1, -1)[None]
    everywhere = bool(where_C.all())
    into_RM = torch.full((1 + len(sets), meter.width), torch.nan, dtype=torch.float64)
    first, last = (lowest[0] if lowest else 0), len(loaded.blocks) - 1
    states_RCD, joined = base.entering[first], 0
    for layer in range(first, last + 1):
        joining = sum(1 for at in lowest[joined:] if at == layer)
        if joining:
            # A new row is the unchanged model up to here.
            states_RCD = torch.cat([states_RCD, states_RCD[:1].expand(joining, -1, -1)])
            joined += joining
        mask_RH = masks[layer][: 1 + joined] if layer in masks else None

        def change(z_RCI: torch.Tensor, layer: int = layer, mask_RH: torch.Tensor | None = mask_RH) -> torch.Tensor:
            assert mask_RH is not None
            where, from_end = where_C.to(z_RCI.device), from_end_1C.to(z_RCI.device)
            changed = intervention.apply(heads.layers[layer], z_RCI, mask_RH.to(z_RCI.device), from_end)
            return changed if everywhere else torch.where(where[None, :, None], changed, z_RCI)

        with nullcontext([layer]) if mask_RH is None else changed_heads(heads.layers[layer], change) as fired:
            states_RCD = base.block(layer, states_RCD)
        if not fired:
            raise InterventionError(f"the hook on the heads of layer {layer} never fired: nothing was changed there")
        if layer == last or layer in meter.layers:
            meter.read(layer, layer == last, states_RCD[:, -1], into_RM[: 1 + joined])
    if not torch.isfinite(into_RM[:, -1]).all():
        raise not_finite(loaded, "refusal log-odds after a change of heads")
    return into_RM.numpy()


def _rows(loaded: LoadedModel, heads: HeadMap, base: CleanPass, total: int, budget_mb: int) -> int:
    """Sets in one batch, within a budget for activations."""
    config = loaded.model.config.get_text_config()
    inner = int(getattr(config, "intermediate_size", None) or 4 * loaded.d_model)
    widest = max(layer.heads * layer.size for layer in heads.layers)
    per_token = (3 * inner + 4 * widest + 6 * loaded.d_model) * base.entering[0].element_size()
    per_row = base.tokens * per_token + 8 * max(layer.heads for layer in heads.layers) * base.tokens * total
    rows = max(1, (budget_mb << 20) // per_row - 1)
    if base.entering[0].device.type == "cpu":
        rows = min(rows, max(1, _CPU_TOKENS // base.tokens))
    return int(rows)


def _whole(clean: np.ndarray, got: np.ndarray) -> np.ndarray:
    """The unchanged model's readings: each as first read, kept over batches."""
    clean[:] = np.where(np.isnan(clean), got, clean)
    return clean
