"""The content of ``heads.json``: which heads suppress refusal, and what they were measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clifflab.science.effects import LEVEL, Paired, number, percentile, rank_correlation, top_count
from clifflab.stages.head_tables import FINAL, LOG_ODDS, LOGIT, Method, Search, name
from clifflab.stages.head_units import SWEPT, head_list
from clifflab.stages.openings import opening_ids
from clifflab.stages.readout import kept_readers

_TOP = 20  # heads of the top list at least


def head_figures(search: Search, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """The content of ``heads.json``.

    Args:
        search: What was found.
        decode: Token ids to text.
    """
    settings, chosen = search.context.study.heads, search.chosen
    counts = search.estimates.heads_per_layer
    openings = zip(("refusal", "compliance"), opening_ids(search.context, search.model), strict=True)
    enough = None if search.gap.get("reason") else settings.threshold * search.gap["mean"]
    return {
        "reason": "",
        "method": settings.method,
        "positions": list(settings.positions),
        "gamma": settings.gamma if settings.replace == "scale" else None,
        "replace": settings.replace,
        "renormalise": settings.renormalise,
        "total": sum(counts),
        "heads_per_layer": counts,
        "looked_at": len(head_list(counts, settings.only)),
        "swept": len(exact.heads) if (exact := search.method("exact", settings.positions[0])) else 0,
        "probe": {"positions": "all", "layer": kept_readers(search.context, search.model).layer("all")},
        "no_direct": search.estimates.no_direct,
        "traces": {
            "attacked_are": chosen.attacked,
            "attacked_sets": list(settings.attacked),
            "plain_sets": list(settings.plain),
            **{
                f"{role}_{half}": {"traces": len(rows), "clusters": len(set(chosen.clusters[role, half]))}
                for (role, half), rows in chosen.rows.items()
            },
            "complied": chosen.complied,
        },
        "openings": {name: [{"id": token, "text": decode([token])} for token in tokens] for name, tokens in openings},
        "log_odds": {
            f"{role}_{half}": Paired.of(
                search.estimates.of(role, half, "clean")[:, -1], chosen.clusters[role, half]
            ).figure()
            for role, half in SWEPT
        },
        "gap": search.gap,
        "threshold": {"share": settings.threshold, "effect": enough, "q": LEVEL},
        "found": {positions: _found(search, positions) for positions in settings.positions},
        "correlations": {positions: _correlations(search, positions) for positions in settings.positions},
    }


def _found(search: Search, positions: str) -> dict[str, Any]:
    exact = search.method("exact", positions)
    if exact is None:
        method = search.context.study.heads.method
        reason = f"heads.method is {method}: an estimate alone makes no suppression head"
        return {"reason": reason, "suppression": [], "promoting": [], "top": []}
    count = max(_TOP, top_count(search.context.study.heads.fraction, sum(search.estimates.heads_per_layer)))
    reason = search.gap.get("reason", "")
    if not reason and exact.reporting.groups < 2:
        reason = "the reporting half has fewer than two groups of attacked prompts"
    return {
        "reason": reason,
        "suppression": [name(head) for head in search.suppression(positions)],
        "promoting": [name(head) for head in search.judged(positions, -1)],
        "top": [_entry(search, exact, h, rank) for rank, h in enumerate(exact.order[:count], start=1)],
    }


def _entry(search: Search, exact: Method, h: int, rank: int) -> dict[str, Any]:
    """One head of the top list; estimates beside the exact effect."""
    head, reported = exact.heads[h], exact.reporting
    direct, first_order = search.method("direct", FINAL), search.method("attribution", exact.positions)
    assert direct is not None and first_order is not None  # noqa: PT018 - both are always made
    place = direct.heads.index(head)
    logit = reported.mean[h, LOGIT]
    return {
        "head": name(head),
        "rank": rank,
        "ranking_effect": number(exact.ranking.mean[h, LOG_ODDS]),
        "effect": number(reported.mean[h, LOG_ODDS]),
        "low": number(reported.low[h, LOG_ODDS]),
        "high": number(reported.high[h, LOG_ODDS]),
        "q": number(exact.q[h]),
        "share_of_gap": number(reported.mean[h, LOG_ODDS] / search.gap["mean"])
        if search.gap["mean"] and not search.gap.get("reason")
        else None,
        "suppression": bool(exact.verdict is not None and exact.verdict[h] == 1),
        "effect_logit": number(logit),
        # Of the random directions, how many move less than the probe when the head is removed.
        "random_directions": percentile(abs(logit), np.abs(exact.random[h])),
        "direct_logit": number(direct.reporting.mean[place, LOGIT]),
        "first_order": number(first_order.reporting.mean[place, LOG_ODDS]),
        "plain": number(exact.plain.mean[h, LOG_ODDS]),
        "benign": number(exact.benign.mean[h, LOG_ODDS]),
        "benign_low": number(exact.benign.low[h, LOG_ODDS]),
        "benign_high": number(exact.benign.high[h, LOG_ODDS]),
    }


def _correlations(search: Search, positions: str) -> dict[str, Any]:
    """Spearman's correlation of each estimate with the exact effect on the same reading, on the ranking half."""
    exact, entries = search.method("exact", positions), {}
    if exact is None:
        return {}
    for estimate in (search.method("direct", FINAL), search.method("attribution", positions)):
        assert estimate is not None
        places = [estimate.heads.index(head) for head in exact.heads]
        sign = -1 if estimate.name == "direct" else 1  # what a head writes is what its removal takes away
        entries[f"{estimate.name}_logit"] = rank_correlation(
            sign * estimate.ranking.mean[places, LOGIT], exact.ranking.mean[:, LOGIT]
        )
        entries[f"{estimate.name}_log_odds"] = rank_correlation(estimate.sizes[places], exact.ranking.mean[:, LOG_ODDS])
    return entries
