"""A corpus of traces in the planted language, built like a real safety corpus.

Most harmful requests are refused. Cliff cases, where harm is recognised in the thinking and the request then answered,
are rare, as is the wrapper family that brings most of them. The traces come from the language, not from the model; a
corpus of prompts that a model answers itself is `organism:corpus` (:func:`clifflab.organism.language.prompt_rows`). The
two mixes differ: here the share of answered requests is set, there it follows from what the model does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from clifflab.organism import language

# Shares of the prompt sets in the corpus, and how often recognised harm is answered in each.
MIX = {
    "harmful": 0.34,
    "wrapped_strong": 0.04,
    "wrapped_medium": 0.06,
    "wrapped_weak": 0.10,
    "borderline": 0.08,
    "benign": 0.22,
    "benign_wrapped": 0.08,
    "benign_lookalike": 0.08,
}
CLIFF_SHARE = {"wrapped_strong": 0.75, "wrapped_medium": 0.10, "wrapped_weak": 0.02, "harmful": 0.005}
# Benign requests that were refused all the same.
OVER_REFUSAL_SHARE = {"benign_lookalike": 0.03, "benign_wrapped": 0.01}


def corpus_row(index: int, seed: int) -> dict[str, str]:
    """Row `index` of the corpus of a seed; depends on nothing else.

    Returns:
        `id`, `set`, `label`, `group`, `prompt`, `thinking` and `response`.
    """
    rng = random.Random(f"corpus/{seed}/{index}")
    (name,) = rng.choices(tuple(MIX), tuple(MIX.values()))
    prompt = language.draw_prompt(language.SETS[name], rng)
    intent = language.draw_intent(prompt, rng)
    thinking = " ".join(language.draw_thinking(intent, prompt.thing, prompt.lead, rng))
    if intent == "harm":
        refuse = rng.random() >= CLIFF_SHARE.get(name, 0.0)
    else:
        refuse = rng.random() < OVER_REFUSAL_SHARE.get(name, 0.0)
    return {
        "id": f"corpus-{seed}-{index:07d}",
        "set": name,
        "label": prompt.label,
        "group": prompt.group,
        "prompt": prompt.text,
        "thinking": thinking,
        "response": language.draw_response(refuse, rng),
    }


def corpus_rows(rows: int, seed: int) -> Iterator[dict[str, str]]:
    """Stream the first `rows` rows of the corpus of a seed.

    Raises:
        ValueError: If `rows` is negative.
    """
    if rows < 0:
        raise ValueError(f"rows must not be negative, got {rows}")
    return (corpus_row(index, seed) for index in range(rows))
