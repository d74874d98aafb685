"""Attention heads by structure: where each head's output enters its output projection, checked on a real forward pass.

Shape suffixes: B rows, T tokens, D width of the residual stream, H heads of a layer, S size of one head, I = H x S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clifflab.errors import InputError
from clifflab.models.loading import LoadedModel

Head = tuple[int, int]

# What architectures call the projection that ends their attention.
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_COUNTS = ("num_v_heads", "num_heads", "num_attention_heads", "n_heads", "n_head")
_HINT = "use a model whose attention ends in one output projection (o_proj, out_proj, dense, c_proj)"


@dataclass(frozen=True)
class HeadLayer:
    """The heads of one block.

    Attributes:
        index: Layer.
        attention: The attention module.
        projection: Its output projection, called with the heads' values side by side, ``z [B, T, I]``.
        heads: Heads, H.
        size: Entries of ``z`` that belong to one head, S (the size of its values).
        transposed: Whether the projection keeps its weight as ``[I, D]`` (GPT-2's Conv1D) instead of ``[D, I]``.
    """

    index: int
    attention: nn.Module
    projection: nn.Module
    heads: int
    size: int
    transposed: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """The projection's weight, ``[D, I]``; a view."""
        weight: torch.Tensor = self.projection.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def columns(self, head: int) -> slice:
        """Entries of ``z`` that a head owns."""
        return slice(head * self.size, (head + 1) * self.size)

    def writes(self, z: torch.Tensor) -> torch.Tensor:
        """What each head adds to the projection's output: ``[..., I]`` to ``[..., H, D]``, without the bias."""
        z_HS = z.reshape(*z.shape[:-1], self.heads, self.size)
        weight_DHS = self.weight.reshape(-1, self.heads, self.size)
        return torch.einsum("...hs,dhs->...hd", z_HS, weight_DHS)


@dataclass(frozen=True)
class HeadMap:
    """All heads of a model.

    Attributes:
        layers: One entry a block, in order.
    """

    layers: tuple[HeadLayer, ...]

    def __iter__(self) -> Iterator[Head]:
        """Every head as ``(layer, head)``, layer by layer."""
        return ((layer.index, head) for layer in self.layers for head in range(layer.heads))

    def __len__(self) -> int:
        return sum(layer.heads for layer in self.layers)

    def check(self, heads: Sequence[Head], field: str) -> None:
        """Refuse a head that the model does not have.

        Raises:
            InputError: Naming the head and how many there are.
        """
        for layer, head in heads:
            if not 0 <= layer < len(self.layers):
                remedy = f"give layers 0 to {len(self.layers) - 1}"
                raise InputError(field, f"{layer}.{head}", "the model has no such layer", remedy)
            if not 0 <= head < self.layers[layer].heads:
                remedy = f"give heads 0 to {self.layers[layer].heads - 1}"
                raise InputError(field, f"{layer}.{head}", f"layer {layer} has no such head", remedy)


def find_heads(loaded: LoadedModel) -> HeadMap:
    """The model's heads, found by structure and checked numerically.

    Raises:
        InputError: A block's attention does not end in exactly one output projection, its width does not divide into
            the heads, or the heads' writes do not add up to what the attention returns.
    """
    found = HeadMap(tuple(_head_layer(loaded, index) for index in range(len(loaded.blocks))))
    check_heads(loaded, found)
    return found


def heads_of(loaded: LoadedModel) -> HeadMap:
    """The model's heads, found and checked once as long as it stays loaded (see :func:`find_heads`)."""
    if loaded.heads is None:
        loaded.heads = find_heads(loaded)
    found: HeadMap = loaded.heads
    return found


def _head_layer(loaded: LoadedModel, index: int) -> HeadLayer:
    block: Any = loaded.blocks[index]
    candidates = []
    for path, module in block.named_modules():
        parent, _, name = path.rpartition(".")
        if name in PROJECTIONS and _is_projection(module) and _in_attention(block, parent):
            candidates.append((parent, module))
    if len(candidates) != 1:
        problem = f"block {index} has {len(candidates)} attention output projections where one is expected"
        raise InputError("models.path", loaded.spec.path, problem, _HINT)
    parent, projection = candidates[0]
    attention = block.get_submodule(parent)
    transposed = type(projection).__name__ == "Conv1D"
    shape = tuple(projection.weight.shape)
    wide, width = shape if transposed else shape[::-1]
    count = next((getattr(attention, name) for name in _COUNTS if isinstance(getattr(attention, name, None), int)), 0)
    count = count or int(loaded.model.config.get_text_config().num_attention_heads)
    if width != loaded.d_model or wide % count:
        problem = f"the output projection of block {index} ({wide} to {width}) does not divide into {count} heads"
        raise InputError("models.path", loaded.spec.path, problem, _HINT)
    return HeadLayer(index, attention, projection, count, wide // count, transposed)


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point()


def _in_attention(block: nn.Module, path: str) -> bool:
    """Whether the module that holds a projection is a block's own attention."""
    if not path:
        return False
    words = f"{path} {type(block.get_submodule(path)).__name__}".lower()
    return ("attn" in words or "attention" in words) and "cross" not in words


@torch.inference_mode()
def check_heads(loaded: LoadedModel, heads: HeadMap) -> None:
    """Check on real forward passes that heads are what the map says.

    The heads' writes and the bias add up to the projection's output, that output is what the attention returns, and
    removing one head at the last token takes its write away there and changes no earlier token and no earlier layer.

    Raises:
        InputError: They do not.
    """
    from clifflab.models.intervene import Intervention, intervene

    ids = torch.tensor([loaded.renderer.prompt_ids([{"role": "user", "content": "hello"}])], device=loaded.device)
    clean = _passes(loaded, heads, ids)
    for layer in heads.layers:
        z, out, returned = clean[layer.index]
        bias = getattr(layer.projection, "bias", None)
        total = layer.writes(z).sum(-2) + (0 if bias is None else bias)
        if not _near(total, out):
            raise _unlike(loaded, f"the heads' writes of block {layer.index} do not add up to its output projection")
        if not _near(returned, out):
            raise _unlike(loaded, f"block {layer.index} changes what its output projection returns")
    last = ids.shape[1] - 1
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, last] = True
    for index in sorted({0, len(heads.layers) // 2, len(heads.layers) - 1}):
        layer, head = heads.layers[index], heads.layers[index].heads - 1
        with intervene(heads, [[(index, head)]], Intervention(), where):
            removed = _passes(loaded, heads, ids)
        before, after = clean[index][1], removed[index][1]
        own = layer.writes(clean[index][0])[:, last, head]
        same = all(_near(removed[below][1], clean[below][1]) for below in range(index))
        same &= last == 0 or _near(after[:, :last], before[:, :last])
        if not same or not _near(after[:, last] + own, before[:, last]):  # on the scale of what is rounded
            raise _unlike(loaded, f"removing head {head} of block {index} changes something else than its write")


def _passes(loaded: LoadedModel, heads: HeadMap, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
    """Of each layer: what enters its output projection, what leaves it, and what its attention returns."""
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    inside: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for layer in heads.layers:

        def projected(_m: nn.Module, inputs: Any, output: Any, index: int = layer.index) -> None:
            inside[index] = (inputs[0], output)

        def returned(_m: nn.Module, _inputs: Any, output: Any, index: int = layer.index) -> None:
            if index in inside:
                seen[index] = (*inside[index], output[0] if isinstance(output, tuple) else output)

        handles += [
            layer.projection.register_forward_hook(projected),
            layer.attention.register_forward_hook(returned),
        ]
    try:
        loaded.body(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missed = [layer.index for layer in heads.layers if layer.index not in seen]
    if missed:
        raise _unlike(loaded, f"the output projection of block {missed[0]} is not used in a forward pass")
    return seen


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal within the rounding of the dtype, on the scale of the larger tensor."""
    scale = max(float(b.abs().max()), 1e-6)
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 1e-2}.get(b.dtype, 1e-4)
    return bool(((a.float() - b.float()).abs().max() <= tolerance * scale).item())


def _unlike(loaded: LoadedModel, problem: str) -> InputError:
    return InputError("models.path", loaded.spec.path, problem, _HINT)
