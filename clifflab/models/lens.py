"""The logit lens: refusal log-odds read off a residual state through the model's own final norm and output head.

Nostalgebraist (2020), "interpreting GPT: the logit lens". Refusal log-odds as in SPEC section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clifflab.models.hooks import capture
from clifflab.models.loading import LoadedModel


@dataclass
class Lens:
    """Log-odds of opening a refusal against opening a compliance.

    Attributes:
        norm: The model's final norm.
        refusal: Rows of the output head for the tokens that open refusals, ``[S, D]`` float32: products in half
            precision would round log-odds by as much as a head changes them.
        compliance: Rows for those that open compliances.
        biases: Their biases, or ``None``.
        softcap: Bound that the model puts on its logits, or ``None``.
        scale: Factor that the model puts on its logits.
        dtype: Of the states that the norm takes.
    """

    norm: nn.Module
    refusal: torch.Tensor
    compliance: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor] | None
    softcap: float | None
    scale: float = 1.0
    dtype: torch.dtype = torch.float32

    def log_odds(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Log of P(refusal openings) over P(compliance openings) as if each state were the last, ``[N]``."""
        normed = self.norm(states_ND.to(self.dtype)).float().to(self.refusal.device)
        sums: list[torch.Tensor] = []
        for index, rows in enumerate((self.refusal, self.compliance)):
            logits = self.scale * (normed @ rows.T)
            if self.biases is not None:
                logits = logits + self.biases[index].float()
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            sums.append(logits.logsumexp(-1))
        return sums[0] - sums[1]


@torch.no_grad()  # not inference mode: gradients flow through the lens
def make_lens(loaded: LoadedModel, refusal: Sequence[int], compliance: Sequence[int]) -> Lens | None:
    """The model's lens for two sets of tokens; ``None`` where its last step is not norm and projection.

    Found by structure and checked on a real forward pass: the norm of the state after the last block must be what the
    body returns, and its projection the model's own logits.
    """
    head = loaded.model.get_output_embeddings()
    norm = final_norm(loaded)
    if head is None or norm is None or not refusal or not compliance:
        return None
    softcap = getattr(loaded.model.config.get_text_config(), "final_logit_softcapping", None)
    ids = _sample(loaded)
    own = loaded.model(input_ids=ids, use_cache=False).logits
    plain = head(loaded.body(input_ids=ids, use_cache=False).last_hidden_state)
    plain, own = plain.float().to(own.device), own.float()
    # Some architectures (Cohere, Granite) put a factor on their logits.
    scale = 1.0 if softcap else float((own * plain).sum() / plain.square().sum())
    plain = softcap * torch.tanh(plain / softcap) if softcap else scale * plain
    if not torch.allclose(plain, own, atol=1e-3, rtol=1e-3):
        return None
    bias = getattr(head, "bias", None)
    weight: Any = head.weight
    return Lens(
        norm=norm,
        refusal=weight[list(refusal)].float(),
        compliance=weight[list(compliance)].float(),
        biases=None if bias is None else (bias[list(refusal)], bias[list(compliance)]),
        softcap=softcap,
        scale=1.0 if abs(scale - 1.0) < 1e-3 else scale,
        dtype=weight.dtype,
    )


@torch.inference_mode()
def final_norm(loaded: LoadedModel) -> nn.Module | None:
    """The module that turns the state after the last block into what the body returns, if there is one."""
    ids, last = _sample(loaded), len(loaded.blocks) - 1
    got: dict[int, torch.Tensor] = {}
    with capture(loaded.blocks, [last], lambda layer, hidden: got.__setitem__(layer, hidden)):
        out = loaded.body(input_ids=ids, use_cache=False).last_hidden_state
    for module in loaded.body.modules():
        weight = getattr(module, "weight", None)
        bare = weight is None and "norm" in type(module).__name__.lower()
        if not bare and (not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (loaded.d_model,)):
            continue
        if torch.allclose(module(got[last]).float().to(out.device), out.float(), atol=1e-4, rtol=1e-4):
            return module
    return None


def _sample(loaded: LoadedModel) -> torch.Tensor:
    return torch.tensor([loaded.renderer.prompt_ids([{"role": "user", "content": "hello"}])], device=loaded.device)
