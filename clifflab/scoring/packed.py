"""Packing: traces side by side in one row of tokens, each attending to itself alone, without any padding.

While a pass runs, the model's attention goes through :func:`_attention`, which hands each run of equally long traces to
the attention that the model was loaded with. Masks (causal, sliding windows) are the library's own for one sequence of
that length; soft caps and sinks are the model's own. A trial decides whether a model allows it.

Shape suffixes: R traces of a run, L tokens of each, N heads, T tokens of all traces, S size of one head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clifflab.models.loading import LoadedModel

_NAME = "clifflab_packed"


class PackedAttention:
    """Keeps the traces of a packed row apart.

    Args:
        loaded: The model.

    Raises:
        ValueError: The model has no attention setting that could be changed, or several that differ, or one that would
            ignore the chunks that the model attends within.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._configs = configs_of(loaded)
        implementations = {config._attn_implementation_internal for config in self._configs}
        if len(implementations) != 1:
            raise ValueError(f"attention implementations {implementations}")
        self.own = implementations.pop() or "eager"
        if "flash" in self.own and any(getattr(config, "attention_chunk_size", None) for config in self._configs):
            raise ValueError(f"{self.own} knows no chunks of attention")
        self.runs: list[tuple[int, int, int]] = []

    @contextmanager
    def apart(self, lengths: Sequence[int]) -> Iterator[None]:
        """Attention stays within each trace as long as the ``with`` is open; then the model is as before.

        Args:
            lengths: Tokens of each trace, in the order of the row.
        """
        self.runs, start = [], 0
        for length, group in groupby(lengths):
            count = len(list(group))
            self.runs.append((start, count, length))
            start += count * length
        before = [config._attn_implementation_internal for config in self._configs]
        _ACTIVE.append(self)
        try:
            # The private name: the public one would set the parts of a composite configuration too.
            for config in self._configs:
                config._attn_implementation_internal = _NAME
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
            _ACTIVE.remove(self)


def configs_of(loaded: LoadedModel) -> list[Any]:
    """The settings that the modules of a model's body read, each once."""
    owners: list[Any] = [getattr(module, "config", None) for module in loaded.body.modules()]
    found = {id(config): config for config in owners if hasattr(config, "_attn_implementation_internal")}
    return list(found.values())


class _Mask:
    """Travels through the model in a mask's place, and makes the mask of one sequence of any length."""

    def __init__(self, make: Callable[..., Any], about: dict[str, Any]) -> None:
        self._make, self._about = make, about
        self._made: dict[int, Any] = {}

    def of(self, length: int) -> Any:
        """The library's mask, ``[1, 1, L, L]``; ``None`` is causal."""
        if length not in self._made:
            sizes = {"batch_size": 1, "q_length": length, "kv_length": length, "attention_mask": None}
            self._made[length] = self._make(**{**self._about, **sizes})
        return self._made[length]


_ACTIVE: list[PackedAttention] = []


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    position_ids: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What the library calls in place of its own attention: ``[1, N, T, S]`` queries to ``[1, T, N, S]`` values."""
    state = _ACTIVE[-1]
    if not isinstance(attention_mask, _Mask):
        raise TypeError("the model makes its own attention mask")
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(state.own, eager)
    parts = []
    for start, count, length in state.runs:
        # All runs are views: nothing is copied on the way in.
        q, k, v = (
            part[0, :, start : start + count * length].view(part.shape[1], count, length, -1).transpose(0, 1)
            for part in (query, key, value)
        )
        mask = attention_mask.of(length)
        if isinstance(mask, torch.Tensor):
            mask = mask.to(q.device)  # blocks may lie on several GPUs
        out_RLNS = own(module, q, k, v, mask, **others)[0]
        parts.append(out_RLNS.flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _mask(*args: Any, **about: Any) -> Any:
    """What the library calls in place of making a mask."""
    if args:
        raise TypeError("a mask is made in an unknown way")
    return _Mask(ALL_MASK_ATTENTION_FUNCTIONS[_ACTIVE[-1].own], about)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
