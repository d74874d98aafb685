"""Heads removed together, on traces as they were written: doses, pairs and the greedy search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.config.heads import parse_head
from clifflab.report.blocks import Block, Drawing, Note, Table
from clifflab.report.figures import joint_curve
from clifflab.report.head_results import HeadsFound, finite
from clifflab.report.head_words import AT, PANEL, named, share_text
from clifflab.report.numbers import interval

_PAIRS = 5  # pairs of the table, for each place
_KINDS = {"suppression": "suppression", "promoting": "promoting"}


def joint_blocks(found: HeadsFound) -> list[Block]:
    """Doses, pairs and the greedy path; why there are none where nothing was removed together."""
    sets = found.sets
    if not sets:
        return []
    if sets.get("reason"):
        return [Note(f"No heads were removed together: {sets['reason']}.")]
    return [*_doses(found, sets["doses"]), *_pairs(sets), *_greedy(sets["greedy"])]


def _doses(found: HeadsFound, doses: Sequence[Mapping[str, Any]]) -> list[Block]:
    fractions = sorted({dose["fraction"] for dose in doses})
    at = {(dose["kind"], dose["fraction"]): dose for dose in doses}
    panels, rows = {}, []
    for positions in found.positions:
        lines = {
            kind: [at[kind, f]["effects"][positions]["log_odds"] if (kind, f) in at else None for f in fractions]
            for kind in _KINDS
        }
        tops = [at.get(("suppression", f)) for f in fractions]
        band = [top["effects"][positions].get("random") if top else None for top in tops]
        counts = [top["count"] if top else None for top in tops]
        where = PANEL.get(positions, positions)
        gap = finite(found.gap["mean"])
        if any(entry and entry["mean"] is not None for line in lines.values() for entry in line):
            panels[where] = joint_curve(lines, band, counts, fractions, f"removed at {where}", gap)
        rows += [_dose_row(dose, positions) for dose in doses]
    if not panels:
        return []
    see = (
        "The line of the suppression heads should leave the grey band, which is what random heads of the same layers "
        "do; where it reaches the dashed line, removal wins back all that the attack takes."
    )
    titles = ["removed", "at", "heads", "log-odds [95%]", "share of the gap", "random heads: mean [95% of draws]"]
    titles += ["draws below", "on benign prompts [95%]", "which heads"]
    caption = (
        "The first heads of the ranking removed together; attacked traces of the reporting half, thinking and closing "
        "tokens as they were. Suppression heads are the first of the ranking, promoting heads the last. Random "
        "heads: as many of each layer, none of them chosen. The effect on benign answered "
        "prompts is what the removal costs."
    )
    title = "The first heads removed together: change of the refusal log-odds"
    return [Drawing("joint", title, see, panels), Table(caption, titles, rows)]


def _dose_row(dose: Mapping[str, Any], positions: str) -> list[Any]:
    effect = dose["effects"][positions]
    band = effect.get("random") or {"mean": None}
    drawn = band["mean"] is not None
    return [
        f"{100 * dose['fraction']:g}% {_KINDS.get(dose['kind'], dose['kind'])}",
        PANEL.get(positions, positions),
        dose["count"],
        effect["log_odds"],
        share_text(effect["share_of_gap"]),
        interval(band) if drawn else None,
        share_text(effect.get("above_random")),
        effect["benign"],
        named([parse_head(name) for name in dose["heads"]]),
    ]


def _pairs(sets: Mapping[str, Any]) -> list[Block]:
    rows, tested = [], 0
    for positions, found in sets["pairs"].items():
        tested = max(tested, found["tested"])
        for pair in found["top"][:_PAIRS]:
            rows.append(_pair_row(pair, PANEL.get(positions, positions)))
    found = sets["greedy"].get("pair")
    if found:  # of a candidate and any head
        at = sets["greedy"]["positions"]
        rows.insert(0, _pair_row(found, f"{PANEL.get(at, at)}, any partner"))
    if not rows:
        return []
    caption = (
        f"Pairs of the {len(sets['candidates'])} candidates ({', '.join(sets['candidates'])}: the first by exact "
        f"effect, first-order estimate and direct contribution), {tested} tested at each place; those with the largest "
        "joint effect on the ranking half, described on the other half. Counts: the pair passes as a suppression head "
        "would, without correction for their number (any partner: the best pair when all heads are swept again behind "
        "each of the first candidates). Redundant: and does more than the sum of both by as much, which "
        "is what heads do that stand in for each other. Hidden: and neither counts alone, so that a sweep of single "
        "heads misses both."
    )
    titles = ["pair", "at", "together [95%]", "share of the gap", "first alone [95%]", "second alone [95%]"]
    return [Table(caption, [*titles, "beyond the sum [95%]", "verdict"], rows)]


def _pair_row(pair: Mapping[str, Any], at: str) -> list[Any]:
    said = [word for word in ("redundant", "hidden") if pair[word]]
    return [
        " and ".join(pair["heads"]),
        at,
        pair["log_odds"],
        share_text(pair["share_of_gap"]),
        *pair["alone"],
        pair["beyond_sum"],
        ", ".join(said) or ("counts" if pair["counts"] else "no"),
    ]


def _greedy(greedy: Mapping[str, Any]) -> list[Block]:
    rows = [
        [f"{place}. {step['added']}", step["ranking"], step["log_odds"], share_text(step["share_of_gap"])]
        for place, step in enumerate(greedy["steps"], start=1)
    ]
    if not rows:
        return []
    caption = (
        f"Greedy search, {AT.get(greedy['positions'], greedy['positions'])}: it begins with the best pair of one of "
        "the first candidates and any swept head, and each further step adds the head that raises the refusal log-odds "
        "of the ranking half most, until none does. "
        "Effects of all heads up to the step; those of the ranking half are flattered by the choice."
    )
    titles = ["head added", "ranking half [95%]", "reporting half [95%]", "share of the gap"]
    return [Table(caption, titles, rows)]
