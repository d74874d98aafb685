"""Which heads an ablation removes, on which prompts, and what that changes (SPEC section 4, ablated model).

Shape suffixes: N traces, K columns (a condition with one treatment of the thinking), B bootstrap resamples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clifflab.science.effects import random_sets, top_count
from clifflab.science.stats import DIFFERENCE, Floats, GroupBootstrap, percentile_interval

Head = tuple[int, int]
Kind = Literal["none", "suppression", "promoting", "random"]
_ENDS = ("low", "high")
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Condition:
    """One way to change the model.

    Attributes:
        fraction: Share of all heads.
        kind: Which heads: none, the top suppression or promoting ones, or random ones.
        draw: Number of the draw of random heads.
    """

    fraction: float
    kind: Kind
    draw: int | None = None


def conditions(fractions: Sequence[float], kinds: Sequence[Kind], draws: int, total: int) -> list[Condition]:
    """All conditions, the unchanged model first.

    Random heads are left out where fewer heads remain beside the suppression heads than have to be drawn.
    """
    found = [Condition(0.0, "none")]
    for fraction in fractions:
        if fraction > 0:
            for kind in kinds:
                if kind != "random":
                    found.append(Condition(fraction, kind))
                elif 2 * top_count(fraction, total) <= total:
                    found += [Condition(fraction, kind, draw) for draw in range(draws)]
    return found


def removed_heads(
    found: Sequence[Condition],
    suppression: Sequence[Head],
    promoting: Sequence[Head],
    heads_per_layer: Sequence[int],
    seed: int,
) -> list[tuple[Head, ...]]:
    """The heads that each condition removes, in the order of the model.

    Args:
        found: The conditions.
        suppression: Heads from the one whose removal raises refusal most.
        promoting: Heads from the one whose removal lowers it most.
        heads_per_layer: Heads of each layer.
        seed: Seed of the study.
    """
    draws = max((condition.draw + 1 for condition in found if condition.draw is not None), default=0)
    sets: list[tuple[Head, ...]] = []
    random: dict[int, list[list[Head]]] = {}
    for condition in found:
        count = top_count(condition.fraction, sum(heads_per_layer))
        if condition.draw is not None:
            if count not in random:
                random[count] = random_sets(suppression[:count], heads_per_layer, draws, seed)
            sets.append(tuple(random[count][condition.draw]))
        else:
            ranked = {"none": [], "promoting": promoting}.get(condition.kind, suppression)
            sets.append(tuple(sorted(ranked[:count])))
    return sets


def ranked_by_hash(seed: int, purpose: str, names: Sequence[str]) -> list[int]:
    """Indices of names in a seeded order that depends on each name alone."""
    order = [hashlib.sha256(f"{purpose}:{seed}:{name}".encode()).hexdigest() for name in names]
    return sorted(range(len(names)), key=lambda i: (order[i], names[i]))


def turn(items: Sequence[int], share: int, draw: int) -> list[int]:
    """The draw's own part of the items: draws take turns, so that all items serve equally often.

    Args:
        items: All of them.
        share: How many one draw gets.
        draw: Number of the draw.
    """
    size = min(share, len(items))
    return [items[(draw * size + i) % len(items)] for i in range(size)]


@dataclass
class Outcomes:
    """Outcomes of one set's traces under every column; column 0 of each treatment of thinking is the unchanged model.

    Attributes:
        present: Which traces a column has, ``[N, K]``.
        hits: Of each measure (``asr``, ``over_refusal``, ``unclosed``, ``degenerate``) which traces count, ``[N, K]``.
        among: Of each measure, the traces that it is a share of, ``[N, K]``.
        unchanged: Of each column the column of the unchanged model with the same treatment of thinking, ``[K]``.
        bootstrap: Resamples of the traces' clusters.
    """

    present: Bools
    hits: Mapping[str, Bools]
    among: Mapping[str, Bools]
    unchanged: npt.NDArray[np.intp]
    bootstrap: GroupBootstrap

    def rates(self, measure: str, columns: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Share of hits over columns that are draws of one condition, and its change from the unchanged model.

        A trace that several draws share counts once, with its mean over them. The change is paired: it is taken within
        traces.

        Returns:
            Rate and change, each ``mean, low, high, n, groups``; n counts traces.
        """
        values, mask = self._values(measure, columns), self._mask(measure, columns)
        base, pairs = self._changes(measure, columns)
        rate = self._mean(values, mask, (0.0, 1.0))
        return rate, self._mean(values - base, pairs, DIFFERENCE)

    def each(self, measure: str, columns: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        """``mean, low, high, n, groups`` of every column by itself, each ``[columns]``."""
        found = self.bootstrap.means(self._values(measure, columns), self._mask(measure, columns), (0.0, 1.0))
        return {name: np.asarray(value) for name, value in found.items()}

    def each_change(self, measure: str, columns: Sequence[int]) -> Floats:
        """Mean paired change of every column by itself; NaN without a pair."""
        base, pairs = self._changes(measure, columns)
        values = self._values(measure, columns) - base
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(pairs, values, 0.0).sum(0) / np.where(pairs.any(0), pairs.sum(0), np.nan))

    def _values(self, measure: str, columns: Sequence[int]) -> Floats:
        return self.hits[measure][:, list(columns)].astype(np.float64)

    def _mask(self, measure: str, columns: Sequence[int]) -> Bools:
        return np.asarray((self.present & self.among[measure])[:, list(columns)])

    def _changes(self, measure: str, columns: Sequence[int]) -> tuple[Floats, Bools]:
        beside = [int(self.unchanged[k]) for k in columns]
        return self._values(measure, beside), self._mask(measure, columns) & self._mask(measure, beside)

    def _mean(self, values: Floats, mask: Bools, bounds: tuple[float, float]) -> dict[str, Any]:
        counts = mask.sum(1)
        pooled = np.where(mask, values, 0.0).sum(1) / np.maximum(counts, 1)
        entry = self.bootstrap.mean(pooled, counts > 0, bounds).as_dict()
        # The pseudo-groups of a difference may lie outside the range that a difference of two rates has.
        ends = {name: entry[name] if entry[name] is None else min(max(entry[name], -1.0), 1.0) for name in _ENDS}
        return {**entry, **ends}


def perplexities(
    nll: Floats, base: Floats, tokens: Floats, mask: Bools, bootstrap: GroupBootstrap
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Perplexity per token over traces, and its ratio to the unchanged model's on the same traces.

    Args:
        nll: Sum of the negative log-probabilities of each trace's tokens in nats, ``[N]``.
        base: The same under the unchanged model.
        tokens: Tokens of each trace.
        mask: Which traces count.
        bootstrap: Resamples of the traces' clusters.

    Returns:
        Perplexity and ratio, each ``mean, low, high, n, groups``; the interval of the ratio is over paired traces.
    """
    sums, count = {}, bootstrap.group_sums(tokens, mask)[0]
    groups, n = int((count > 0).sum()), int(mask.sum())
    for name, values in (("perplexity", nll), ("ratio", nll - base)):
        total = bootstrap.group_sums(values, mask)[0]
        entry: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": n, "groups": groups}
        if n:
            entry["mean"] = _finite_exp(float(total.sum() / count.sum()))
        if groups > 1:
            bottom = bootstrap.weights_BG @ count
            with np.errstate(invalid="ignore"):
                draws_B = (bootstrap.weights_BG @ total) / np.where(bottom > 0, bottom, np.nan)
            low, high = percentile_interval(draws_B)
            entry |= {"low": _finite_exp(float(low)), "high": _finite_exp(float(high))}
        sums[name] = entry
    return sums["perplexity"], sums["ratio"]


def _finite_exp(value: float) -> float | None:
    """``exp``, or ``None`` where it is no finite number: a model may give what it would never say probability 0."""
    return math.exp(value) if math.isfinite(value) and value < 700 else None
