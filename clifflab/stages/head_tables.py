"""What a search for heads found, all methods beside each other: the rows of ``heads.parquet``.

Shape suffixes: N traces of one role and half, H heads, M readings of the meter (the probe's logit first, the refusal
log-odds last, random directions between them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from clifflab.models.heads import Head
from clifflab.science.effects import (
    Paired,
    best_first,
    false_discovery,
    gap_between,
    number,
    verdicts,
)
from clifflab.science.stats import Floats
from clifflab.stages.base import Context
from clifflab.stages.head_estimates import Estimates
from clifflab.stages.head_units import RANKING, REPORTING, SWEPT, Chosen, chosen_traces, head_list

LOGIT, LOG_ODDS = 0, 1
FINAL = "final"  # where direct effects are read


@dataclass(frozen=True)
class Method:
    """One method's numbers of every head, at one kind of positions.

    Attributes:
        name: ``direct``, ``attribution`` or ``exact``.
        positions: Where heads are changed, or ``final`` for direct effects.
        heads: The heads, H of them.
        ranking: Effects on logit and log-odds on the ranking half, ``[H, 2]``.
        reporting: The same on the reporting half.
        plain: Effects on plain refused prompts.
        benign: Effects on benign answered prompts.
        verdict: 1 suppression, -1 promotion, 0 neither, ``[H]``; ``None`` for estimates, which prove nothing.
        random: Mean effects on random directions' logits on the reporting half, ``[H, R]``.
    """

    name: str
    positions: str
    heads: list[Head]
    ranking: Paired
    reporting: Paired
    plain: Paired
    benign: Paired
    verdict: npt.NDArray[np.int8] | None
    random: Floats

    @property
    def column(self) -> int:
        """Which effect ranks and carries interval and q: the log-odds, or the logit for direct effects."""
        return LOGIT if self.name == "direct" else LOG_ODDS

    @cached_property
    def sizes(self) -> Floats:
        """What ranks the heads, ``[H]``: a direct write counts as suppression by what it takes from the probe."""
        means_H = self.ranking.mean[:, self.column]
        return np.asarray(-means_H if self.name == "direct" else means_H)

    @cached_property
    def q(self) -> Floats:
        """q-values over all heads, ``[H]``."""
        return false_discovery(self.reporting.p[:, self.column])

    @cached_property
    def order(self) -> list[int]:
        """Places of the heads, first rank first."""
        return best_first(self.sizes)


@dataclass(frozen=True)
class Search:
    """A model's search, joined from its units.

    Attributes:
        context: The worker's context.
        model: Name of the model.
        estimates: Direct and first-order estimates, and clean readings.
        chosen: The traces.
        methods: Every method at every kind of positions.
        gap: Refusal log-odds between plain and attacked prompts, on the reporting half.
    """

    context: Context
    model: str
    estimates: Estimates
    chosen: Chosen
    methods: list[Method]
    gap: dict[str, Any]

    @classmethod
    def of(
        cls,
        context: Context,
        model: str,
        estimates: Estimates,
        swept: list[Head],
        exact: dict[tuple[str, str], dict[str, Any]],
    ) -> Search:
        """Put the numbers of all methods beside each other."""
        settings, chosen = context.study.heads, chosen_traces(context, model)
        every = head_list(estimates.heads_per_layer, ())
        looked_at = head_list(estimates.heads_per_layer, settings.only)
        mine = [every.index(head) for head in looked_at]
        gap = model_gap(chosen, estimates)

        def method(name: str, positions: str, heads: list[Head], of: Callable[[str, str], Floats]) -> Method:
            values = {(role, half): of(role, half) for role, half in SWEPT}
            pair = {
                key: Paired.of(array[..., [0, -1]], chosen.clusters[key]) for key, array in values.items()
            }  # logit and log-odds
            reported = pair["attacked", REPORTING]
            found = verdicts(
                reported.column(LOG_ODDS), false_discovery(reported.p[:, LOG_ODDS]), gap, settings.threshold
            )
            directions = Paired.of(values["attacked", REPORTING], chosen.clusters["attacked", REPORTING]).mean[:, 1:-1]
            return Method(
                name, positions, heads, pair["attacked", RANKING], reported, pair["plain", REPORTING],
                pair["benign", REPORTING], found if name == "exact" else None, directions,
            )  # fmt: skip

        def direct(role: str, half: str) -> Floats:
            logits_NH = estimates.of(role, half, "direct")[:, mine]
            if role != "attacked":
                logits_NH = np.full_like(logits_NH, np.nan)
            return np.stack([logits_NH, np.full_like(logits_NH, np.nan)], axis=-1)

        def estimated(role: str, half: str, at: str) -> Floats:
            return estimates.of(role, half, f"attribution.{at}")[:, mine]

        def removed(role: str, half: str, at: str) -> Floats:
            like: Floats = next(iter(exact.values()))[at]
            found: Floats = exact[role, half][at] if (role, half) in exact else like[:0]
            return found

        methods = [method("direct", FINAL, looked_at, direct)]
        for at in settings.positions:
            methods.append(method("attribution", at, looked_at, partial(estimated, at=at)))
            if swept:
                methods.append(method("exact", at, swept, partial(removed, at=at)))
        return cls(context, model, estimates, chosen, methods, gap)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``heads.parquet``: method by method, heads in the order of the model."""
        found = []
        for method in self.methods:
            places = {head: rank for rank, head in enumerate(method.order, start=1)}
            for h, (layer, head) in enumerate(method.heads):
                effect = method.reporting.mean[h, LOG_ODDS]
                share = effect / self.gap["mean"] if self.gap["mean"] and not self.gap.get("reason") else np.nan
                numbers = {
                    "effect_logit": method.reporting.mean[h, LOGIT],
                    "effect_log_odds": effect,
                    "low": method.reporting.low[h, method.column],
                    "high": method.reporting.high[h, method.column],
                    "q": method.q[h],
                    "ranking_logit": method.ranking.mean[h, LOGIT],
                    "ranking_log_odds": method.ranking.mean[h, LOG_ODDS],
                    "plain_log_odds": method.plain.mean[h, LOG_ODDS],
                    "benign_log_odds": method.benign.mean[h, LOG_ODDS],
                    "share_of_gap": share,
                }
                where = {"model": self.model, "layer": layer, "head": head, "positions": method.positions}
                verdict = None if method.verdict is None else bool(method.verdict[h] == 1)
                found.append(
                    {
                        **where,
                        "method": method.name,
                        **{name: number(value) for name, value in numbers.items()},
                        "rank": places[h],
                        "suppression": verdict,
                    }
                )
        return found

    def method(self, name: str, positions: str) -> Method | None:
        """One method's numbers; ``None`` where it was not used."""
        return next((m for m in self.methods if (m.name, m.positions) == (name, positions)), None)

    def suppression(self, positions: str) -> list[Head]:
        """Suppression heads at these positions, by rank."""
        return self.judged(positions, 1)

    def judged(self, positions: str, verdict: int) -> list[Head]:
        """Heads of one verdict: suppression heads (1) by rank, promoting ones (-1) from the last rank on."""
        exact = self.method("exact", positions)
        if exact is None or exact.verdict is None:
            return []
        order = exact.order if verdict > 0 else exact.order[::-1]
        return [exact.heads[h] for h in order if exact.verdict[h] == verdict]


def model_gap(chosen: Chosen, estimates: Estimates) -> dict[str, Any]:
    """Refusal log-odds of plain refused minus attacked prompts of the reporting half.

    Where too few attacked prompts were complied with, refused ones stand among them and the figure is no gap.
    """
    sides = [
        (estimates.of(role, REPORTING, "clean")[:, -1], chosen.clusters[role, REPORTING])
        for role in ("plain", "attacked")
    ]
    gap = gap_between(*sides[0], *sides[1])
    if chosen.attacked == "harmful":
        gap["reason"] = "too few attacked prompts were complied with"
    return gap


def name(head: Head) -> str:
    """A head as ``layer.head``."""
    return f"{head[0]}.{head[1]}"
