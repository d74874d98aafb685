"""The plain sweep: one full forward pass over whole sequences for every set of heads. The reference of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from clifflab.models.forward import not_finite, position_ids
from clifflab.models.heads import Head, HeadMap
from clifflab.models.hooks import capture
from clifflab.models.intervene import Intervention, intervene
from clifflab.models.loading import LoadedModel
from clifflab.sweep.types import Meter, Positions, SweepTrace, Swept


@torch.inference_mode()
def plain_sweep(
    loaded: LoadedModel,
    heads: HeadMap,
    traces: Sequence[SweepTrace],
    sets: Sequence[Sequence[Head]],
    meter: Meter,
    intervention: Intervention,
    positions: Positions,
    padding: Literal["left", "right"] = "right",
    published: bool = False,
) -> list[Swept]:
    """Readings of a batch of traces with each set of heads changed, as published: a whole forward pass a set.

    Args:
        loaded: The model.
        heads: Its heads.
        traces: The batch.
        sets: Sets of heads, changed together.
        meter: What is read.
        intervention: What is done to the heads.
        positions: At the closing tokens, or at all tokens.
        padding: Side of the padding.
        published: Keep all hidden states and compute the logits of all tokens, as the paper's code does; the readings
            are the same.
    """
    meter.check(loaded)
    width = max(len(trace.ids) for trace in traces)
    tokens_BT = torch.full((len(traces), width), loaded.pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(traces), width), dtype=torch.long)
    where_BT = torch.zeros((len(traces), width), dtype=torch.bool)
    from_end_BT = torch.zeros((len(traces), width), dtype=torch.long)
    finals = []
    for b, trace in enumerate(traces):
        start = width - len(trace.ids) if padding == "left" else 0
        stop = start + len(trace.ids)
        tokens_BT[b, start:stop] = torch.tensor(trace.ids)
        mask_BT[b, start:stop] = 1
        where_BT[b, start + (trace.closing_start if positions == "closing" else 0) : stop] = True
        from_end_BT[b, :stop] = torch.arange(stop - 1, -1, -1)
        finals.append(stop - 1)
    rows, last = torch.arange(len(traces)), len(loaded.blocks) - 1
    batch = {
        "input_ids": tokens_BT.to(loaded.device),
        "attention_mask": mask_BT.to(loaded.device),
        "position_ids": position_ids(mask_BT).to(loaded.device),
    }

    def run() -> torch.Tensor:
        into_BM = torch.full((len(traces), meter.width), torch.nan)

        def on_block(layer: int, hidden_BTD: torch.Tensor) -> None:
            meter.read(layer, layer == last, hidden_BTD[rows.to(hidden_BTD.device), finals], into_BM)

        with capture(loaded.blocks, sorted({*meter.layers, last}), on_block):
            if published:
                loaded.model(**batch, use_cache=False, output_hidden_states=True)
            else:
                loaded.body(**batch, use_cache=False)
        if not torch.isfinite(into_BM).all():
            raise not_finite(loaded, "readings at the final position")
        return into_BM

    clean_BM = run()
    changed = []
    for members in sets:
        with intervene(heads, [members], intervention, where_BT, from_end_BT):
            changed.append(run())
    changed_BSM = torch.stack(changed, 1) if changed else torch.empty(len(traces), 0, meter.width)
    for s, members in enumerate(sets):
        above = [k for k, at in enumerate(meter.layers) if members and at < min(layer for layer, _ in members)]
        changed_BSM[:, s, above] = torch.nan  # a direction below all of the heads cannot see them
    return [Swept(clean_BM[b].numpy(), changed_BSM[b].numpy()) for b in range(len(traces))]
