"""How probable a model finds given text, with or without heads (benign perplexity, SPEC sections 4 and 5).

Shape suffixes: B traces, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from clifflab.models.forward import not_finite, position_ids, split_on_oom
from clifflab.models.heads import Head, HeadMap
from clifflab.models.intervene import Intervention, intervene
from clifflab.models.loading import LoadedModel

_LOGITS = 1 << 28  # numbers in one batch's logits


@dataclass(frozen=True)
class Reading:
    """A text to be read, and by what.

    Attributes:
        ids: Token ids.
        start: First token whose probability counts; at least 1.
        heads: Heads that are changed while it is read.
    """

    ids: tuple[int, ...]
    start: int
    heads: tuple[Head, ...] = ()


def total_nll(
    loaded: LoadedModel, heads: HeadMap | None, readings: Sequence[Reading], intervention: Intervention | None = None
) -> list[float]:
    """Sum of the negative log-probabilities of each text's tokens from ``start`` on, in nats.

    Args:
        loaded: The model.
        heads: Its heads; ``None`` where no reading changes any.
        readings: The texts.
        intervention: What is done to the heads that a reading names; they are removed by default.

    Raises:
        InputError: The model yields logits that are not finite.
    """
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    longest = max(len(reading.ids) for reading in readings)
    size = max(1, _LOGITS // (vocabulary * longest))
    sums: list[float] = []
    for first in range(0, len(readings), size):
        part = readings[first : first + size]
        sums += split_on_oom(lambda some: _read(loaded, heads, some, intervention), part)
    return sums


@torch.inference_mode()
def _read(
    loaded: LoadedModel, heads: HeadMap | None, readings: Sequence[Reading], intervention: Intervention | None
) -> list[float]:
    width = max(len(reading.ids) for reading in readings)
    kept = max(len(reading.ids) - reading.start for reading in readings)
    tokens_BT = torch.full((len(readings), width), loaded.pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for b, reading in enumerate(readings):  # padded on the left, so that the last logits are those of all texts' ends
        tokens_BT[b, width - len(reading.ids) :] = torch.tensor(reading.ids)
        mask_BT[b, width - len(reading.ids) :] = 1
    sets = [reading.heads for reading in readings]
    change: Any = nullcontext()
    if any(sets):
        assert heads is not None  # who names heads has them
        change = intervene(heads, sets, intervention or Intervention())
    with change:
        output = loaded.model(
            input_ids=tokens_BT.to(loaded.device),
            attention_mask=mask_BT.to(loaded.device),
            position_ids=position_ids(mask_BT).to(loaded.device),
            use_cache=False,
            logits_to_keep=kept + 1,
        )
    sums = []
    for b, reading in enumerate(readings):
        count = len(reading.ids) - reading.start
        logits_TV = output.logits[b, -count - 1 : -1].float()
        targets_T = tokens_BT[b, width - count :].to(logits_TV.device)
        if not torch.isfinite(logits_TV.amax(-1)).all():
            raise not_finite(loaded, "next-token logits")
        sums.append(float(cross_entropy(logits_TV, targets_T, reduction="none").double().sum()))
    return sums
