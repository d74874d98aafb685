"""Reach into the heads of the planted-cliff model: slices, scales, writes and states, all undone at exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

Head = tuple[int, int]


def head_size(model: LlamaForCausalLM) -> int:
    """Size of one head."""
    return int(model.model.layers[0].self_attn.head_dim)


def head_slice(model: LlamaForCausalLM, head: int) -> slice:
    """Columns of the output projection (rows of q, k and v) of a head."""
    size = head_size(model)
    return slice(head * size, (head + 1) * size)


def planted_parameters(model: LlamaForCausalLM, heads: list[Head]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Name -> (parameter, bool mask of the planted entries) for every projection that holds a planted head."""
    found: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for layer, head in heads:
        attention = model.model.layers[layer].self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(attention, name).weight
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            _, mask = found.setdefault(key, (weight, torch.zeros_like(weight, dtype=torch.bool)))
            where = head_slice(model, head)
            if name == "o_proj":
                mask[:, where] = True
            else:
                mask[where] = True
    return found


@torch.no_grad()
def remove_heads(model: LlamaForCausalLM, heads: list[Head]) -> None:
    """Zero what heads write, for good."""
    for layer, head in heads:
        model.model.layers[layer].self_attn.o_proj.weight[:, head_slice(model, head)] = 0.0


@contextmanager
def masked_gradients(masks: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Multiply gradients by masks while the context is open."""
    handles = [
        weight.register_hook(lambda grad, keep=mask: grad * keep)  # type: ignore[no-untyped-call]
        for weight, mask in masks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def scaled_heads(model: LlamaForCausalLM, scales: Tensor) -> Iterator[None]:
    """Scale the attention-weighted values of all heads before the output projections.

    Args:
        model: The model; unchanged when the context closes.
        scales: `[batch or 1, layer, head]`.
    """
    size = head_size(model)

    def hook_of(layer: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        factors = scales[:, layer].repeat_interleave(size, dim=-1)[:, None]
        return lambda module, args: (args[0] * factors,)

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(hook_of(layer))
        for layer, block in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def head_writes(model: LlamaForCausalLM, heads: list[Head]) -> Iterator[list[Tensor]]:
    """Collect what heads write into the residual stream, one `[batch, position, width]` a head and forward pass."""
    found: list[Tensor] = []

    def hook_of(head: int) -> Callable[[nn.Linear, tuple[Tensor]], None]:
        where = head_slice(model, head)
        return lambda module, args: found.append(args[0][..., where] @ module.weight[:, where].T)

    handles = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook_of(head)) for layer, head in heads
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def block_outputs(model: LlamaForCausalLM, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Hold the residual stream after some blocks, `[batch, position, width]`, of the latest forward pass."""
    found: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            found[layer] = output

        return hook

    handles = [model.model.layers[layer].register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
