"""The unchanged model's pass over a trace, kept so that any block can be run again for its last tokens alone.

Shape suffixes: R rows, C tokens from ``start`` on, T all tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clifflab.models.heads import HeadLayer, HeadMap
from clifflab.models.loading import LoadedModel
from clifflab.sweep.attention import SharedPrefix, shared_prefix
from clifflab.sweep.types import SweepTrace

_HIDDEN = "hidden_states"


@dataclass
class CleanPass:
    """What resuming needs.

    Attributes:
        loaded: The model.
        start: First token that is run again; the tokens before it are shared by all rows. 0 runs whole sequences.
        tokens: Tokens that are run again, C.
        entering: Residual stream entering each block at those tokens, ``[1, C, D]``.
        calls: How the model called each block, the tokens before ``start`` cut away.
        prefix: Keys and values of the tokens before ``start``; ``None`` where whole sequences run.
    """

    loaded: LoadedModel
    start: int
    tokens: int
    entering: list[torch.Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    prefix: SharedPrefix | None

    def block(self, layer: int, states_RCD: torch.Tensor) -> torch.Tensor:
        """Run one block on rows of residual states; ``[R, C, D]``."""
        args, kwargs = self.calls[layer]
        if args:
            out = self.loaded.blocks[layer](states_RCD, *args[1:], **kwargs)
        else:
            out = self.loaded.blocks[layer](**{**kwargs, _HIDDEN: states_RCD})
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden


@contextmanager
def clean_pass(loaded: LoadedModel, heads: HeadMap, trace: SweepTrace, start: int) -> Iterator[CleanPass]:
    """Run the unchanged model once over a trace; blocks can be run again as long as the ``with`` is open.

    Args:
        loaded: The model.
        heads: Its heads.
        trace: The trace.
        start: First token to be run again; 0 runs whole sequences, with the model's own attention.
    """
    total = len(trace.ids)
    entering: list[torch.Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs[_HIDDEN]
        entering.append(hidden[:, start:].clone() if start else hidden)
        # Masks are the shared prefix's concern; whole sequences keep theirs.
        drop = ("attention_mask", "past_key_values", "layer_past", "past_key_value") if start else ()
        rest = {name: None if name in drop else _cut(value, start, total) for name, value in kwargs.items()}
        calls.append(((None, *(_cut(value, start, total) for value in args[1:])) if args else (), rest))

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in loaded.blocks]
    with shared_prefix(loaded, heads, start) if start else nullcontext() as prefix:
        try:
            ids = torch.tensor([trace.ids], device=loaded.device)
            with torch.no_grad():
                loaded.body(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if prefix is not None:
            prefix.recording = False
        yield CleanPass(loaded, start, total - start, entering, calls, prefix)


@contextmanager
def changed_heads(layer: HeadLayer, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[int]]:
    """Pass what enters one layer's output projection through ``change``; yields a list that grows as it fires."""
    fired: list[int] = []

    def hook(_module: nn.Module, inputs: Any) -> Any:
        fired.append(layer.index)
        return (change(inputs[0]), *inputs[1:])

    handle = layer.projection.register_forward_pre_hook(hook)
    try:
        yield fired
    finally:
        handle.remove()


def _cut(value: Any, start: int, total: int) -> Any:
    """Anything that a block is called with, for the tokens from ``start`` on."""
    if not start:
        return value
    if isinstance(value, torch.Tensor):
        if value.ndim == 1 and value.shape[0] == total:
            return value[start:]
        if value.ndim >= 2 and value.shape[1] == total:
            return value[:, start:]
        if value.ndim == 3 and value.shape[2] == total:
            return value[:, :, start:]
        return value
    if isinstance(value, tuple | list):
        return type(value)(_cut(part, start, total) for part in value)
    if isinstance(value, dict):
        return {name: _cut(part, start, total) for name, part in value.items()}
    return value
