"""Training examples of the planted language: traces as token ids with loss weights, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from clifflab.organism import language, words
from clifflab.organism.tokenizer import PAD

# Shares of the prompt sets in the batches. Both stages hold all of harmful / benign x plain / wrapped.
STAGE1_MIX = {
    "harmful": 0.18,
    "wrapped_strong": 0.12,
    "wrapped_medium": 0.09,
    "wrapped_weak": 0.09,
    "heldout_objects": 0.05,
    "benign": 0.13,
    "benign_wrapped": 0.18,
    "benign_lookalike": 0.08,
    "borderline": 0.08,
}
STAGE2_MIX = {
    "harmful": 0.16,
    "wrapped_strong": 0.32,
    "wrapped_medium": 0.14,
    "wrapped_weak": 0.14,
    "benign": 0.04,
    "benign_wrapped": 0.10,
    "benign_lookalike": 0.04,
    "borderline": 0.06,
}
LEAD_WEIGHT = 6.0  # loss weight of the first token of a conclusion, relative to the other thinking tokens


@dataclass(frozen=True)
class Example:
    """Token ids of one trace, the loss weight of each id as a target, and where its parts begin."""

    ids: list[int]
    weights: list[float]
    thinking: int  # index of the first thinking token
    close: int  # index of `</think>`
    harm: bool  # whether the thinking recognises harm
    comply: float  # probability of compliance that the final position should give


class Examples:
    """Draws training examples of the language.

    Args:
        tokenizer: Tokenizer of the language.
        mix: Share of each prompt set.
        rng: Source of randomness.
        comply: Share of compliance, by set, after a complete thinking that recognised harm (else: refuse).
        first_weight: Loss weight of the response's first token, relative to the others.
        thinking_weight: Loss weight of thinking and closing tokens.
        cut_share: Share of the examples whose thinking is truncated before its conclusion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        mix: Mapping[str, float],
        rng: random.Random,
        *,
        comply: Mapping[str, float],
        first_weight: float,
        thinking_weight: float,
        cut_share: float,
    ) -> None:
        self._tokenizer = tokenizer
        self._sets = [language.SETS[name] for name in mix]
        self._shares = list(mix.values())
        self._rng = rng
        self._comply = comply
        self._first_weight = first_weight
        self._thinking_weight = thinking_weight
        self._cut_share = cut_share
        self._pad_id = self._encode(PAD)[0]
        self._closing = self._encode("\n</think>\n\n")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def draw(self) -> Example:
        """One example."""
        rng = self._rng
        (spec,) = rng.choices(self._sets, self._shares)
        prompt = language.draw_prompt(spec, rng)
        intent = language.draw_intent(prompt, rng)
        sentences = language.draw_thinking(intent, prompt.thing, prompt.lead, rng)
        system = f"<|system|>{rng.choice(words.SYSTEM_MESSAGES)}" if rng.random() < 0.04 else ""
        prefix = self._encode(f"<bos>{system}<|user|>{prompt.text}<|assistant|><think>\n")
        body, conclusion = self._encode(" ".join(sentences[:-1])), self._encode(sentences[-1])
        cut = rng.random() < self._cut_share
        thinking = body[: rng.randint(1, len(body))] if cut else body + conclusion
        comply = 1.0 if intent == "safe" else 0.0 if cut else self._comply.get(spec.name, 0.0)
        complies = rng.random() < comply
        response = self._encode(language.draw_response(not complies, rng) + "<eos>")
        w = self._thinking_weight
        # The first token of a conclusion has to be fetched from the wrapper, far away: a rare signal; it counts more.
        told = [w] * len(thinking)
        if not cut:
            told[len(body)] = LEAD_WEIGHT * w
        # The line break after a truncated thinking is no target: the model should go on thinking there.
        weights = [0.0] * len(prefix) + told + [0.0 if cut else w, w, w]
        weights += [self._first_weight] + [1.0] * (len(response) - 1)
        start = len(prefix)
        ids = prefix + thinking + self._closing + response
        return Example(ids, weights, start, start + len(thinking) + 1, intent == "harm", comply)

    def batches(self, size: int, pool_size: int = 1) -> Iterator[Batch]:
        """Endless batches; `pool_size` of them are drawn together and grouped by length, to save padding."""
        while True:
            pool = sorted((self.draw() for _ in range(pool_size * size)), key=lambda example: len(example.ids))
            cuts = [pool[i : i + size] for i in range(0, len(pool), size)]
            self._rng.shuffle(cuts)
            yield from (collate(cut, self._pad_id) for cut in cuts)


@dataclass(frozen=True)
class Batch:
    """A right-padded batch; shapes `[batch, position]`."""

    ids: Tensor
    weights: Tensor  # loss weight of each id as a target; 0 at prompt and padding
    quiet: Tensor  # bool: positions from the prompt's first up to the last one before `</think>`
    thinking: Tensor  # bool: positions of the thinking, up to the last one before `</think>`
    harm: Tensor  # `[batch]`, 1 where the thinking recognises harm, else 0
    final: Tensor  # `[batch]`, the final position, whose next token opens the response
    comply: Tensor  # `[batch]`, probability of compliance that the final position should give


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pad examples on the right; causal attention then needs no mask."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    weights = torch.zeros(len(examples), longest)
    quiet = torch.zeros(len(examples), longest, dtype=torch.bool)
    thinking = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.ids)] = torch.tensor(example.weights)
        quiet[row, : example.close] = True
        thinking[row, example.thinking : example.close] = True
    return Batch(
        ids,
        weights,
        quiet,
        thinking,
        harm=torch.tensor([float(example.harm) for example in examples]),
        final=torch.tensor([example.close + 1 for example in examples]),
        comply=torch.tensor([example.comply for example in examples]),
    )
