"""What the less-is-more curve says, in plain sentences: also where choosing by the method is no better than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.science.less import LOW_ASR, MOST_RISE, RANDOM

Figures = Mapping[str, Any]
_BETTER, _WORSE, _SAME = "better", "worse", "no difference"


def findings(figures: Figures, method: str) -> list[str]:
    """Sentences on a curve.

    Args:
        figures: Content of ``curve.json``: ``before``, ``attacked``, ``points``, ``against_random``, ``needed``,
            ``broken``, ``corpus``, ``cliff_cases`` and ``seeds``.
        method: The selector that the others are told beside.
    """
    attacked = list(figures["attacked"])
    if not attacked:
        return [
            "No set of harmful prompts is complied with in at least half of the cases before tuning: there is no "
            "attack success to bring down.",
            *_broken(figures),
        ]
    before = figures["before"]["pooled"]
    refusal = before["over_refusal"]
    also = f"; over-refusal is {percent(refusal)}" if refusal["mean"] is not None else ""
    said = [
        f"Before tuning, attack success is {percent(before['asr'])} on {listed(attacked)}{also}.",
        _corpus(figures),
        *_method(figures, method),
    ]
    for selector in dict.fromkeys(point["selector"] for point in figures["points"]):
        if selector not in (method, RANDOM):
            said += _other(figures, selector)
    return [sentence for sentence in [*said, enough(figures), *_broken(figures)] if sentence]


def enough(figures: Figures) -> str:
    """The smallest budget that is enough, of each selector."""
    parts = []
    for entry in figures["needed"]:
        if entry["budget"] is None:
            parts.append(f"{entry['selector']} at none of these budgets")
        else:
            later = "" if entry["stays"] else " (and not at every larger one)"
            parts.append(f"{entry['selector']} at {entry['budget']:,} examples{later}")
    return (
        f"Smallest budget with attack success below {100 * LOW_ASR:.0f}% and over-refusal up by less than "
        f"{100 * MOST_RISE:.0f} points (means over {figures['seeds']} seeds): {'; '.join(parts)}."
    )


def percent(figure: Figures) -> str:
    """A share with its interval, in per cent."""
    if figure["mean"] is None:
        return "not defined"
    if figure["low"] is None:
        return f"{100 * figure['mean']:.0f}%"
    return f"{100 * figure['mean']:.0f}% [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def listed(names: Sequence[Any]) -> str:
    """Names with commas and a last ``and``."""
    texts = [f"{name:,}" if isinstance(name, int) else str(name) for name in names]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def _corpus(figures: Figures) -> str:
    size, cases = figures["corpus"], figures["cliff_cases"]
    if not size:
        return ""
    return f"Of {size:,} traces of the corpus {cases:,} ({100 * cases / size:.1f}%) are cliff cases."


def _method(figures: Figures, method: str) -> list[str]:
    """A sentence for every budget, and one on where the method was no better."""
    points = {(point["selector"], point["budget"]): point for point in figures["points"]}
    said, even = [], []
    for budget in figures["budgets"]:
        ours, theirs = points.get((method, budget)), points.get((RANDOM, budget))
        if ours is None:
            continue
        text = f"At {budget:,} examples {method} brings attack success to {percent(ours['asr'])}"
        if theirs is not None:
            judged = _verdict(figures, method, budget, "asr")
            text += f", {RANDOM} to {percent(theirs['asr'])}: {_word(judged)}"
            over = _verdict(figures, method, budget, "over_refusal")
            if over != _SAME:
                text += (
                    f"; over-refusal is {percent(ours['over_refusal'])} against {percent(theirs['over_refusal'])}: "
                    f"{_word(over)}"
                )
            if judged != _BETTER:
                even.append(budget)
        said.append(f"{text}.")
    compared = [budget for budget in figures["budgets"] if (method, budget) in points and (RANDOM, budget) in points]
    if even and even == compared:
        said.append(f"Choosing by {method} beats {RANDOM} choice at no budget tried here.")
    elif even:
        said.append(f"At {listed(even)} examples choosing by {method} does not beat {RANDOM} choice.")
    return said


def _other(figures: Figures, selector: str) -> list[str]:
    """Where another selector differs from random choice."""
    parts = []
    for measure, name in (("asr", "attack success"), ("over_refusal", "over-refusal")):
        for judged, less in ((_BETTER, "less"), (_WORSE, "more")):
            at = [
                row["budget"]
                for row in figures["against_random"]
                if (row["selector"], row["measure"], row["verdict"]) == (selector, measure, judged)
            ]
            if at:
                parts.append(f"{less} {name} at {listed(at)} examples")
    if not any(row["selector"] == selector for row in figures["against_random"]):
        return []
    return [f"Against {RANDOM} choice {selector} has {listed(parts) if parts else 'no difference at any budget'}."]


def _broken(figures: Figures) -> list[str]:
    """Points whose answers are broken."""
    points = [f"{point['selector']} at {point['budget']:,}" for point in figures["broken"]]
    if not points:
        return []
    return [
        f"Unclosed or degenerate answers rose by {100 * MOST_RISE:.0f} points or more, so that low rates mean nothing: "
        f"{listed(points)} examples."
    ]


def _verdict(figures: Figures, selector: str, budget: int, measure: str) -> str:
    key = (selector, budget, measure)
    rows = figures["against_random"]
    return next((r["verdict"] for r in rows if (r["selector"], r["budget"], r["measure"]) == key), _SAME)


def _word(judged: str) -> str:
    return judged if judged == _SAME else f"{judged} than {RANDOM}"
