"""Statistics of head effects: halves of the groups, paired intervals, false discoveries, verdicts (SPEC section 4).

Shape suffixes: N traces, C clusters, H heads (or sets of heads), X anything that is carried along.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from clifflab.science.stats import Floats, percentile_interval

HALVES = ("ranking", "reporting")
LEVEL = 0.05  # false discovery rate at which a head counts


def halves(kinds: Mapping[str, str], seed: int) -> dict[str, str]:
    """Half of every cluster: ``ranking`` or ``reporting``, equal shares of each kind, in the order of a seeded hash.

    Heads are chosen on one half and described on the other, so that no effect is flattered by having been chosen.

    Args:
        kinds: What to balance over the halves, by cluster (its prompt sets).
        seed: Seed of the study.
    """

    def order(cluster: str) -> tuple[str, str, str]:
        return kinds[cluster], hashlib.sha256(f"halves:{seed}:{cluster}".encode()).hexdigest(), cluster

    return {cluster: HALVES[place % 2] for place, cluster in enumerate(sorted(kinds, key=order))}


def top_count(fraction: float, total: int) -> int:
    """How many heads a fraction of all is: ``ceil(fraction x total)`` in decimal arithmetic, so that 3% of 100 is 3."""
    return min(total, math.ceil(Decimal(str(fraction)) * total))


def cluster_means(values_NX: Floats, clusters_N: Sequence[str]) -> Floats:
    """Mean over the traces of each cluster, ``[C, X]``, clusters in the order of their names."""
    names, codes = np.unique(np.asarray(list(clusters_N), dtype=object).astype(str), return_inverse=True)
    sums = np.zeros((len(names), *values_NX.shape[1:]))
    np.add.at(sums, codes, values_NX)
    counts = np.bincount(codes, minlength=len(names)).astype(np.float64)
    return np.asarray(sums / counts.reshape(-1, *[1] * (values_NX.ndim - 1)))


@dataclass(frozen=True)
class Paired:
    """Means over clusters with their t-intervals, each ``[X]``; NaN where there is no number.

    Attributes:
        mean: Mean over clusters.
        low: Lower end of the 95% interval; NaN below two clusters.
        high: Upper end.
        p: Two-sided probability of a mean this far from 0 by chance; NaN below two clusters, or where clusters agree to
            the last digit, so that there is no spread to judge by. All zeros give 1.
        n: Traces.
        groups: Clusters.
    """

    mean: Floats
    low: Floats
    high: Floats
    p: Floats
    n: int
    groups: int

    @classmethod
    def of(cls, values_NX: Floats, clusters_N: Sequence[str]) -> Paired:
        """Of differences within traces: changed minus unchanged, ``[N, X]``."""
        n, tail = len(clusters_N), values_NX.shape[1:]
        if not n:
            nothing = np.full(tail, np.nan)
            return cls(nothing, nothing, nothing, nothing, 0, 0)
        means_CX = cluster_means(np.asarray(values_NX, dtype=np.float64), clusters_N)
        groups, mean = len(means_CX), means_CX.mean(0)
        if groups < 2:
            nothing = np.full(tail, np.nan)
            return cls(mean, nothing, nothing, nothing, n, groups)
        error = means_CX.std(0, ddof=1) / math.sqrt(groups)
        reach = scipy_stats.t.ppf(0.975, groups - 1) * error
        with np.errstate(invalid="ignore", divide="ignore"):
            p = 2 * scipy_stats.t.sf(np.abs(mean) / np.where(error > 0, error, np.nan), groups - 1)
        p = np.where((error == 0) & (mean == 0), 1.0, p)
        return cls(mean, mean - reach, mean + reach, p, n, groups)

    def column(self, index: int) -> Paired:
        """One reading of all heads, ``[H]`` of ``[H, X]``."""
        mean, low, high, p = (part[:, index] for part in (self.mean, self.low, self.high, self.p))
        return Paired(mean, low, high, p, self.n, self.groups)

    def figure(self, *index: int) -> dict[str, Any]:
        """One of them as plain data: ``mean, low, high, n, groups``."""
        values = {name: number(getattr(self, name)[index]) for name in ("mean", "low", "high")}
        return {**values, "n": self.n, "groups": self.groups}


def false_discovery(p_H: Floats) -> Floats:
    """Benjamini and Hochberg's (1995) q-value of every head that has a probability, ``[H]``; NaN elsewhere."""
    q_H = np.full(p_H.shape, np.nan)
    tested = np.isfinite(p_H)
    if tested.any():
        q_H[tested] = scipy_stats.false_discovery_control(p_H[tested], method="bh")
    return q_H


def gap_between(
    plain_N: Floats, plain_clusters: Sequence[str], attacked_N: Floats, attacked_clusters: Sequence[str]
) -> dict[str, Any]:
    """Refusal log-odds of plain prompts minus those of attacked ones, means over clusters, with Welch's interval.

    Returns:
        ``mean, low, high, n, groups`` (the smaller number of clusters); a ``reason`` where there is no mean or where
        the interval is not above 0, so that no effect can be measured against it.
    """
    sides = [
        cluster_means(np.asarray(values, dtype=np.float64), clusters)
        for values, clusters in ((plain_N, plain_clusters), (attacked_N, attacked_clusters))
    ]
    entry: dict[str, Any] = {"mean": None, "low": None, "high": None, "n": len(plain_N) + len(attacked_N)}
    entry["groups"] = min(len(side) for side in sides)
    for side, name in zip(sides, ("plain refused", "attacked"), strict=True):
        if not len(side):
            return {**entry, "reason": f"the reporting half has no {name} trace"}
    entry["mean"] = float(sides[0].mean() - sides[1].mean())
    if entry["groups"] < 2:
        return {**entry, "reason": "an interval needs two groups of plain and two of attacked prompts"}
    parts = [side.var(ddof=1) / len(side) for side in sides]
    error = math.sqrt(sum(parts))
    spread = sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    freedom = sum(parts) ** 2 / spread if spread else 1.0  # Welch and Satterthwaite
    reach = float(scipy_stats.t.ppf(0.975, freedom)) * error
    entry |= {"low": entry["mean"] - reach, "high": entry["mean"] + reach}
    if entry["low"] > 0:
        return entry
    return {**entry, "reason": "attacked prompts do not clearly lower the refusal log-odds: nothing to measure against"}


def verdicts(effects: Paired, q_H: Floats, gap: Mapping[str, Any], threshold: float) -> npt.NDArray[np.int8]:
    """1 for suppression heads, -1 for heads that promote refusal by the same measure, 0 for all others, ``[H]``.

    A suppression head's removal raises the refusal log-odds on the reporting half: q below 5%, and an effect of at
    least ``threshold`` times the gap between plain and attacked prompts. Without a clear gap no head can pass.

    Args:
        effects: Effects on the reporting half.
        q_H: Their q-values.
        gap: See :func:`gap_between`.
        threshold: Share of the gap.
    """
    if gap.get("reason"):
        return np.zeros(len(q_H), dtype=np.int8)
    with np.errstate(invalid="ignore"):
        passed = (q_H < LEVEL) & (np.abs(effects.mean) >= threshold * gap["mean"])
    return np.where(passed, np.sign(np.nan_to_num(effects.mean)), 0).astype(np.int8)


def best_first(values_H: Floats) -> list[int]:
    """Places of the heads in the order of their values, largest first; ties as given, heads without a number last."""
    return [int(place) for place in np.argsort(np.where(np.isfinite(values_H), -values_H, np.inf), kind="stable")]


def rank_correlation(estimate_H: Floats, exact_H: Floats) -> dict[str, Any]:
    """Spearman's correlation over the heads that have both numbers: ``rho`` (``None`` where undefined) and ``n``."""
    both = np.isfinite(estimate_H) & np.isfinite(exact_H)
    one, other = estimate_H[both], exact_H[both]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return {"rho": None, "n": len(one)}
    return {"rho": float(scipy_stats.spearmanr(one, other).statistic), "n": len(one)}


def percentile(value: float, draws: Floats) -> float | None:
    """Share of draws below a value, ties counted half; ``None`` without draws or value."""
    draws = draws[np.isfinite(draws)]
    if not len(draws) or not math.isfinite(value):
        return None
    return float(((draws < value).sum() + 0.5 * (draws == value).sum()) / len(draws))


def band(values: Sequence[float] | Floats) -> dict[str, Any]:
    """What random draws give: ``mean, low, high`` (2.5% and 97.5%), ``min, max, n``; NaN draws are left out."""
    draws = np.asarray(values, dtype=np.float64)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return {"mean": None, "low": None, "high": None, "min": None, "max": None, "n": 0}
    low, high = percentile_interval(draws)
    ends = {"low": number(low), "high": number(high), "min": number(draws.min()), "max": number(draws.max())}
    return {"mean": number(draws.mean()), **ends, "n": len(draws)}


def random_sets(
    chosen: Sequence[tuple[int, int]], heads_per_layer: Sequence[int], draws: int, seed: int
) -> list[list[tuple[int, int]]]:
    """Random sets of heads with as many heads of each layer as a chosen set has, none of them chosen.

    Where a layer has too few others, the rest comes from the layers nearest to it.

    Args:
        chosen: Heads of the set as ``(layer, head)``.
        heads_per_layer: Heads of each layer of the model.
        draws: How many sets.
        seed: Seed of the study.

    Returns:
        The sets, each in the order of layers and heads; shorter where the model has too few other heads.
    """
    taken = set(chosen)
    layers = range(len(heads_per_layer))
    found = []
    for draw in range(draws):
        digest = hashlib.sha256(f"random heads:{seed}:{len(taken)}:{draw}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:8], "big")))
        free = {layer: [h for h in range(heads_per_layer[layer]) if (layer, h) not in taken] for layer in layers}
        mine: list[tuple[int, int]] = []
        wanted = [layer for layer, _ in sorted(taken)]
        for reach in layers:  # every layer takes from its own heads before any takes from a neighbour's
            for layer in list(wanted):
                near = [at for at in (layer - reach, layer + reach) if free.get(at)]
                if near:
                    mine.append((near[0], free[near[0]].pop(int(rng.integers(len(free[near[0]]))))))
                    wanted.remove(layer)
        found.append(sorted(mine))
    return found


def number(value: Any) -> float | None:
    """A float for JSON; ``None`` for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
