"""The same heads by other readings: the probe, what a head itself writes, the first-order estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clifflab.report.blocks import Block, Drawing, Table
from clifflab.report.figures import rank_scatter
from clifflab.report.head_results import EXACT, Head, HeadsFound, head_name
from clifflab.report.head_words import METHOD, PANEL, drawn_map, share_text, signed
from clifflab.report.numbers import DASH

_READING = {"logit": "the probe's logit", "log_odds": "the refusal log-odds"}


def method_blocks(found: HeadsFound, heads: Sequence[Head]) -> list[Block]:
    """Maps, a table of some heads, and how far the estimates agree with the exact effects.

    Args:
        found: What the search found.
        heads: The heads of the table.
    """
    return [*_maps(found), _table(found, heads), *_scatters(found), *_correlations(found)]


def _maps(found: HeadsFound) -> list[Block]:
    places = [p for p in found.positions if p != "final"]
    asked = [(f"probe logit, {PANEL.get(p, p)}", EXACT, p, "effect_logit", 1.0) for p in places]
    asked += [(f"first order, {PANEL.get(p, p)}", "attribution", p, "effect_log_odds", 1.0) for p in places]
    asked.append(("direct, final position", "direct", "final", "effect_logit", -1.0))
    panels = {
        name: drawn_map(found, method, positions, column, sign, name)
        for name, method, positions, column, sign in asked
        if method in (EXACT, *({"attribution", "direct"} - {found.ranked_by})) and found.has(method, positions, column)
    }
    if not panels:
        return []
    see = (
        "A head that is red in every panel is found by every method. The direct panel shows minus what a head itself "
        "writes on the probe's direction, so that red means the same everywhere; what it does by way of later layers "
        "is not in it. Heads above the probed layer cannot move the probe: they are grey."
    )
    return [Drawing("heads-methods", "The same heads by other readings", see, panels)]


def _table(found: HeadsFound, heads: Sequence[Head]) -> Table:
    places = [p for p in found.positions if p != "final"]
    titles = ["head"]
    for positions in places:
        where = PANEL.get(positions, positions)
        titles += [f"probe logit, {where}", f"above random directions, {where}", f"first order, {where}"]
    rows = []
    for name in heads:
        cells: list[Any] = [head_name(name)]
        for positions in places:
            cells += [
                signed((found.row(EXACT, positions, name) or {}).get("effect_logit")),
                share_text(found.top(positions).get(name, {}).get("random_directions")),
                signed((found.row("attribution", positions, name) or {}).get("effect_log_odds")),
            ]
        rows.append([*cells, signed((found.row("direct", "final", name) or {}).get("effect_logit"))])
    caption = (
        "The heads of the first table by the other readings: how the probe's logit changes, the share of random "
        "directions of the probe's length and layer that change less (for heads at the top of the ranking), the "
        "first-order estimate of the change of the log-odds, and what the head itself writes on the probe's direction. "
        "Means over the attacked traces of the reporting half, for comparison: intervals of all are in heads.parquet. "
        "A dash: not defined, or not looked at."
    )
    return Table(caption, [*titles, "direct"], rows)


def _scatters(found: HeadsFound) -> list[Block]:
    panels = {}
    planted = found.planted.heads if found.planted else frozenset()
    places = found.positions if found.ranked_by == EXACT else ()
    for method, positions in [("attribution", p) for p in places] + [("direct", p) for p in places[:1]]:
        exact = {head: i for i, head in enumerate(found.ranking(EXACT, positions), start=1)}
        at = "final" if method == "direct" else positions
        ranks = {h: (i, exact[h]) for i, h in enumerate(found.ranking(method, at), start=1) if h in exact}
        if len(ranks) > 1:
            name = f"{'first order' if method == 'attribution' else method}, {PANEL.get(positions, positions)}"
            panels[name] = rank_scatter(ranks, METHOD[method], name, found.suppression(positions), planted)
    if not panels:
        return []
    see = (
        "Top right are the heads that both rankings put first. A suppression head far to the left would have been "
        "missed by screening with that estimate."
    )
    return [Drawing("ranks", "Do cheap estimates find the same heads?", see, panels)]


def _correlations(found: HeadsFound) -> list[Block]:
    rows = [
        [
            METHOD.get(entry["method"], entry["method"]),
            PANEL.get(entry["positions"], entry["positions"]),
            _READING.get(entry["reading"], entry["reading"]),
            DASH if entry["rho"] is None else f"{entry['rho']:z.2f}",
            entry["n"],
        ]
        for entry in found.correlations()
    ]
    if not rows:
        return []
    caption = (
        "Rank correlation (Spearman) of each estimate with the exact effects, over heads, on the ranking half. It "
        "describes all heads that have both numbers, not a sample of them: no interval."
    )
    titles = ["estimate", "exact effects at", "exact effects on", "rank correlation", "heads"]
    return [Table(caption, titles, rows)]
