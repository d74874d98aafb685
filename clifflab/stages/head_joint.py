"""The content of ``head_sets.json``: what removing heads together does, beside random heads and beside each alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clifflab.science.effects import LEVEL, Paired, band, best_first, number, percentile
from clifflab.science.stats import Floats
from clifflab.stages.head_plan import Dose, Heads, Plan, joint
from clifflab.stages.head_tables import LOG_ODDS, LOGIT, name
from clifflab.stages.head_units import RANKING, REPORTING

_TOP_PAIRS = 10
ABOVE = "no direction is read above all of these heads"


@dataclass(frozen=True)
class Joint:
    """Effects of the planned sets.

    Attributes:
        plan: The sets.
        effects: By role and half and positions, ``[N, S, 2]`` in the order of :meth:`Plan.sets`.
        clusters: Cluster of each trace.
        gap: Refusal log-odds between plain and attacked prompts.
        threshold: Share of the gap that counts.
    """

    plan: Plan
    effects: Mapping[tuple[str, str], Mapping[str, Floats]]
    clusters: Mapping[tuple[str, str], Sequence[str]]
    gap: Mapping[str, Any]
    threshold: float

    def values(self, role: str, half: str, positions: str, heads: Heads) -> Floats:
        """Effects of one set, ``[N, 2]``; none where the role has no traces."""
        if (role, half) not in self.effects:
            return np.zeros((0, 2))
        place = self.plan.sets(role, half).index(heads)
        return np.asarray(self.effects[role, half][positions][:, place], dtype=np.float64)

    def paired(self, role: str, half: str, positions: str, heads: Heads) -> Paired:
        """Their means with intervals, ``[2]``."""
        return Paired.of(self.values(role, half, positions, heads), self.clusters[role, half])

    def counts(self, effect: float, p: float) -> bool:
        """Whether one effect passes as a suppression head's would, without a correction for many heads."""
        return bool(not self.gap.get("reason") and p < LEVEL and effect >= self.threshold * self.gap["mean"])

    def share(self, effect: float) -> float | None:
        """The effect as a share of the gap."""
        return number(effect / self.gap["mean"]) if self.gap["mean"] and not self.gap.get("reason") else None


def joint_figures(found: Joint, positions: Sequence[str], greedy: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``head_sets.json``.

    Args:
        found: Effects of the planned sets.
        positions: Where heads were changed.
        greedy: The greedy search's ``order [k, 2]`` and its sets' effects on either half, ``[N, k, 2]``; its first
            ``pair [2, 2]`` and the effects of either head and of both, ``pair.HALF [N, 3, 2]``.
    """
    return {
        "reason": "",
        "candidates": [name(head) for head in found.plan.candidates],
        "doses": [_dose(found, dose, positions) for dose in found.plan.doses],
        "pairs": {at: _pairs(found, at) for at in positions},
        "greedy": {"positions": positions[0], "steps": _steps(found, greedy), "pair": _first_pair(found, greedy)},
    }


def _dose(found: Joint, dose: Dose, positions: Sequence[str]) -> dict[str, Any]:
    effects = {}
    for at in positions:
        reported = found.paired("attacked", REPORTING, at, dose.heads)
        effects[at] = {
            "log_odds": reported.figure(LOG_ODDS),
            "share_of_gap": found.share(reported.mean[LOG_ODDS]),
            "logit": _logit(reported),
            "ranking": found.paired("attacked", RANKING, at, dose.heads).figure(LOG_ODDS),
            "benign": found.paired("benign", REPORTING, at, dose.heads).figure(LOG_ODDS),
        }
        if dose.kind == "suppression":
            drawn = [found.paired("attacked", REPORTING, at, heads).mean for heads in dose.random]
            draws = np.asarray([means[LOG_ODDS] for means in drawn])
            effects[at]["random"] = {**band(draws), "distinct": len(set(dose.random))}
            effects[at]["above_random"] = percentile(float(reported.mean[LOG_ODDS]), draws)
    return {
        "kind": dose.kind,
        "fraction": dose.fraction,
        "count": len(dose.heads),
        "heads": [name(head) for head in dose.heads],
        "random_smaller": any(len(heads) < len(dose.heads) for heads in dose.random),
        "effects": effects,
    }


def _logit(effects: Paired) -> dict[str, Any]:
    entry = effects.figure(LOGIT)
    return entry if entry["mean"] is not None or not entry["n"] else {**entry, "reason": ABOVE}


def _pairs(found: Joint, positions: str) -> dict[str, Any]:
    """The pairs of candidates with the largest joint effects on the ranking half, described on the other."""
    pairs = found.plan.pairs
    if not pairs:
        return {"tested": 0, "top": [], "reason": "fewer than two candidates"}
    ranking = np.asarray([found.paired("attacked", RANKING, positions, pair).mean[LOG_ODDS] for pair in pairs])
    best = [pairs[place] for place in best_first(ranking)[:_TOP_PAIRS]]
    return {"tested": len(pairs), "top": [_pair(found, positions, pair) for pair in best]}


def _pair(found: Joint, positions: str, pair: Heads) -> dict[str, Any]:
    """One pair of candidates."""
    halves = {
        half: [found.values("attacked", half, positions, heads) for heads in ((pair[0],), (pair[1],), pair)]
        for half in (RANKING, REPORTING)
    }
    return _described(found, pair, halves)


def _described(found: Joint, pair: Heads, halves: Mapping[str, Sequence[Floats]]) -> dict[str, Any]:
    """A pair's joint effect, each head's own, and what the pair has beyond their sum.

    Args:
        found: Clusters, gap and threshold.
        pair: Two heads.
        halves: On either half the effects of the first head, of the second and of both, each ``[N, 2]``.
    """
    clusters = found.clusters["attacked", REPORTING]
    *singles, values = halves[REPORTING]
    both, beyond = Paired.of(values, clusters), Paired.of(values - sum(singles), clusters)
    alone = [Paired.of(single, clusters) for single in singles]
    counts = found.counts(both.mean[LOG_ODDS], both.p[LOG_ODDS])
    # What the heads have together beyond the sum of both counts by itself: so do heads that stand in for each other.
    redundant = counts and found.counts(beyond.mean[LOG_ODDS], beyond.p[LOG_ODDS])
    return {
        "heads": [name(head) for head in pair],
        "ranking": Paired.of(halves[RANKING][-1], found.clusters["attacked", RANKING]).figure(LOG_ODDS),
        "log_odds": both.figure(LOG_ODDS),
        "share_of_gap": found.share(both.mean[LOG_ODDS]),
        "alone": [single.figure(LOG_ODDS) for single in alone],
        "beyond_sum": beyond.figure(LOG_ODDS),
        "counts": counts,
        "redundant": redundant,
        # A sweep of single heads misses both.
        "hidden": redundant and not any(found.counts(s.mean[LOG_ODDS], s.p[LOG_ODDS]) for s in alone),
    }


def _first_pair(found: Joint, greedy: Mapping[str, Any]) -> dict[str, Any] | None:
    """The pair that the greedy search begins with: the best of the first candidates with any head."""
    if len(greedy["pair"]) < 2:
        return None
    first, second = ((int(layer), int(head)) for layer, head in greedy["pair"])
    halves = {
        half: list(np.moveaxis(np.asarray(greedy[f"pair.{half}"], dtype=np.float64), 1, 0))
        for half in (RANKING, REPORTING)
    }
    return _described(found, (first, second), halves)


def _steps(found: Joint, greedy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The greedy search's path: each head added, and the effect of all up to it."""
    order = [(int(layer), int(head)) for layer, head in greedy["order"]]
    halves = {half: Paired.of(greedy[half], found.clusters["attacked", half]) for half in (RANKING, REPORTING)}
    return [
        {
            "added": name(head),
            "heads": [name(member) for member in joint(order[: place + 1])],
            "ranking": halves[RANKING].figure(place, LOG_ODDS),
            "log_odds": halves[REPORTING].figure(place, LOG_ODDS),
            "share_of_gap": found.share(halves[REPORTING].mean[place, LOG_ODDS]),
        }
        for place, head in enumerate(order)
    ]
