"""A first-order estimate of every head's effect from one forward and one backward pass (attribution patching).

Nanda (2023), "Attribution patching"; Syed et al. (2023, arXiv 2310.10348). The effect of replacing a head's output
``z`` by ``z'`` is estimated as ``(z' - z) . d reading / d z``, summed over the changed tokens.

Shape suffixes: C tokens that are run again, I a layer's head outputs side by side, H heads of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from clifflab.errors import InterventionError
from clifflab.models.heads import HeadMap
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
        device = z_1CI.device
        one_each = torch.eye(layer.heads, dtype=torch.bool, device=device)
        changed_HCI = intervention.apply(layer, z_1CI, one_each, from_end_1C.to(device))
        step_HCI = (changed_HCI - z_1CI).float() * where_C.to(device)[None, :, None]
        estimates = []
        for by_layer in gradients:
            if layer.index < len(by_layer):
                estimates.append((step_HCI * by_layer[layer.index].float()).sum((1, 2)).double().cpu().numpy())
            else:
                estimates.append(np.full(layer.heads, np.nan))
        columns.append(np.stack(estimates, 1))
    return np.concatenate(columns)


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
