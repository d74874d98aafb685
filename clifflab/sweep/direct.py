"""Direct effects: what every head and MLP itself writes along the probe's direction, in one forward pass.

The residual stream is a sum of writes, so that the probe's logit is one too (SPEC section 4, Elhage et al. 2021):
embedding + all heads + all MLPs + biases, which is tested on every pass.

Shape suffixes: T tokens, D width, H heads of a layer, K directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from clifflab.errors import InputError
from clifflab.models.forward import not_finite
from clifflab.models.heads import HeadMap
from clifflab.models.hooks import capture
from clifflab.models.loading import LoadedModel
from clifflab.science.stats import Floats
from clifflab.sweep.types import Meter, SweepTrace

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass
class DirectEffects:
    """Parts of the directions' logits at the final position, as projections without a bias term.

    A write into a layer above a direction's own cannot reach it and is NaN.

    Attributes:
        heads: Every head in the order of :class:`~clifflab.models.heads.HeadMap`, ``[K, heads]``.
        mlps: ``[K, L]``.
        biases: Of the output projections, ``[K, L]``.
        embedding: What enters the first block, ``[K]``.
        logits: The directions' logits, their own bias included, ``[K]``.
    """

    heads: Floats
    mlps: Floats
    biases: Floats
    embedding: Floats
    logits: Floats

    def total(self) -> Floats:
        """Sum of all parts, ``[K]``: the directions' logits without their own bias."""
        parts = (self.heads, self.mlps, self.biases)
        return np.asarray(self.embedding + sum(np.nansum(part, axis=1) for part in parts))


@dataclass
class _Branch:
    """One block's pass at the final position: its two branches, each followed through what scales it."""

    entering: torch.Tensor | None = None
    values: torch.Tensor | None = None
    outs: dict[str, torch.Tensor] = field(default_factory=dict)
    firsts: dict[str, torch.Tensor] = field(default_factory=dict)
    lasts: dict[str, torch.Tensor] = field(default_factory=dict)
    centred: bool = False


@torch.no_grad()
def direct_effects(loaded: LoadedModel, heads: HeadMap, trace: SweepTrace, meter: Meter) -> DirectEffects:
    """Direct effects of all heads and MLPs on each direction's logit at the final position of one trace.

    Where a branch has an output norm (Gemma 2 and 3, OLMo 2) its recorded scale at this token is applied; the final
    norm never is.

    Raises:
        InputError: The direction is not the model's, or the writes of a block do not add up to what it adds to the
            residual stream (this architecture then has no direct effects; the other methods do not need them).
    """
    meter.check(loaded)
    passes = [_Branch() for _ in loaded.blocks]
    handles: list[Any] = []
    for index, block in enumerate(loaded.blocks):
        handles += _watch(passes[index], block, heads.layers[index].attention, heads.layers[index].projection)
    final: dict[int, torch.Tensor] = {}
    try:
        every = range(len(loaded.blocks))
        with capture(loaded.blocks, every, lambda at, hidden: final.__setitem__(at, hidden[0, -1].float().clone())):
            loaded.body(input_ids=torch.tensor([trace.ids], device=loaded.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    embedding_D = passes[0].entering
    assert embedding_D is not None
    writes_HD, mlps_D, biases_D = [], [], []
    multiplier = float(getattr(loaded.model.config.get_text_config(), "residual_multiplier", 1.0))
    for index, layer in enumerate(heads.layers):
        own = passes[index]
        assert own.values is not None
        assert own.entering is not None
        scale_D = _scale(own) * multiplier
        bias = getattr(layer.projection, "bias", None)
        heads_HD = layer.writes(own.values).float() * scale_D
        bias_D = torch.zeros_like(heads_HD[0]) if bias is None else bias.float() * scale_D
        mlp_D = own.lasts["mlp"] * multiplier if "mlp" in own.lasts else None
        _check_block(loaded, index, own, heads_HD.sum(0) + bias_D, mlp_D, final[index])
        assert mlp_D is not None
        writes_HD.append(heads_HD)
        mlps_D.append(mlp_D)
        biases_D.append(bias_D)
    return _project(meter, embedding_D, writes_HD, mlps_D, biases_D, final)


def _watch(own: _Branch, block: nn.Module, attention: nn.Module, projection: nn.Module) -> list[Any]:
    """Hooks that record a block's branches at the final position."""
    children = dict(block.named_children())
    mlp = _mlp(children, attention)

    def enter(_m: nn.Module, args: Any, kwargs: Any) -> None:
        own.entering = (args[0] if args else kwargs["hidden_states"])[0, -1].float().clone()

    def project(_m: nn.Module, args: Any) -> None:
        own.values = args[0][0, -1].clone()

    def branch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_m: nn.Module, _args: Any, output: Any) -> None:
            own.outs[name] = output[0] if isinstance(output, tuple) else output
            own.firsts[name] = own.lasts[name] = _last(own.outs[name])

        return hook

    def follow(module: nn.Module, args: Any, output: Any) -> None:
        # A norm or dropout of a branch takes the very tensor that the branch returned.
        for name, out in own.outs.items():
            if args and args[0] is out and isinstance(output, torch.Tensor):
                own.outs[name], own.lasts[name] = output, _last(output)
                own.centred |= isinstance(module, nn.LayerNorm)

    def leave(_m: nn.Module, _args: Any, _output: Any) -> None:
        own.outs.clear()  # whole sequences; only the final position is kept

    handles = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        projection.register_forward_pre_hook(project),
        attention.register_forward_hook(branch("attention")),
        block.register_forward_hook(leave),
    ]
    if mlp is not None:
        handles.append(mlp.register_forward_hook(branch("mlp")))
    skip = (attention, mlp)
    handles += [child.register_forward_hook(follow) for child in children.values() if child not in skip]
    return handles


def _mlp(children: dict[str, nn.Module], attention: nn.Module) -> nn.Module | None:
    names = ("mlp", "feed_forward", "ffn", "moe", "experts")
    found = [m for name, m in children.items() if m is not attention and any(word in name.lower() for word in names)]
    # Norms and dropouts of the branch carry its name too.
    found = [m for m in found if "norm" not in type(m).__name__.lower() and any(True for _ in m.parameters())]
    return found[0] if len(found) == 1 else None


def _last(hidden: torch.Tensor) -> torch.Tensor:
    """A branch's output at the final position, ``[D]``; a copy, since some blocks add into it."""
    return hidden.reshape(-1, hidden.shape[-1])[-1].float().clone()


def _scale(own: _Branch) -> torch.Tensor:
    """What the attention's output is multiplied by, entry by entry, before it enters the residual stream; ``[D]``."""
    first, last = own.firsts["attention"], own.lasts["attention"]
    return torch.where(first != 0, last / torch.where(first != 0, first, 1.0), 1.0)


def _check_block(
    loaded: LoadedModel,
    index: int,
    own: _Branch,
    attention_D: torch.Tensor,
    mlp_D: torch.Tensor | None,
    leaving_D: torch.Tensor,
) -> None:
    """Entering stream, attention and MLP must add up to the leaving stream, on the scale of the two writes."""
    problem = f"the writes of block {index} do not add up to what it adds to the residual stream"
    error = InputError("heads.method", loaded.spec.path, problem, "direct effects are not defined for it")
    if mlp_D is None or own.centred or own.entering is None:
        raise error
    if not torch.isfinite(leaving_D).all():
        raise not_finite(loaded, f"residual states after block {index}")
    writes = (attention_D, mlp_D.to(attention_D.device))
    left = leaving_D.to(attention_D.device) - own.entering.to(attention_D.device) - writes[0] - writes[1]
    dtype = loaded.model.dtype
    limit = _TOLERANCE.get(dtype, 1e-3) * float(writes[0].norm() + writes[1].norm())
    limit += 2 * torch.finfo(dtype).eps * (float(leaving_D.norm()) + float(own.entering.norm()))
    if not float(left.norm()) <= limit:
        raise error


def _project(
    meter: Meter,
    embedding_D: torch.Tensor,
    writes_HD: list[torch.Tensor],
    mlps_D: list[torch.Tensor],
    biases_D: list[torch.Tensor],
    final: dict[int, torch.Tensor],
) -> DirectEffects:
    weights_KD = meter.weights.double().cpu()
    layers = np.asarray(meter.layers)

    def along(rows: torch.Tensor) -> Floats:
        out: Floats = (weights_KD @ rows.double().cpu().T).numpy()
        return out

    def masked(values: Floats, at: Any) -> Floats:
        return np.where(at[None] <= layers[:, None], values, np.nan)

    depth = np.arange(len(mlps_D))
    of_head = np.repeat(depth, [len(writes) for writes in writes_HD])
    states = torch.stack([final[layer].cpu() for layer in meter.layers]).double()
    return DirectEffects(
        heads=masked(along(torch.cat([writes.cpu() for writes in writes_HD])), of_head),
        mlps=masked(along(torch.stack([mlp.cpu() for mlp in mlps_D])), depth),
        biases=masked(along(torch.stack([bias.cpu() for bias in biases_D])), depth),
        embedding=along(embedding_D[None])[:, 0],
        logits=((weights_KD * states).sum(1) + meter.biases.double().cpu()).numpy(),
    )
