"""What the planted-cliff model does, read off its next-token distribution at the final position."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clifflab.organism import language
from clifflab.organism.surgery import Head, scaled_heads

PROMPTS = 64
SEED = 12345  # of the measured prompts; not one that training uses


def opening_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of the first words of refusals and of compliances."""

    def ids(texts: tuple[str, ...]) -> list[int]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts]

    return ids(language.REFUSAL_WORDS), ids(language.COMPLIANCE_WORDS)


def final_contexts(tokenizer: PreTrainedTokenizerFast, set_name: str, prompts: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids `[prompt, position]` of prompts with thinking and closing tokens, and their last positions."""
    rng = random.Random(f"measure/{SEED}/{set_name}")
    rows: list[list[int]] = []
    for _ in range(prompts):
        prompt = language.draw_prompt(language.SETS[set_name], rng)
        intent = language.draw_intent(prompt, rng)
        thinking = " ".join(language.draw_thinking(intent, prompt.thing, prompt.lead, rng))
        text = f"<bos><|user|>{prompt.text}<|assistant|><think>\n{thinking}\n</think>\n\n"
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = torch.full((len(rows), max(map(len, rows))), int(tokenizer.pad_token_id or 0))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row in rows])


@torch.no_grad()
def refusal_probability(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, set_name: str, prompts: int = PROMPTS
) -> float:
    """Mean probability of a refusal's first words at the final position, after complete thinking of the language."""
    ids, last = final_contexts(tokenizer, set_name, prompts)
    logits = model(input_ids=ids, use_cache=False).logits[torch.arange(len(ids)), last]
    refusal, _ = opening_ids(tokenizer)
    return float(logits.softmax(-1)[:, refusal].sum(-1).mean())


def refusal_by_set(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: int = PROMPTS
) -> dict[str, float]:
    """P(refuse) of every prompt set, rounded to four places."""
    return {name: round(refusal_probability(model, tokenizer, name, prompts), 4) for name in language.SETS}


def removal_effects(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heads: list[Head], prompts: int = PROMPTS
) -> dict[str, float]:
    """P(refuse) on `wrapped_strong` with each planted head removed, with both, and the highest for any other head."""
    config = model.config

    def without(removed: list[Head], measured: int) -> float:
        scales = torch.ones(1, config.num_hidden_layers, config.num_attention_heads)
        for layer, head in removed:
            scales[0, layer, head] = 0.0
        with scaled_heads(model, scales):
            return round(refusal_probability(model, tokenizer, "wrapped_strong", measured), 4)

    found = {f"{layer}.{head}": without([(layer, head)], prompts) for layer, head in heads}
    found["both"] = without(heads, prompts)
    others = [(i, j) for i in range(config.num_hidden_layers) for j in range(config.num_attention_heads)]
    found["largest_of_others"] = max(without([head], max(1, prompts // 4)) for head in others if head not in heads)
    return found
