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
from clifflab.pulse import beat
from clifflab.sweep.attention import UnsupportedAttentionError
from clifflab.sweep.clean import CleanPass, changed_heads, clean_pass
from clifflab.sweep.types import Meter, Positions, SweepTrace, Swept

_CPU_TOKENS = 4096  # of a batch on a CPU: beyond it, activations fall out of the cache and nothing is gained
_PAIRED = 8  # sets of a batch from which on the unchanged model runs beside them
_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of a block's write, in the trial
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
    budget_mb: int = 0,
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
        budget_mb: Memory for the activations of one batch; 0 is an eighth of a GPU, or 512.
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
    with clean_pass(loaded, heads, trace, trace.closing_start if shared else 0) as base:
        clean = base.readings(meter)
        where_C = torch.ones(base.tokens, dtype=torch.bool)
        if positions == "closing" and not shared:
            where_C[: trace.closing_start] = False
        size = _rows(loaded, heads, base, len(trace.ids), budget_mb)

        def run(part: Sequence[int]) -> list[None]:
            mine = [lowest[s] for s in part]
            got = _batch(base, heads, [sets[s] for s in part], mine, meter, intervention, where_C, len(part) >= _PAIRED)
            # Effects are differences within one batch, so that rounding which depends on its shape cancels. A direction
            # below all heads of the batch was not read: it is as it was.
            reference = np.where(np.isnan(got[0]), clean, got[0])
            changed[list(part)] = np.where(np.isnan(got[1:]), np.nan, got[1:] - reference + clean)
            return []

        for begin in range(0, len(order), size):
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
            for layer in range(len(loaded.blocks)):
                entered, states = states, base.block(layer, states)
                own, before = base.after(layer), base.entering[layer]
                # Token by token, on the scale of what the block writes: the stream itself may have huge entries.
                write = (own - before).float().norm(dim=-1)
                error = ((states - entered) - (own - before)).float().norm(dim=-1)
                eps = torch.finfo(own.dtype).eps
                limit = _LIMITS.get(own.dtype, 1e-3) * write + 4 * eps * own.float().norm(dim=-1)
                if not bool((error <= limit).all()):
                    return False
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedAttentionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
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
    paired: bool,
) -> np.ndarray:
    """Readings of the unchanged model and of each set, ``[1 + S, M]``; sets ascend by their lowest layer.

    Without ``paired`` the unchanged model is not run beside them, and its row is NaN.
    """
    loaded, extra = base.loaded, int(paired)
    masks = chosen_masks(heads, [*([[]] * extra), *sets])
    from_end_1C = torch.arange(base.tokens - 1, -1, -1)[None]
    everywhere = bool(where_C.all())
    into_RM = torch.full((extra + len(sets), meter.width), torch.nan, dtype=torch.float64)
    last = len(loaded.blocks) - 1
    join_at = [0] * len(sets) if base.carries else list(lowest)
    first = min(join_at)
    states_RCD, joined = base.entering[first][:extra], 0
    for layer in range(first, last + 1):
        beat()
        joining = sum(1 for at in join_at[joined:] if at == layer)
        if joining:
            # A new row is the unchanged model up to here: as it is in this batch, where it runs beside.
            unchanged = states_RCD[:1] if paired else base.entering[layer].to(states_RCD.device)
            states_RCD = torch.cat([states_RCD, unchanged.expand(joining, -1, -1)])
            joined += joining
        rows = extra + joined
        mask_RH = masks[layer][:rows] if layer in masks else None

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
            meter.read(layer, layer == last, states_RCD[:, -1], into_RM[:rows])
            mine = [k for k, at in enumerate(meter.layers) if at == layer] + [meter.width - 1] * (layer == last)
            if not torch.isfinite(into_RM[:rows, mine]).all():
                raise not_finite(loaded, "readings after a change of heads")
    below = torch.tensor([[at < low for at in meter.layers] + [False] for low in lowest], dtype=torch.bool)
    into_RM[extra:][below] = torch.nan  # a direction below all heads of a set
    got = into_RM.numpy()
    return got if paired else np.concatenate([np.full((1, meter.width), np.nan), got])


def _rows(loaded: LoadedModel, heads: HeadMap, base: CleanPass, total: int, budget_mb: int) -> int:
    """Sets in one batch, within a budget for activations."""
    config = loaded.model.config.get_text_config()
    inner = int(getattr(config, "intermediate_size", None) or 4 * loaded.d_model)
    widest = max(layer.heads * layer.size for layer in heads.layers)
    dtype = base.entering[0].element_size()
    per_row = base.tokens * (3 * inner + 4 * widest + 6 * loaded.d_model) * dtype
    if base.prefix is not None:  # scores and their softmax; whole sequences run in fused attention
        per_row += 16 * max(layer.heads for layer in heads.layers) * base.tokens * total
    device = base.entering[0].device
    if not budget_mb:
        cuda = device.type == "cuda"
        budget_mb = torch.cuda.get_device_properties(device).total_memory // 8 >> 20 if cuda else 512
    rows = max(1, (budget_mb << 20) // per_row - 1)
    if device.type == "cpu":
        rows = min(rows, max(1, _CPU_TOKENS // base.tokens))
    return int(rows)
