"""Mean outputs of all heads, by offset from the final position (SPEC section 4: replaced by its mean)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from clifflab.models.forward import not_finite
from clifflab.models.heads import HeadMap
from clifflab.models.intervene import HeadMeans
from clifflab.models.loading import LoadedModel
from clifflab.sweep.types import SweepTrace


@torch.no_grad()
def mean_outputs(loaded: LoadedModel, heads: HeadMap, traces: Sequence[SweepTrace]) -> HeadMeans:
    """Mean head outputs over traces: at each closing offset, and over all tokens before the closing ones.

    Closing tokens are aligned at the final position; an offset is averaged over the traces that have it. Each trace
    weighs the same.

    Args:
        loaded: The model.
        heads: Its heads.
        traces: Benign answered traces.
    """
    longest = max(len(trace.ids) - trace.closing_start for trace in traces)
    count = len(heads.layers)
    sums = [torch.zeros(longest, layer.heads * layer.size, dtype=torch.float64) for layer in heads.layers]
    before = [torch.zeros(layer.heads * layer.size, dtype=torch.float64) for layer in heads.layers]
    have, have_before = torch.zeros(longest, 1), 0
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    starts = [0]
    handles = []
    for index in range(count):

        def hook(_module: nn.Module, inputs: Any, index: int = index) -> None:
            z_TI = inputs[0][0].float()
            start = starts[0]
            earlier = z_TI[:start].mean(0) if start else torch.zeros_like(z_TI[0])
            seen[index] = (z_TI[start:].double().cpu(), earlier.double().cpu())

        handles.append(heads.layers[index].projection.register_forward_pre_hook(hook))
    try:
        for trace in traces:
            starts[0] = trace.closing_start
            loaded.body(input_ids=torch.tensor([trace.ids], device=loaded.device), use_cache=False)
            closing = len(trace.ids) - trace.closing_start
            have[longest - closing :] += 1
            have_before += int(trace.closing_start > 0)
            for index in range(count):
                sums[index][longest - closing :] += seen[index][0]
                before[index] += seen[index][1]
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(torch.isfinite(total).all()) for total in (*sums, *before)):
        raise not_finite(loaded, "outputs of heads")
    return HeadMeans(
        closing=tuple((total / have).float() for total in sums),
        before=tuple((total / max(have_before, 1)).float() for total in before),
    )
