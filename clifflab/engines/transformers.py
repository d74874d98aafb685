"""Batched sampling with transformers: left padding, KV cache, a random stream of its own for every row.

Shape suffixes: B rows still in the batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from clifflab.config import TracesConfig
from clifflab.engines.base import Completion, Request
from clifflab.models.forward import not_finite, position_ids, split_on_oom
from clifflab.models.heads import HeadMap
from clifflab.models.intervene import ChosenRows, Intervention, intervene
from clifflab.models.loading import LoadedModel
from clifflab.pulse import beat


class TransformersEngine:
    """The plain engine: any causal language model that transformers loads.

    Args:
        loaded: The model.
        heads: Its heads, where requests name some to change.
        intervention: What is done to those, at every token of the prompt and of what is written.
    """

    def __init__(
        self, loaded: LoadedModel, heads: HeadMap | None = None, intervention: Intervention | None = None
    ) -> None:
        self.loaded, self.heads, self.intervention = loaded, heads, intervention or Intervention()

    def generate(self, requests: Sequence[Request], sampling: TracesConfig) -> list[Completion]:
        """Complete every request as one batch; a batch too large for the GPU's memory is halved.

        The random numbers of a row are a counter-based stream of its seed, one uniform number a token, turned into a
        token by the inverse of the float64 distribution function: batch mates do not enter.
        """
        return split_on_oom(lambda part: self._batch(part, sampling), requests)

    def _batch(self, requests: Sequence[Request], sampling: TracesConfig) -> list[Completion]:
        sets = [request.heads for request in requests]
        if not any(sets):
            return self._write(requests, sampling, None)
        assert self.heads is not None
        with intervene(self.heads, sets, self.intervention) as chosen:
            return self._write(requests, sampling, chosen)

    @torch.inference_mode()
    def _write(
        self, requests: Sequence[Request], sampling: TracesConfig, chosen: ChosenRows | None
    ) -> list[Completion]:
        loaded, device = self.loaded, self.loaded.device
        uniforms = [uniform_numbers(request) for request in requests]
        width = max(len(r.prompt_ids) for r in requests)
        tokens_BT = torch.full((len(requests), width), loaded.pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(requests), width), dtype=torch.long)
        for b, request in enumerate(requests):
            start = width - len(request.prompt_ids)
            tokens_BT[b, start:] = torch.tensor(request.prompt_ids)
            mask_BT[b, start:] = 1
        tokens_BT, mask_BT = tokens_BT.to(device), mask_BT.to(device)
        positions_BT = position_ids(mask_BT)
        cache = DynamicCache(config=loaded.model.config)
        written: list[list[int]] = [[] for _ in requests]
        reasons = ["length"] * len(requests)
        rows = list(range(len(requests)))  # request of each row that is still in the batch
        live = set(rows)
        for step in range(max(r.limit for r in requests)):
            output = loaded.model(
                input_ids=tokens_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            beat()
            logits_BV = output.logits[:, -1]
            if not torch.isfinite(logits_BV.amax(-1)).all():
                raise not_finite(loaded, "next-token logits")
            # Rows that are done stay in the batch for a while; what is drawn for them is thrown away.
            uniform = [uniforms[row][step] if row in live else 0.0 for row in rows]
            uniform_B = torch.tensor(uniform, dtype=torch.float64, device=device)
            chosen_B = sample(logits_BV, uniform_B, sampling.temperature, sampling.top_p)
            for row, token in zip(rows, chosen_B.tolist(), strict=True):
                if row not in live:
                    continue
                if token in loaded.stop_ids:
                    reasons[row] = "stop"
                    live.discard(row)
                    continue
                written[row].append(token)
                if len(written[row]) == requests[row].limit:
                    live.discard(row)
            if not live:
                break
            tokens_BT = chosen_B[:, None]
            positions_BT = positions_BT[:, -1:] + 1
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(rows), 1))], dim=1)
            if 2 * len(live) <= len(rows):  # finished rows leave the batch when half of it is done
                keep = [b for b, row in enumerate(rows) if row in live]
                index = torch.tensor(keep)  # on the CPU, since the cache's layers may lie on several GPUs
                cache.batch_select_indices(index)
                tokens_BT, positions_BT, mask_BT = tokens_BT[index], positions_BT[index], mask_BT[index]
                rows = [rows[b] for b in keep]
                if chosen is not None:
                    chosen.keep(keep)
        return [
            Completion(tuple(ids), "stop" if r == "stop" else "length") for ids, r in zip(written, reasons, strict=True)
        ]


def uniform_numbers(request: Request) -> npt.NDArray[np.float64]:
    """The numbers in [0, 1) that a request's tokens are drawn by, one a token."""
    stream = np.random.Generator(np.random.Philox(key=request.seed))
    return stream.random(request.drawn + request.limit)[request.drawn :]


def sample(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Choose a token for every row.

    Args:
        logits_BV: Next-token logits.
        uniform_B: One number in [0, 1) a row, float64.
        temperature: 0 takes the most probable token.
        top_p: Keep the smallest set of most probable tokens that holds this much probability.

    Returns:
        Token ids, ``[B]``.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    if top_p < 1.0:
        probabilities_BV = nucleus(probabilities_BV, top_p)
    cumulative_BV = probabilities_BV.cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    # The first token whose cumulative probability exceeds the target: never one of probability zero.
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1).clamp_max(logits_BV.shape[-1] - 1)


def nucleus(probabilities_BV: torch.Tensor, top_p: float, width: int = 256) -> torch.Tensor:
    """Probabilities with everything outside the smallest set that holds ``top_p`` at zero; not normalised again.

    Of tokens with equal probability those with smaller ids come first. Only the ``width`` largest are sorted, which is
    exact where the set ends before them, with no tie across that border; otherwise the whole row is sorted.
    """
    width = min(width, probabilities_BV.shape[-1])
    ids_BK = probabilities_BV.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    largest_BK = probabilities_BV.gather(-1, ids_BK)
    kept_BK, order_BK = _kept(largest_BK, top_p)
    out_BV = torch.zeros_like(probabilities_BV).scatter(-1, ids_BK.gather(-1, order_BK), kept_BK)
    # Row by row, so that a row's tokens never depend on its batch mates.
    unsure_B = ((kept_BK > 0) & (kept_BK <= largest_BK.amin(-1, keepdim=True))).any(-1)
    if unsure_B.any():
        kept_BV, order_BV = _kept(probabilities_BV[unsure_B], top_p)
        out_BV[unsure_B] = torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV)
    return out_BV


def _kept(probabilities_BV: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities from the largest down, zero from where those before hold ``top_p``; and their places."""
    ranked_BV, order_BV = torch.sort(probabilities_BV, dim=-1, descending=True, stable=True)
    before_BV = ranked_BV.cumsum(-1) - ranked_BV
    return ranked_BV.masked_fill(before_BV >= top_p, 0.0), order_BV
