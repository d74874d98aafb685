"""Hooks on decoder blocks: context managers that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clifflab.errors import InterventionError

OnBlock = Callable[[int, torch.Tensor], None]


@contextmanager
def capture(blocks: nn.ModuleList, layers: Sequence[int], on_block: OnBlock) -> Iterator[None]:
    """Call ``on_block(layer, hidden)`` with the residual stream after each chosen block.

    ``hidden`` is ``h_l`` of SPEC section 2, ``[batch, tokens, d_model]``, before the final norm. It is the model's own
    tensor: read it, never write to it.

    Args:
        blocks: All decoder blocks, in order.
        layers: Which of them to look at.
        on_block: Called during the forward pass.

    Raises:
        InterventionError: A chosen block never ran although the body of the ``with`` ended well.
    """
    seen: set[int] = set()

    def hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def fire(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.add(layer)
            on_block(layer, output[0] if isinstance(output, tuple) else output)

        return fire

    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(layers) - seen)
    if missed:
        raise InterventionError(f"the hooks on layers {missed} never fired: the captured states would be empty")
