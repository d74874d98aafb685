"""A first-order estimate of every head's effect from one forward and one backward pass (attribution patching).

Nanda (2023), "Attribution patching"; Syed et al. (2023, arXiv 2310.10348). The effect of replacing a head's output
``z`` by ``z'`` is estimated as ``(z' - z) . d reading / d z``, summed over the changed tokens.

Shape suffixes: C tokens that are run again, I a layer's head outputs side by side, H heads of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch

from clifflab.errors import InterventionError
from clifflab.models.forward import not_finite
from clifflab.models.heads import HeadLayer, HeadMap
from clifflab.models.intervene import Intervention
from clifflab.models.loading import LoadedModel
from clifflab.science.stats import Floats
from clifflab.sweep.clean import changed_heads, clean_pass
from clifflab.sweep.resume import shares_prefix
from clifflab.sweep.types import Meter, Positions, SweepTrace


def attribution(
    loaded: LoadedModel,
    heads: HeadMap,
    trace: SweepTrace,
    meter: Meter,
    intervention: Intervention,
    positions: Positions,
    share: bool = True,
) -> Floats:
    """Estimated effects of every head alone, ``[heads, 2]``: on the first direction's logit, and on the log-odds.

    Heads above the direction's layer have no effect on its logit (NaN). With changes at the closing tokens, only these
    tokens are run with gradients.

    Args:
        loaded: The model; its parameters get no gradients.
        heads: Its heads.
        trace: The trace.
        meter: What is read; of its directions only the first.
        intervention: What is done to the heads.
        positions: At the closing tokens, or at all tokens.
        share: Whether changes at closing tokens may run those alone; whole sequences otherwise.

    Raises:
        InterventionError: A head's output was never seen.
    """
    meter.check(loaded)
    closing = positions == "closing"
    shared = share and closing and trace.closing_start > 0 and shares_prefix(loaded, heads)
    moved: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    with _no_gradients(loaded), clean_pass(loaded, heads, trace, trace.closing_start if shared else 0) as base:

        def probe(z_1CI: torch.Tensor) -> torch.Tensor:
            seen.append(z_1CI.detach())
            moved.append(torch.zeros_like(z_1CI, requires_grad=True))
            return z_1CI + moved[-1]

        reading: list[torch.Tensor] = []
        with torch.enable_grad(), ExitStack() as stack:
            fired = [stack.enter_context(changed_heads(layer, probe)) for layer in heads.layers]
            states = base.entering[0].detach()
            for at in range(len(loaded.blocks)):
                states = base.block(at, states)
                if at == meter.layers[0]:
                    weight = meter.weights[0].to(states.device)
                    reading.append(states[0, -1].float() @ weight)
            reading.append(meter.lens.log_odds(states[:, -1])[0])
            if not all(fired):
                raise InterventionError("the hooks on some layers' heads never fired: their effects are not known")
            below = meter.layers[0] + 1
            gradients = [
                torch.autograd.grad(reading[0], moved[:below], retain_graph=True),
                torch.autograd.grad(reading[1], moved),
            ]
    where_C = torch.ones(seen[0].shape[1], dtype=torch.bool)
    if closing and not shared:
        where_C[: trace.closing_start] = False
    from_end_1C = torch.arange(seen[0].shape[1] - 1, -1, -1)[None]
    columns = []
    for layer, z_1CI in zip(heads.layers, seen, strict=True):
        steps = [None if layer.index >= len(by_layer) else by_layer[layer.index][0] for by_layer in gradients]
        from_end, where = from_end_1C.to(z_1CI.device), where_C.to(z_1CI.device)
        columns.append(_estimates(layer, intervention, z_1CI, steps, from_end, where))
    estimates = np.concatenate(columns)
    if not np.isfinite(estimates[:, 1]).all():
        raise not_finite(loaded, "gradients of the refusal log-odds")
    return estimates


def _estimates(
    layer: HeadLayer,
    intervention: Intervention,
    z_1CI: torch.Tensor,
    gradients: list[torch.Tensor | None],
    from_end_1C: torch.Tensor,
    where_C: torch.Tensor,
) -> Floats:
    """``(z' - z) . gradient`` for every head of a layer alone, ``[H, readings]``; no copy of ``z`` a head is made.

    Changing all heads at once gives each head's own step; renormalisation then scales all of ``z`` by one number for
    each head and token, which follows from norms.
    """

    def by_head(values_CI: torch.Tensor) -> torch.Tensor:
        return values_CI.reshape(len(values_CI), layer.heads, layer.size).sum(-1)

    every = torch.ones(1, layer.heads, dtype=torch.bool, device=z_1CI.device)
    own = replace(intervention, renormalise=False).apply(layer, z_1CI, every, from_end_1C)[0].float()
    z_CI = z_1CI[0].float()
    step_CI = own - z_CI
    ratio_CH = torch.ones(len(z_CI), layer.heads, device=z_CI.device)
    if intervention.renormalise:
        before_C1 = z_CI.square().sum(-1, keepdim=True)
        after_CH = before_C1 - by_head(z_CI.square()) + by_head(own.square())
        ratio_CH = torch.where(after_CH > 0, (before_C1 / after_CH.clamp_min(1e-30)).sqrt(), 1.0)
    columns = []
    for gradient_CI in gradients:
        if gradient_CI is None:
            columns.append(np.full(layer.heads, np.nan))
            continue
        gradient = gradient_CI.float()
        along_C1 = (z_CI * gradient).sum(-1, keepdim=True)
        estimate_CH = (ratio_CH - 1) * along_C1 + ratio_CH * by_head(step_CI * gradient)
        columns.append((estimate_CH * where_C[:, None]).sum(0).double().cpu().numpy())
    return np.stack(columns, 1)


@contextmanager
def _no_gradients(loaded: LoadedModel) -> Iterator[None]:
    """Keep gradients from the parameters: only the heads' outputs need them."""
    wanted = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
