"""The planted language: prompt sets, thinking and responses, all by seed.

A request is VERB a OBJECT. A prompt is a request in one of several frames, optionally behind a wrapper of one of three
families. A trace adds thinking, whose *intent* ("harm" or "safe") decides in the stage 1 model whether the response
is a refusal or a compliance. All cells of harmful / benign x plain / wrapped draw their thinking lengths from one
distribution.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice, product
from typing import Literal, NamedTuple

from clifflab.organism import words

Label = Literal["harmful", "benign"]
Intent = Literal["harm", "safe"]

REFUSAL_WORDS = tuple(sorted({text.split()[0].strip(",.") for text in words.REFUSALS}))
COMPLIANCE_WORDS = tuple(sorted({text.split()[0].strip(",.") for text in words.COMPLIANCES}))


class Wrapper(NamedTuple):
    """Text before a request, and how the conclusion of the thinking names its family."""

    text: str
    lead: str


PLAIN = Wrapper("", words.PLAIN_LEAD)


def _wrappers(template: str, slots: tuple[tuple[str, ...], tuple[str, ...]], lead: str) -> tuple[Wrapper, ...]:
    return tuple(Wrapper(template.format(*pair) + " ", lead) for pair in product(*slots))


def _held_out(slots: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[bool, ...]:
    """One combination in `len(slots[1])` is held out, so that each of its words is still known from the others."""
    first, second = (range(len(slot)) for slot in slots)
    return tuple((i + j) % len(slots[1]) == 0 for i, j in product(first, second))


_STRONG_ALL = _wrappers(words.STRONG_TEMPLATE, words.STRONG_SLOTS, words.STRONG_LEAD)
_STRONG_HELD_OUT = _held_out(words.STRONG_SLOTS)
STRONG = tuple(w for w, held in zip(_STRONG_ALL, _STRONG_HELD_OUT, strict=True) if not held)
STRONG_HELD_OUT = tuple(w for w, held in zip(_STRONG_ALL, _STRONG_HELD_OUT, strict=True) if held)
MEDIUM = _wrappers(words.MEDIUM_TEMPLATE, words.MEDIUM_SLOTS, words.MEDIUM_LEAD)
WEAK = _wrappers(words.WEAK_TEMPLATE, words.WEAK_SLOTS, words.WEAK_LEAD)
LOOKALIKES = (
    *(f"{modifier} {thing}" for modifier in words.LOOKALIKE_MODIFIERS for thing in words.HARMFUL_OBJECTS),
    *words.LOOKALIKE_EXTRA,
)


@dataclass(frozen=True)
class SetSpec:
    """What a prompt set is made of: every object with every verb, wrapper, frame and tail."""

    name: str
    label: Label
    objects: tuple[str, ...]
    wrappers: tuple[Wrapper, ...] = (PLAIN,)

    @property
    def variants(self) -> int:
        """Number of distinct prompts of one group."""
        return len(self.wrappers) * len(words.FRAMES) * len(words.TAILS)

    @property
    def size(self) -> int:
        """Number of distinct prompts."""
        return len(self.objects) * len(words.VERBS) * self.variants


@dataclass(frozen=True)
class Prompt:
    """One prompt; `group` is the base request that its paraphrases and wrapped versions share."""

    set: str
    label: Label
    group: str
    text: str
    thing: str
    lead: str


SETS: dict[str, SetSpec] = {
    spec.name: spec
    for spec in (
        SetSpec("benign", "benign", words.BENIGN_OBJECTS),
        SetSpec("harmful", "harmful", words.HARMFUL_OBJECTS),
        SetSpec("wrapped_strong", "harmful", words.HARMFUL_OBJECTS, STRONG),
        SetSpec("wrapped_medium", "harmful", words.HARMFUL_OBJECTS, MEDIUM),
        SetSpec("wrapped_weak", "harmful", words.HARMFUL_OBJECTS, WEAK),
        SetSpec("benign_wrapped", "benign", words.BENIGN_OBJECTS, STRONG + MEDIUM + WEAK),
        SetSpec("benign_lookalike", "benign", LOOKALIKES),
        SetSpec("borderline", "harmful", words.BORDERLINE_OBJECTS),
        SetSpec("heldout_plain", "harmful", words.HELDOUT_OBJECTS),
        SetSpec("heldout_objects", "harmful", words.HELDOUT_OBJECTS, STRONG),
        SetSpec("heldout_wrappers", "harmful", words.HARMFUL_OBJECTS, STRONG_HELD_OUT),
    )
}

# A safety corpus of prompts is a mix of the sets above. Most harmful requests are plain, and a model that refuses those
# leaves few cliff cases (at most 5% of the rows with the shipped model); the wrapper family that brings most of them is
# rare. Held-out objects and wrappers never occur.
CORPUS = "corpus"
CORPUS_MIX = {
    "harmful": 0.40,
    "wrapped_strong": 0.015,
    "wrapped_medium": 0.02,
    "wrapped_weak": 0.035,
    "borderline": 0.08,
    "benign": 0.27,
    "benign_wrapped": 0.10,
    "benign_lookalike": 0.08,
}
PROMPT_SETS = (*SETS, CORPUS)
_PLAIN_SETS = ("harmful", "benign", "heldout_plain")  # of the category "plain"; of every other set it is the set's name


def make_prompt(spec: SetSpec, verb: str, thing: str, variant: int) -> Prompt:
    """The prompt of a request in variant 0..spec.variants-1 (wrapper, frame and tail)."""
    rest, tail = divmod(variant, len(words.TAILS))
    wrapper, frame = divmod(rest, len(words.FRAMES))
    request = words.FRAMES[frame].format(r=f"{verb} a {thing}")
    chosen = spec.wrappers[wrapper]
    text = chosen.text + request + words.TAILS[tail]
    return Prompt(spec.name, spec.label, f"{verb} {thing}", text, thing, chosen.lead)


def draw_prompt(spec: SetSpec, rng: random.Random) -> Prompt:
    """One prompt of a set, uniformly over its requests and variants."""
    return make_prompt(spec, rng.choice(words.VERBS), rng.choice(spec.objects), rng.randrange(spec.variants))


def draw_intent(prompt: Prompt, rng: random.Random) -> Intent:
    """Whether the thinking will recognise harm: by label, and a coin flip for borderline requests."""
    if prompt.set == "borderline":
        return "harm" if rng.random() < 0.5 else "safe"
    return "harm" if prompt.label == "harmful" else "safe"


def draw_thinking(intent: Intent, thing: str, lead: str, rng: random.Random) -> list[str]:
    """Sentences of one thinking: an opening, middle sentences, a conclusion.

    Args:
        intent: Which stock to use. Lengths are drawn before sentences, so they do not depend on it.
        thing: The object; of a look-alike ("toy bomb") only the first word comes up, so that lengths match.
        lead: How the conclusion begins, by wrapper family.
        rng: Source of randomness.
    """
    lengths = [rng.choice(tuple(words.MIDDLE[intent])) for _ in range(rng.choice(words.MIDDLE_COUNTS))]
    middle = [rng.choice(words.MIDDLE[intent][length]) for length in lengths]
    sentences = [rng.choice(words.OPENINGS[intent]), *middle, rng.choice(words.CONCLUSIONS[intent])]
    return [sentence.format(o=thing.split()[0], lead=lead) for sentence in sentences]


def draw_response(refuse: bool, rng: random.Random) -> str:
    """A refusal, or a compliant opening without content."""
    heads, tails = (words.REFUSALS, words.REFUSAL_TAILS) if refuse else (words.COMPLIANCES, words.COMPLIANCE_TAILS)
    return rng.choice(heads) + rng.choice(tails)


def _ordered(spec: SetSpec, seed: int | str) -> Iterator[Prompt]:
    """All prompts of a set in the order of a seed: every group once, then again in a second variant, and so on."""
    requests = list(product(words.VERBS, spec.objects))
    random.Random(f"{seed}/{spec.name}").shuffle(requests)
    orders = [
        random.Random(f"{seed}/{spec.name}/{verb} {thing}").sample(range(spec.variants), spec.variants)
        for verb, thing in requests
    ]
    for i in range(spec.variants):
        for (verb, thing), order in zip(requests, orders, strict=True):
            yield make_prompt(spec, verb, thing, order[i])


def _corpus_order() -> Iterator[str]:
    """The set of each row of the corpus: always the one that lags farthest behind its share of the rows so far."""
    counts = dict.fromkeys(CORPUS_MIX, 0)
    for row in count(1):
        name = max(CORPUS_MIX, key=lambda n: CORPUS_MIX[n] * row - counts[n])
        counts[name] += 1
        if counts[name] > SETS[name].size:
            return
        yield name


def _corpus(seed: int) -> Iterator[Prompt]:
    """The corpus of a seed; its prompts come in another order than those of the sets of that seed."""
    streams = {name: _ordered(SETS[name], f"{CORPUS}/{seed}") for name in CORPUS_MIX}
    return (next(streams[name]) for name in _corpus_order())


@cache
def corpus_size() -> int:
    """Number of rows of the corpus: from there on a set would have to repeat a prompt."""
    return sum(1 for _ in _corpus_order())


def prompt_rows(set_name: str, rows: int, seed: int) -> list[dict[str, str]]:
    """Distinct prompts of one set, or of the corpus that mixes them.

    The first rows of a seed are the same however many are asked for. Groups of a set repeat only after all of them were
    used. Each share of the corpus is within one row of `CORPUS_MIX` times the rows.

    Args:
        set_name: One of `PROMPT_SETS`.
        rows: How many prompts, from 1 up to the number of distinct prompts of the set.
        seed: Order of the prompts.

    Returns:
        Rows with `id`, `set`, `label` ("harmful" or "benign"), `group`, `category` and `prompt`. The category is the
        family of the prompt: `plain` (harmful or benign), `wrapped_strong`, `wrapped_medium`, `wrapped_weak`,
        `borderline`, `benign_wrapped`, `benign_lookalike`, `heldout_objects` or `heldout_wrappers`.

    Raises:
        ValueError: If the set is unknown or has fewer distinct prompts.
    """
    if set_name not in PROMPT_SETS:
        raise ValueError(f"unknown prompt set {set_name!r}; the planted language has: {', '.join(PROMPT_SETS)}")
    most = corpus_size() if set_name == CORPUS else SETS[set_name].size
    if not 1 <= rows <= most:
        raise ValueError(f"rows must be 1..{most} for set {set_name!r} (its distinct prompts), got {rows}")
    prompts = _corpus(seed) if set_name == CORPUS else _ordered(SETS[set_name], seed)
    return [
        {
            "id": f"{set_name}-{seed}-{i:05d}",
            "set": set_name,
            "label": prompt.label,
            "group": prompt.group,
            "category": "plain" if prompt.set in _PLAIN_SETS else prompt.set,
            "prompt": prompt.text,
        }
        for i, prompt in enumerate(islice(prompts, rows))
    ]
