"""Statistics of head effects, on planted numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from clifflab.science.effects import (
    Paired,
    band,
    best_first,
    cluster_means,
    false_discovery,
    gap_between,
    halves,
    percentile,
    random_sets,
    rank_correlation,
    top_count,
    verdicts,
)
from clifflab.stages.head_greedy import greedy_search

CLEAR: dict[str, Any] = {"mean": 10.0, "low": 8.0, "high": 12.0}


def names(count: int) -> list[str]:
    return [f"c{i}" for i in range(count)]


def test_false_discovery_by_hand() -> None:
    """Benjamini and Hochberg: p(i) n / i, then the running minimum from the largest p down."""
    p = np.asarray([0.01, np.nan, 0.04, 0.03, 0.005, 0.5])
    # sorted 0.005 0.01 0.03 0.04 0.5, times 5/1 5/2 5/3 5/4 5/5: 0.025 0.025 0.05 0.05 0.5
    found = false_discovery(p)
    assert np.allclose(found[[0, 2, 3, 4, 5]], [0.025, 0.05, 0.05, 0.025, 0.5])
    assert np.isnan(found[1])
    assert np.isnan(false_discovery(np.full(3, np.nan))).all()


def test_intervals_are_over_clusters() -> None:
    """Three traces of one cluster are one observation; the t-interval by hand."""
    values = np.asarray([1.0, 2.0, 3.0, 4.0, 6.0])
    clusters = ["a", "a", "a", "b", "c"]  # means 2, 4, 6
    found = Paired.of(values[:, None], clusters)
    assert cluster_means(values[:, None], clusters)[:, 0].tolist() == [2.0, 4.0, 6.0]
    reach = 4.302652729911275 * 2 / math.sqrt(3)  # t(0.975, 2) and a standard deviation of 2
    assert (found.mean[0], found.low[0], found.high[0]) == pytest.approx((4.0, 4 - reach, 4 + reach))
    assert found.p[0] == pytest.approx(0.0741799, abs=1e-6)  # t = 3.4641 with 2 degrees of freedom
    assert (found.n, found.groups) == (5, 3)
    assert found.figure(0)["mean"] == pytest.approx(4.0)


def test_too_few_clusters_have_no_interval_and_nothing_passes() -> None:
    for count in (0, 1):
        found = Paired.of(np.full((count, 1), 9.0), names(count))
        assert np.isnan(found.p).all()
        assert np.isnan(found.low).all()
        assert not verdicts(found, false_discovery(found.p), CLEAR, 0.05).any()
    same = Paired.of(np.full((6, 1), 9.0), names(6))  # no spread to judge by
    assert not verdicts(same, false_discovery(same.p), CLEAR, 0.05).any()
    assert Paired.of(np.zeros((6, 1)), names(6)).p.tolist() == [1.0]


def planted(heads: int, real: dict[int, float], seed: int = 0) -> Paired:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1.0, (16, heads))
    for head, size in real.items():
        values[:, head] += size
    return Paired.of(values, names(16))


def test_planted_heads_pass_and_no_other() -> None:
    effects = planted(200, {7: 4.0, 90: -4.0})
    found = verdicts(effects, false_discovery(effects.p), CLEAR, 0.1)
    assert np.flatnonzero(found == 1).tolist() == [7]
    assert np.flatnonzero(found == -1).tolist() == [90]


def test_no_head_of_null_data_passes() -> None:
    for seed in range(20):
        effects = planted(200, {}, seed)
        assert not verdicts(effects, false_discovery(effects.p), CLEAR, 0.05).any(), seed


def test_a_small_effect_or_an_unclear_gap_is_no_verdict() -> None:
    effects = planted(20, {3: 4.0})
    q = false_discovery(effects.p)
    assert verdicts(effects, q, CLEAR, 0.3)[3] == 1
    assert verdicts(effects, q, CLEAR, 0.6)[3] == 0
    assert not verdicts(effects, q, {**CLEAR, "reason": "unclear"}, 0.0).any()


def test_gap() -> None:
    """Welch's interval as scipy computes it; no gap where the interval holds 0."""
    from scipy import stats

    rng = np.random.default_rng(1)
    plain, attacked = rng.normal(5, 1, 12), rng.normal(-1, 3, 20)
    found = gap_between(plain, names(12), attacked, names(20))
    welch = stats.ttest_ind(plain, attacked, equal_var=False).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((welch.low, welch.high))
    assert "reason" not in found
    assert "nothing to measure against" in gap_between(attacked, names(20), attacked, names(20))["reason"]
    assert "no plain refused trace" in gap_between(plain[:0], [], attacked, names(20))["reason"]
    one = gap_between(plain[:1], ["a"], attacked, names(20))
    assert one["low"] is None
    assert one["reason"]


def test_halves_are_disjoint_even_and_seeded() -> None:
    kinds = {f"c{i}": ("harmful" if i % 3 else "benign") for i in range(90)}
    found = halves(kinds, 0)
    for kind in ("harmful", "benign"):
        own = [found[cluster] for cluster in kinds if kinds[cluster] == kind]
        assert own.count("ranking") == own.count("reporting") == len(own) // 2
    assert found == halves(dict(reversed(kinds.items())), 0), "the order of clusters does not enter"
    assert found != halves(kinds, 1)


def test_counts_are_decimal() -> None:
    assert [top_count(f, 100) for f in (0.0, 0.01, 0.03, 0.07, 0.29, 1.0)] == [0, 1, 3, 7, 29, 100]
    assert (math.ceil(0.07 * 100), top_count(0.03, 64), top_count(0.001, 64)) == (8, 2, 1)


def test_random_sets_match_the_layers() -> None:
    chosen = [(0, 1), (2, 0), (2, 3)]
    sets = random_sets(chosen, [8, 8, 8], 20, seed=0)
    assert len(sets) == 20
    for drawn in sets:
        assert sorted(layer for layer, _ in drawn) == [0, 2, 2]
        assert not set(drawn) & set(chosen)
        assert len(set(drawn)) == 3
    assert len({tuple(drawn) for drawn in sets}) > 10
    assert sets == random_sets(chosen, [8, 8, 8], 20, seed=0)
    assert sets != random_sets(chosen, [8, 8, 8], 20, seed=1)


def test_random_sets_without_enough_others() -> None:
    """A layer that is chosen whole takes from its neighbours, after their own; a model without others gives less."""
    for drawn in random_sets([(1, 0), (1, 1), (2, 0)], [2, 2, 2], 20, seed=0):
        assert sorted(drawn) == [(0, 0), (0, 1), (2, 1)]
    assert random_sets([(0, 0), (0, 1)], [2, 1], 1, seed=0) == [[(1, 0)]]


def test_ranks_correlations_and_percentiles() -> None:
    values = np.asarray([0.5, np.nan, 2.0, 0.5])
    assert best_first(values) == [2, 0, 3, 1]
    assert rank_correlation(values, np.asarray([5.0, 1.0, 9.0, 5.0]))["n"] == 3
    assert rank_correlation(np.arange(5.0), -np.arange(5.0)) == {"rho": pytest.approx(-1.0), "n": 5}
    assert rank_correlation(np.ones(5), np.arange(5.0))["rho"] is None
    assert percentile(2.0, np.asarray([1.0, 2.0, 3.0, 4.0])) == 0.375
    assert percentile(2.0, np.zeros(0)) is None
    assert (band(np.asarray([1.0, 3.0]))["min"], band(np.zeros(0))["mean"]) == (1.0, None)


def test_a_stand_in_is_found_behind_the_head_that_it_replaces() -> None:
    """Two heads of which either suffices: the second ranks last alone, and only their joint removal shows."""
    swept = tuple((layer, head) for layer in range(4) for head in range(4))
    alone = {(1, 1): 0.8, (3, 2): -0.1}  # all others: small effects of their own
    seen: list[tuple[str, int]] = []

    def remove(half: str, sets: Any) -> Any:
        seen.append((half, len(sets)))
        effects = [
            sum(alone.get(head, 0.05) for head in members) + 10.0 * ({(1, 1), (3, 2)} <= set(members))
            for members in sets
        ]
        return np.repeat(np.asarray(effects, dtype=np.float32)[None, :, None], 6, axis=0).repeat(2, axis=2)

    found = greedy_search(remove, [str(n) for n in range(6)], ((1, 1), (0, 0), (0, 1)), swept, limit=3)
    assert found["pair"].tolist() == [[1, 1], [3, 2]]
    assert found["order"].tolist()[:2] == [[1, 1], [3, 2]]
    assert len(found["order"]) == 3
    assert found["reporting"][0, :2, 1] == pytest.approx([0.8, 10.7])
    assert found["pair.reporting"][0, :, 1] == pytest.approx([0.8, -0.1, 10.7])
    assert ("ranking", 15 + 15 + 15 - 3) in seen, "all heads behind each start, every pair once"
    one = greedy_search(remove, [str(n) for n in range(6)], ((0, 0),), ((0, 0),), limit=3)
    assert one["order"].tolist() == one["pair"].tolist() == [[0, 0]]
