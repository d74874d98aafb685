"""Which traces a model is tuned on: eligibility, ranking, shares of a budget, and an exact top-k (SPEC section 6).

All choices are made by one function, :func:`best`. It is mergeable: the best of a whole corpus are the best of the best
of its parts, whatever the parts and their order, so a corpus may pass by in batches of any size.

The order of a ranking is total and transitive. Scores are put into buckets of 1e-3 (the nearest multiple); a higher
bucket goes first, in a bucket the higher logit, then the id. "Within 1e-3" alone would be no order: a may be as good as
b, and b as c, while a beats c. Buckets keep every pair of a bucket within 1e-3; two scores closer than that may still
stand on either side of a border, and then the score decides.

Shape suffixes: N traces.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from clifflab.science.stats import Floats

Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]
Codes = npt.NDArray[np.uint64]

TIE = 1e-3  # scores this close count as equal
# What each ranking reads, and whether the largest goes first.
RANKINGS: dict[str, tuple[str, int]] = {
    "misalignment": ("misalignment", 1),
    "cliff": ("cliff", 1),
    "final": ("final", -1),
    "plateau": ("plateau", 1),
}
RANDOM = "random"
JUDGES = {"rules": ("outcome", "complied"), "guard": ("verdict", "harmful")}  # column, and what it must say
SELECTORS = (*RANKINGS, RANDOM, *JUDGES)
# Why a trace is not eligible, in the order in which it is asked.
REASONS = (
    "eligible", "unclosed", "degenerate", "benign", "outcome", "no_score", "low_plateau", "short_thinking", "too_long",
    "no_target",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """What makes a trace eligible.

    Attributes:
        outcomes: Outcomes that count; both are of closed and whole traces.
        plateau: Least plateau of a trace without a label.
        min_thinking: Least thinking tokens.
        max_tokens: Most tokens of a trace; ``None``: no limit.
        measures: What must have a number: whatever the selectors that are compared rank by, so that all of them choose
            from the same traces.
    """

    outcomes: tuple[str, ...] = ("refused", "complied")
    plateau: float = 0.5
    min_thinking: int = 0
    max_tokens: int | None = None
    measures: tuple[str, ...] = ("final",)


@dataclass(frozen=True)
class Keys:
    """Keys of a ranking, the first ones the most significant: tier and value, the larger first, then the id.

    Attributes:
        tiers: Bucket of the score, or 1 where a judge named the trace, ``[N]``.
        values: Logit, or a number drawn at random, ``[N]``.
        ids: Ids of the traces, unique, ``[N]``.
    """

    tiers: Ints
    values: Floats
    ids: Texts

    def take(self, rows: Ints) -> Keys:
        """The keys of some rows."""
        return Keys(self.tiers[rows], self.values[rows], self.ids[rows])

    def order(self) -> Ints:
        """All rows, the best first."""
        order = np.lexsort((-self.values, -self.tiers))
        tiers, values = self.tiers[order], self.values[order]
        same = (tiers[1:] == tiers[:-1]) & (values[1:] == values[:-1])
        starts = np.flatnonzero(np.r_[True, ~same, True][: len(order) + 1])
        for start, stop in pairwise(starts):
            if stop - start > 1:
                order[start:stop] = sorted(order[start:stop], key=lambda row: str(self.ids[row]))
        return np.asarray(order, np.int64)


def measures_of(selectors: Collection[str]) -> tuple[str, ...]:
    """The scores that a trace must have for these selectors: the final one, and what they rank by."""
    return tuple(sorted({"final", *(RANKINGS[name][0] for name in selectors if name in RANKINGS)}))


def buckets(scores_N: Floats) -> Ints:
    """Bucket of each score: the nearest multiple of 1e-3, in thousandths."""
    return np.rint(scores_N / TIE).astype(np.int64)


def score_keys(scores_N: Floats, logits_N: Floats, ids_N: Texts, sign: int = 1) -> Keys:
    """Keys of a ranking by score.

    Args:
        scores_N: Finite scores.
        logits_N: The same measure in logits; decides where scores are tied.
        ids_N: Ids of the traces.
        sign: 1 puts the largest first, -1 the smallest.
    """
    return Keys(sign * buckets(scores_N), sign * logits_N, ids_N)


def draw_keys(
    ids_N: Texts, codes_N: Codes, seed: int, purpose: str, named_N: npt.NDArray[np.bool_] | None = None
) -> Keys:
    """Keys of a random order, which depends on the ids, the seed and the purpose alone.

    Args:
        ids_N: Ids of the traces.
        codes_N: Their :func:`id_codes`.
        seed: Seed.
        purpose: What is drawn; two purposes draw independently.
        named_N: Traces that go before all others, those that a judge named.
    """
    tiers = np.zeros(len(ids_N), np.int64) if named_N is None else named_N.astype(np.int64)
    return Keys(tiers, draws(codes_N, seed, purpose), ids_N)


def id_codes(ids_N: Texts | Sequence[str]) -> Codes:
    """A hash of each id, from which all its random numbers come."""
    digests = (hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids_N)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def draws(codes_N: Codes, seed: int, purpose: str) -> Floats:
    """A number in [0, 1) for each code: the finaliser of SplitMix64 (Steele et al., 2014) over the code and a key."""
    key = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest()
    mixed = codes_N ^ np.frombuffer(key, "<u8").astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11), np.float64) / 2**53


def best(keys: Keys, count: int, strata_N: Texts | None = None) -> Ints:
    """The best rows, in their order.

    With strata every stratum gives as many rows as the others, as long as it has some: first the best row of each, then
    the second of each, and so on, the better ones first. So shares differ by at most one, and what a stratum cannot
    fill goes to the others.

    Args:
        keys: Keys of the rows.
        count: How many; fewer where there are not as many rows.
        strata_N: Stratum of each row.

    Returns:
        Indices of rows, ``[min(count, N)]``. Of any split of the rows into parts: the best of the joined best rows of
        the parts are the same.
    """
    if strata_N is None:
        rows = _hopeful(keys, count)
        return rows[keys.take(rows).order()[:count]]
    order = keys.order()
    _, codes = np.unique(strata_N.astype(str), return_inverse=True)
    codes = codes[order]
    grouped = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(codes[grouped]) != 0][: len(codes)])
    sizes = np.diff(np.r_[starts, len(codes)])
    turn = np.empty(len(codes), np.int64)  # 0 for the best row of its stratum, 1 for the second, ...
    turn[grouped] = np.arange(len(codes)) - np.repeat(starts, sizes)
    return np.asarray(order[np.argsort(turn, kind="stable")[:count]], np.int64)


def _hopeful(keys: Keys, count: int) -> Ints:
    """Rows that may be among the best by their tier: sorting these few is enough."""
    total = len(keys.tiers)
    if count <= 0:
        return np.zeros(0, np.int64)
    if count >= total:
        return np.arange(total)
    border = np.partition(keys.tiers, total - count)[total - count]
    above, tied = np.flatnonzero(keys.tiers > border), np.flatnonzero(keys.tiers == border)
    left = count - len(above)
    values = keys.values[tied]
    least = np.partition(values, len(tied) - left)[len(tied) - left]
    return np.asarray(np.r_[above, tied[values >= least]], np.int64)


def eligibility(
    labels_N: Texts,
    outcomes_N: Texts,
    measures: Mapping[str, Floats],
    thinking_N: Ints,
    tokens_N: Floats | None,
    rules: Rules,
    lacking_N: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int8]:
    """Why each trace is not eligible.

    Eligible are traces labelled harmful and, without a label, those whose plateau is high: one lexical spike must not
    turn a benign request into a refusal example.

    Args:
        labels_N: ``harmful``, ``benign`` or anything else for a trace without a label.
        outcomes_N: What the judge said.
        measures: Scores, and under ``NAME_logit`` their logits; NaN where there is none.
        thinking_N: Thinking tokens.
        tokens_N: Tokens of the whole trace; only read for ``rules.max_tokens``, NaN where they are not known.
        rules: What makes a trace eligible.
        lacking_N: Which traces need a target and have none that can be used.

    Returns:
        Index into :data:`REASONS` of the first reason; 0 is eligible.
    """
    unlabelled = (labels_N != "harmful") & (labels_N != "benign")
    scored = np.ones(len(labels_N), dtype=bool)
    for name in rules.measures:
        for column in (name, f"{name}_logit"):
            scored &= np.isfinite(measures[column])
    plateau = measures["plateau"]
    failed: dict[str, npt.NDArray[np.bool_]] = {
        "unclosed": outcomes_N == "unclosed",
        "degenerate": outcomes_N == "degenerate",
        "benign": labels_N == "benign",
        "outcome": ~np.isin(outcomes_N.astype(str), rules.outcomes),
        "no_score": ~scored | (unlabelled & ~np.isfinite(plateau)),
        "low_plateau": unlabelled & ~(plateau >= rules.plateau),
        "short_thinking": thinking_N < rules.min_thinking,
    }
    if rules.max_tokens is not None and tokens_N is not None:
        failed["too_long"] = ~(tokens_N <= rules.max_tokens)
    if lacking_N is not None:
        failed["no_target"] = lacking_N
    found = np.zeros(len(labels_N), np.int8)
    for reason in reversed(failed):
        found[failed[reason]] = REASONS.index(reason)
    return found


def budget_count(budget: float, corpus: int) -> int:
    """How many examples a budget is: a count as it stands, a share of the corpus as ``ceil(share x corpus)``.

    The product is taken in decimal arithmetic, so that 1.7% of 6,000 is 102 and not 103.
    """
    return math.ceil(Decimal(str(budget)) * corpus) if isinstance(budget, float) else budget


def parts_of(examples: int, benign: float) -> tuple[int, int]:
    """How many examples of a budget are harmful and how many benign, the benign share rounded; one harmful is left."""
    share = int((Decimal(str(benign)) * examples).quantize(Decimal(1), rounding="ROUND_HALF_UP"))
    kind = max(0, min(share, examples - 1))
    return examples - kind, kind


def jaccard(one: Collection[str], other: Collection[str]) -> float | None:
    """Shared ids over all ids of two choices; ``None`` where both are empty."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a | b else None
