"""Attention of a few last tokens over a prefix that all rows of a batch share, without a copy of the prefix per row.

While a model's attention goes through :func:`shared_prefix`, a first pass records each layer's keys and values; later
calls of its blocks see only the last tokens of many rows, and their queries meet the one recorded prefix in a single
product.

Shape suffixes: R rows, N query heads, G key-value heads, Q queries a key-value head serves, C last tokens, P prefix
tokens, S size of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clifflab.models.heads import HeadMap
from clifflab.models.loading import LoadedModel

_NAME = "clifflab_shared_prefix"


class UnsupportedAttentionError(Exception):
    """The attention asks for something that the shared prefix does not know."""


@dataclass
class Prefix:
    """What one layer's last tokens see of the tokens before them.

    Attributes:
        keys: ``[G, P, S]``, rotated as the model does.
        values: ``[G, P, S]``.
        mask: What each of the last tokens may see, ``[C, P + C]``: bool, or added to the scores; ``None`` is causal.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None


@dataclass(eq=False)
class SharedPrefix:
    """Recorded prefixes of one sequence, by attention module.

    Attributes:
        start: Tokens of the prefix.
        eager: Whether the model was loaded with eager attention, which has soft caps and sinks.
        recording: Whether the whole sequence runs through (and is recorded), or last tokens of many rows.
        layers: What was recorded.
    """

    start: int
    eager: bool
    recording: bool = True
    layers: dict[nn.Module, Prefix] = field(default_factory=dict)


_ACTIVE: list[SharedPrefix] = []


@contextmanager
def shared_prefix(loaded: LoadedModel, heads: HeadMap, start: int) -> Iterator[SharedPrefix]:
    """Route the model's attention through a shared prefix; the model is as before when the ``with`` closes.

    Args:
        loaded: The model.
        heads: Its heads.
        start: Tokens of the prefix.
    """
    owners = [loaded.body, *(layer.attention for layer in heads.layers)]
    configs = list({id(c): c for owner in owners if (c := getattr(owner, "config", None)) is not None}.values())
    # The private name: the public one would set the parts of a composite configuration too.
    before = [config._attn_implementation_internal for config in configs]
    state = SharedPrefix(start, eager=before[-1] == "eager")
    _ACTIVE.append(state)
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield state
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _ACTIVE.remove(state)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """What the library calls in place of its own attention: ``[R, N, C, S]`` queries to ``[R, C, N, S]`` values."""
    state = _ACTIVE[-1]
    if position_bias is not None:
        raise UnsupportedAttentionError("a position bias")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    extras: dict[str, Any] = {"softcap": softcap, "sinks": s_aux} if state.eager else {}
    if not state.recording:
        return joint_attention(query, key, value, state.layers[module], scaling, **extras), None
    mask = None if attention_mask is None else attention_mask[0, 0, state.start :]
    start = state.start
    state.layers[module] = Prefix(key[0, :, :start].contiguous(), value[0, :, :start].contiguous(), mask)
    if state.eager:
        whole = Prefix(key[0, :, :0], value[0, :, :0], None if attention_mask is None else attention_mask[0, 0])
        return joint_attention(query, key, value, whole, scaling, **extras), None
    own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out = own(module, query, key, value, attention_mask, scaling=scaling, **_others)
    return out[0], None


def joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: Prefix,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over a prefix that all rows share and over each row's own last tokens.

    Args:
        query: ``[R, N, C, S]``.
        key: Keys of the rows' own tokens, ``[R, G, C, S]``; G divides N.
        value: Their values.
        prefix: The shared part.
        scaling: Factor of the scores.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``.
        sinks: One more score a query head that takes part in the softmax and carries no value, ``[N]``.

    Returns:
        ``[R, C, N, S]``.
    """
    rows, count, last, size = query.shape
    groups = key.shape[1]
    served = count // groups
    # Scores of half-precision models are kept in float32, as fused kernels do.
    q = query.float() * scaling
    q_GXS = q.reshape(rows, groups, served, last, size).transpose(0, 1).reshape(groups, -1, size)
    shared = (q_GXS @ prefix.keys.float().transpose(1, 2)).reshape(groups, rows, served, last, -1)
    own = torch.einsum("rgqcs,rgts->grqct", q.reshape(rows, groups, served, last, size), key.float())
    if softcap:
        shared, own = softcap * torch.tanh(shared / softcap), softcap * torch.tanh(own / softcap)
    span = prefix.keys.shape[1]
    if prefix.mask is None:
        causal = torch.ones(last, last, dtype=torch.bool, device=query.device).tril()
        own = own.masked_fill(~causal, -torch.inf)
    elif prefix.mask.dtype == torch.bool:
        shared = shared.masked_fill(~prefix.mask[:, :span], -torch.inf)
        own = own.masked_fill(~prefix.mask[:, span:], -torch.inf)
    else:
        shared, own = shared + prefix.mask[:, :span].float(), own + prefix.mask[:, span:].float()
    top = own.amax(-1, keepdim=True)
    if span:
        top = torch.maximum(top, shared.amax(-1, keepdim=True))
    extra: Any = 0.0
    if sinks is not None:
        sink = sinks.float().reshape(groups, 1, served, 1, 1)
        top = torch.maximum(top, sink)
        extra = (sink - top).exp()
    if torch.is_grad_enabled():
        shared, own = (shared - top).exp(), (own - top).exp()
    else:
        shared, own = shared.sub_(top).exp_(), own.sub_(top).exp_()
    total = shared.sum(-1, keepdim=True) + own.sum(-1, keepdim=True) + extra
    out = torch.einsum("grqct,rgts->grqcs", own, value.float())
    mixed = shared.reshape(groups, rows * served * last, span) @ prefix.values.float()
    out = (out + mixed.reshape(out.shape)) / total
    joined: torch.Tensor = out.permute(1, 3, 0, 2, 4).reshape(rows, last, count, -1)
    return joined.to(query.dtype).contiguous()


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The mask that the model's own attention would get."""
    state = _ACTIVE[-1] if _ACTIVE else None
    make: Callable[..., Any] = eager_mask if state and state.eager else sdpa_mask
    return make(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
