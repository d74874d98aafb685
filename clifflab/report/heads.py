"""The section on the heads that hold the refusal back: which they are, and how that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.report.blocks import Block, Drawing, Note, Section, Table
from clifflab.report.head_methods import method_blocks
from clifflab.report.head_results import EXACT, Head, HeadsFound, finite, head_name
from clifflab.report.head_words import AT, METHOD, PANEL, capital, drawn_map, listed, named, q_text, share_text, signed
from clifflab.report.joint_heads import joint_blocks
from clifflab.report.numbers import interval
from clifflab.report.results import ModelResults

TITLE = "Which heads hold the refusal back"
SHOWN = 15  # heads of the ranked table
_ROLE = {
    "attacked_ranking": "attacked, ranking half",
    "attacked_reporting": "attacked, reporting half",
    "plain_reporting": "refused",
    "benign_reporting": "benign and answered",
}
_SETS = ("attacked_sets", "plain_sets")


def heads_section(results: ModelResults) -> Section | None:
    """What removing each head does, one at a time and together."""
    found = results.heads
    if found is None or found.reason or not found.rows:
        return None
    blocks: list[Block] = [
        Note(_summary(found), _marks(found)),
        *_effect_maps(found),
        _ranked_table(found),
        *joint_blocks(found),
        *method_blocks(found, shown_heads(found)),
        Note("How the effects were measured.", _method_notes(found)),
    ]
    return Section("heads", TITLE, blocks)


def _summary(found: HeadsFound) -> str:
    """In a paragraph: what was asked of each head, and which passed."""
    about = found.about
    asked = {
        EXACT: f"Each head was {_changed(about)} by itself",
        "attribution": f"What changes when a head is {_changed(about)} was estimated to first order",
        "direct": "What each head writes on the probe's direction was read off",
    }[found.ranked_by]
    limit = about["threshold"]
    rule = (
        f"{asked}, on traces of attacked prompts. What counts is the refusal log-odds at the final "
        "position: first tokens of the model's refusals over those of its compliances. A suppression head is one "
        "whose removal raises them on groups of prompts that had no part in the ranking, by at least "
        f"{100 * limit['share']:g}% of the gap between plain and attacked prompts ({interval(found.gap)}) and with a "
        f"q-value below {limit['q']:g}."
    )
    verdicts = []
    for positions in found.positions:
        where, reason = AT.get(positions, positions), found.no_verdict(positions)
        heads = found.suppression(positions)
        if heads or not reason:
            verdicts.append(f"{where} {len(heads):,} of {found.total:,} heads pass: {named(heads) or 'none'}")
        else:
            verdicts.append(f"{where} none can pass: {reason}")
    return f"{rule} {capital('; '.join(verdicts))}."


def _marks(found: HeadsFound) -> list[str]:
    """Which mark is which, and what the ground truth says."""
    marks = ["Ring: a suppression head, found by the study."]
    if found.planted is None:
        return marks
    if found.planted.problem:
        return [*marks, f"No head is framed: {found.planted.problem}."]
    if not found.planted.heads:
        return [*marks, "No head is framed: the model's ground truth says that none was planted."]
    return [
        *marks,
        f"Green frame: a planted head by the model's own ground truth ({listed(sorted(found.planted.heads))}). Only "
        "this page reads it; no ranking, effect or removal knows of it.",
    ]


def _effect_maps(found: HeadsFound) -> list[Block]:
    """Exact effects, or where there are none the estimates that rank."""
    column, sign = ("effect_logit", -1.0) if found.ranked_by == "direct" else ("effect_log_odds", 1.0)
    panels = {
        PANEL.get(p, p): drawn_map(found, found.ranked_by, p, column, sign)
        for p in found.positions
        if found.has(found.ranked_by, p, column)
    }
    if not panels:
        return []
    what = METHOD[found.ranked_by]
    see = (
        "Red: without this head the model refuses more. Blue: it refuses less. A model whose refusal is held back by "
        "few heads shows few red cells on a pale ground; each panel has its own scale."
    )
    return [Drawing("heads", f"Every head by its {what}", see, panels)]


def shown_heads(found: HeadsFound) -> list[Head]:
    """The heads of the tables: the first by rank, and the planted ones below them."""
    order = found.ranking(found.ranked_by, found.positions[0])
    planted = found.planted.heads if found.planted else frozenset()
    return order[:SHOWN] + [head for head in order[SHOWN:] if head in planted]


def _ranked_table(found: HeadsFound) -> Table:
    first, method, heads = found.positions[0], found.ranked_by, shown_heads(found)
    planted = found.planted.heads if found.planted else frozenset()
    known = bool(found.planted and not found.planted.problem)
    unit = "probe logit" if method == "direct" else "log-odds"
    titles = ["head", "rank", *(f"{unit}, {PANEL.get(p, p)} [95%]" for p in found.positions)]
    titles += ["share of the gap", "q", "suppression", *(["planted"] if known else [])]
    titles += ["on benign prompts [95%]", "on refused prompts"]
    passed, top = set(found.suppression(first)), found.top(first)
    rows = []
    for name in heads:
        own = found.row(method, first, name) or {}
        cells: list[Any] = [head_name(name), own["rank"]]
        cells += [_effect(found.row(method, p, name) or {}, method) for p in found.positions]
        cells += [share_text(own["share_of_gap"]), q_text(own["q"]), "yes" if name in passed else "no"]
        cells += ["yes" if name in planted else "no"] if known else []
        rows.append([*cells, *_controls(own, top.get(name))])
    below = ", and the planted heads below them" if len(heads) > SHOWN else ""
    caption = (
        f"The {min(SHOWN, len(heads))} first heads by {METHOD[method]} on the ranking half of the groups{below}. "
        "Effects are means over the attacked traces of the other half, with paired t intervals over groups; q is the "
        "share of false discoveries among heads at least as clear (Benjamini and Hochberg); share of the gap, q and "
        f"verdict are those {AT.get(first, first)}. The last columns, on benign answered and on plain refused prompts, "
        "decide nothing. A dash: not defined, or not looked at."
    )
    return Table(caption, titles, rows)


def _controls(own: Mapping[str, Any], top: Mapping[str, Any] | None) -> list[Any]:
    """The effect on benign prompts, with its interval for heads of the top list, and on plain refused prompts."""
    benign, plain = finite(own["benign_log_odds"]), finite(own["plain_log_odds"])
    entry = {"mean": benign, "low": top["benign_low"], "high": top["benign_high"]} if top else signed(benign)
    return [entry, signed(plain)]


def _effect(row: Mapping[str, Any], method: str) -> dict[str, Any] | None:
    """A row's effect with its interval."""
    mean = finite(row.get("effect_logit" if method == "direct" else "effect_log_odds"))
    low, high = finite(row.get("low")), finite(row.get("high"))
    return None if mean is None else {"mean": mean, "low": low, "high": high, "reason": "too few groups"}


def _method_notes(found: HeadsFound) -> list[str]:
    about, traces = found.about, found.about["traces"]
    attacked = {
        "complied": "harmful prompts that were complied with",
        "harmful": "harmful prompts of any outcome, since too few were complied with",
    }.get(traces["attacked_are"], traces["attacked_are"])
    of_sets = {key: f" of the sets {', '.join(names)}" if (names := traces.get(key)) else "" for key in _SETS}
    plain = "harmful prompts that were refused" + (of_sets["plain_sets"] or ", wrapped ones among them")
    counts = {
        name: f"{traces[name]['traces']:,} traces of {traces[name]['clusters']:,} groups" if name in traces else "none"
        for name in _ROLE
    }
    levels = {name: entry for name, entry in about["log_odds"].items() if entry["mean"] is not None}
    notes = [
        f"Attacked traces are {attacked}{of_sets['attacked_sets']}: {counts['attacked_ranking']} rank the heads, "
        f"{counts['attacked_reporting']} give the effects that are shown ({traces['complied']['ranking']:,} "
        f"and {traces['complied']['reporting']:,} of them were complied with).",
        f"For comparison: {counts['plain_reporting']}, {plain}; "
        f"{counts['benign_reporting']}, benign prompts that were answered.",
        "Refusal log-odds of the unchanged model: "
        + "; ".join(f"{_ROLE.get(name, name)} {interval(entry)}" for name, entry in levels.items())
        + ".",
        f"Looked at: {about['looked_at']:,} of {found.total:,} heads; swept exactly: {about['swept']:,}. The probe is "
        f"the all-position one at layer {about['probe']['layer']}.",
    ]
    if about["no_direct"]:
        notes.append(f"No direct contributions: {about['no_direct']}.")
    for kind, name in (("refusal", "refusals"), ("compliance", "compliances")):
        tokens = ", ".join(repr(token["text"]) for token in about["openings"].get(kind, [])) or "none"
        notes.append(f"First tokens of {name}, those that open both kinds left out: {tokens}.")
    return notes


def _changed(about: Mapping[str, Any]) -> str:
    """What was done to a head, in a word or three."""
    kept = ", each token's norm kept" if about["renormalise"] else ""
    if about["replace"] == "mean":
        return f"replaced by its mean over benign answered traces{kept}"
    return f"scaled by {about['gamma']:g}{kept}" if about["gamma"] else f"removed{kept}"
