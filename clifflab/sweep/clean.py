"""The unchanged model's pass over a trace, kept so that any block can be run again for its last tokens alone.

Shape suffixes: R rows, C tokens from ``start`` on, T all tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clifflab.models.forward import not_finite
from clifflab.models.heads import HeadLayer, HeadMap
from clifflab.models.loading import LoadedModel
from clifflab.sweep.attention import SharedPrefix, shared_prefix
from clifflab.sweep.types import Meter, SweepTrace

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
        leaving: Residual stream after the last block at those tokens, ``[1, C, D]``.
        carries: Whether blocks hand each other something beside the residual stream (keys and values that later layers
            share, as in Gemma 4): rows then have to pass through all blocks.
    """

    loaded: LoadedModel
    start: int
    tokens: int
    entering: list[torch.Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    prefix: SharedPrefix | None
    leaving: torch.Tensor
    carries: bool

    def after(self, layer: int) -> torch.Tensor:
        """Residual stream after a block, ``[1, C, D]``."""
        return self.entering[layer + 1] if layer + 1 < len(self.entering) else self.leaving

    def readings(self, meter: Meter) -> Any:
        """The unchanged model's readings, ``[M]`` float64."""
        into_1M = torch.full((1, meter.width), torch.nan, dtype=torch.float64)
        last = len(self.entering) - 1
        for layer in sorted({*meter.layers, last}):
            meter.read(layer, layer == last, self.after(layer)[:, -1], into_1M)
        if not torch.isfinite(into_1M).all():
            raise not_finite(self.loaded, "readings at the final position")
        return into_1M[0].numpy()

    def block(self, layer: int, states_RCD: torch.Tensor) -> torch.Tensor:
        """Run one block on rows of residual states; ``[R, C, D]``."""
        args, kwargs = self.calls[layer]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and len(mask) == 1:
            kwargs = {**kwargs, "attention_mask": mask.expand(len(states_RCD), -1, -1, -1)}
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
    leaving: list[torch.Tensor] = []
    carried: list[Any] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs[_HIDDEN]
        entering.append(hidden[:, start:].clone())  # a copy: some blocks add into what they are given
        carried.extend(value for value in (*args, *kwargs.values()) if _carrier(value))
        # Masks are the shared prefix's concern; whole sequences keep theirs.
        drop = ("attention_mask", "past_key_values", "layer_past", "past_key_value") if start else ()
        rest = {name: None if name in drop else _cut(value, start, total) for name, value in kwargs.items()}
        calls.append(((None, *(_cut(value, start, total) for value in args[1:])) if args else (), rest))

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        leaving.append((output[0] if isinstance(output, tuple) else output)[:, start:].clone())

    with shared_prefix(loaded, heads, start) if start else nullcontext() as prefix:
        with ExitStack() as hooks, torch.no_grad():
            for block in loaded.blocks:
                hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hooks.callback(loaded.blocks[-1].register_forward_hook(leave).remove)
            loaded.body(input_ids=torch.tensor([trace.ids], device=loaded.device), use_cache=False)
        if prefix is not None:
            prefix.recording = False
        yield CleanPass(loaded, start, total - start, entering, calls, prefix, leaving[0], bool(carried))


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
    if isinstance(value, dict) and value:
        return {name: _cut(part, start, total) for name, part in value.items()}
    return value


def _carrier(value: Any) -> bool:
    """Whether a block can leave something in there for later ones: a mapping that is filled as blocks run."""
    return isinstance(value, MutableMapping) and not (isinstance(value, dict) and value)
