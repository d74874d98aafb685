"""Interventions on heads: scaled, replaced by a mean, renormalised; hooks that leave no trace (SPEC section 4).

Every method (plain, closing, all positions, first order, generation) changes heads through :meth:`Intervention.apply`,
so that they differ in speed alone.

Shape suffixes: B rows, T tokens, H heads of a layer, S size of one head, I = H x S, K closing offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clifflab.errors import InterventionError
from clifflab.models.heads import Head, HeadLayer, HeadMap


@dataclass(frozen=True)
class HeadMeans:
    """Mean output of every head over benign answered traces.

    Attributes:
        closing: Of each layer ``[K, I]``: means at the K last closing offsets, the final position last.
        before: Of each layer ``[I]``: means over all earlier tokens, which also serve offsets beyond K.
    """

    closing: tuple[torch.Tensor, ...]
    before: tuple[torch.Tensor, ...]

    def at(self, layer: int, from_end: torch.Tensor) -> torch.Tensor:
        """Means for tokens that stand ``from_end`` tokens before the final position, ``[..., I]``."""
        closing, before = self.closing[layer].to(from_end.device), self.before[layer].to(from_end.device)
        table = torch.cat([before[None], closing])
        return table[(len(closing) - from_end).clamp_min(0)]


@dataclass(frozen=True)
class Intervention:
    """What is done to the output of chosen heads.

    Attributes:
        gamma: Factor of their values; 0 removes them.
        means: Replace them by these means instead; ``gamma`` is not used then.
        renormalise: Bring ``z`` of each token back to the norm that it had. Tokens and rows never mix.
    """

    gamma: float = 0.0
    means: HeadMeans | None = None
    renormalise: bool = False

    def apply(
        self, layer: HeadLayer, z_BTI: torch.Tensor, chosen_BH: torch.Tensor, from_end_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``z`` with the chosen heads of each row changed, ``[B, T, I]``.

        Args:
            layer: The layer whose heads these are.
            z_BTI: The heads' values, ``[B or 1, T, I]``.
            chosen_BH: Which heads of each row, bool ``[B or 1, H]``.
            from_end_BT: Distance of each token from the final position, ``[B or 1, T]``; needed with ``means``.
        """
        chosen_B1I = chosen_BH.repeat_interleave(layer.size, dim=-1)[:, None]
        if self.means is None:
            out = z_BTI * torch.where(chosen_B1I, self.gamma, 1.0).to(z_BTI.dtype)
        else:
            if from_end_BT is None:
                raise InterventionError("means are by distance from the final position, which was not given")
            out = torch.where(chosen_B1I, self.means.at(layer.index, from_end_BT).to(z_BTI), z_BTI)
        if not self.renormalise:
            return out
        before, after = z_BTI.float().norm(dim=-1, keepdim=True), out.float().norm(dim=-1, keepdim=True)
        ratio = torch.where(after > 0, before / after.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        untouched = ~chosen_BH.any(-1)[:, None, None]
        return torch.where(untouched, out, (out.float() * ratio).to(out.dtype))


def chosen_masks(heads: HeadMap, sets: Sequence[Sequence[Head]], device: Any = None) -> dict[int, torch.Tensor]:
    """For each layer with a chosen head: which heads of each row, bool ``[B, H]``."""
    masks: dict[int, torch.Tensor] = {}
    for row, members in enumerate(sets):
        heads.check(members, "heads")
        for layer, head in members:
            if layer not in masks:
                masks[layer] = torch.zeros((len(sets), heads.layers[layer].heads), dtype=torch.bool)
            masks[layer][row, head] = True
    return {layer: mask.to(device) for layer, mask in masks.items()}


@dataclass
class ChosenRows:
    """Which heads are changed in the rows of the batch that a ``with`` of :func:`intervene` runs.

    Attributes:
        masks: For each layer with a chosen head, bool ``[B or 1, H]``.
    """

    masks: dict[int, torch.Tensor]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows: those of a batch that shrinks while it is generated."""
        for layer, mask in self.masks.items():
            if len(mask) > 1:
                self.masks[layer] = mask[torch.tensor(list(rows), device=mask.device)]


@contextmanager
def intervene(
    heads: HeadMap,
    sets: Sequence[Sequence[Head]],
    intervention: Intervention,
    where_BT: torch.Tensor | None = None,
    from_end_BT: torch.Tensor | None = None,
) -> Iterator[ChosenRows]:
    """Change heads in every forward pass inside the ``with``; the model is as before when it closes.

    What the ``with`` yields follows a batch whose rows leave it.

    Args:
        heads: The model's heads.
        sets: Heads of each row of the batch; a single set serves all rows.
        intervention: What is done to them.
        where_BT: Tokens at which, bool ``[B or 1, T]``; everywhere by default (also in generation, whatever T).
        from_end_BT: Distance of each token from the final position; needed with means.

    Raises:
        InterventionError: A hook never fired although the body of the ``with`` ended well.
    """
    chosen = ChosenRows(chosen_masks(heads, sets))
    masks = chosen.masks
    fired: set[int] = set()

    def hook_of(layer: HeadLayer) -> Callable[[nn.Module, Any], Any]:
        def hook(_module: nn.Module, inputs: Any) -> Any:
            z_BTI = inputs[0]
            fired.add(layer.index)
            end = None if from_end_BT is None else from_end_BT.to(z_BTI.device)
            masks[layer.index] = masks[layer.index].to(z_BTI.device)
            changed = intervention.apply(layer, z_BTI, masks[layer.index], end)
            if where_BT is not None:
                changed = torch.where(where_BT.to(z_BTI.device)[..., None], changed, z_BTI)
            return (changed, *inputs[1:])

        return hook

    handles = [
        heads.layers[layer].projection.register_forward_pre_hook(hook_of(heads.layers[layer])) for layer in masks
    ]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(masks) - fired)
    if missed:
        raise InterventionError(f"the hooks on the heads of layers {missed} never fired: nothing was changed there")
