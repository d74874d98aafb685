"""What the less-is-more curve says, in plain sentences: also where choosing by the method is no better than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.science.less import LOW_ASR, MOST_RISE, NOT_DECIDED, RANDOM

Figures = Mapping[str, Any]
_BETTER, _WORSE = "better", "worse"


def findings(figures: Figures, method: str) -> list[str]:
    """Sentences on a curve.

    Args:
        figures: Content of ``curve.json``: ``before``, ``attacked``, ``points``, ``against_random``, ``needed``,
            ``broken``, ``corpus``, ``cliff_cases``, ``seeds``, and ``guard`` (whether the study has one, which the
            curve does not ask: then the sentences name the judge).
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
        f"Before tuning, {success(figures)} is {percent(before['asr'])} on {listed(attacked)}{also}.",
        _corpus(figures),
        *_method(figures, method),
    ]
    for selector in dict.fromkeys(point["selector"] for point in figures["points"]):
        if selector not in (method, RANDOM):
            said += _other(figures, selector)
    return [sentence for sentence in [*said, enough(figures), *_broken(figures)] if sentence]


def success(figures: Figures) -> str:
    """What the curve calls attack success; with its judge where the study has another one."""
    return "attack success by the rule judge" if figures["guard"] else "attack success"


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
        f"Smallest budget with {success(figures)} below {100 * LOW_ASR:.0f}% and over-refusal up by less than "
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
    said, even, undecided = list[str](), list[int](), list[int]()
    for budget in figures["budgets"]:
        ours, theirs = points.get((method, budget)), points.get((RANDOM, budget)) if method != RANDOM else None
        if ours is None:
            continue
        text = f"At {budget:,} examples {method} brings {success(figures)} to {percent(ours['asr'])}"
        if theirs is not None:
            row = _compared(figures, method, budget, "asr")
            judged, over = row["verdict"], _compared(figures, method, budget, "over_refusal")["verdict"]
            text += f", {RANDOM} to {percent(theirs['asr'])}: {_word(judged)}"
            text += f", since {row['reason']}" if judged == NOT_DECIDED else ""
            if over in (_BETTER, _WORSE):
                text += (
                    f"; over-refusal is {percent(ours['over_refusal'])} against {percent(theirs['over_refusal'])}: "
                    f"{_word(over)}"
                )
            if judged == NOT_DECIDED:
                undecided.append(budget)
            elif judged != _BETTER:
                even.append(budget)
        said.append(f"{text}.")
    if method == RANDOM:
        return said
    compared = [budget for budget in figures["budgets"] if (method, budget) in points and (RANDOM, budget) in points]
    if even and even == [budget for budget in compared if budget not in undecided]:
        where = "at no budget tried here" if even == compared else "at no budget at which the two can be compared"
        said.append(f"In {success(figures)} choosing by {method} beats {RANDOM} choice {where}.")
    elif even:
        where = f"At {listed(even)} examples"
        said.append(f"{where} choosing by {method} does not beat {RANDOM} choice in {success(figures)}.")
    return said


def _other(figures: Figures, selector: str) -> list[str]:
    """Where another selector differs from random choice, and where that is not decided."""
    own = [row for row in figures["against_random"] if row["selector"] == selector]
    if not own:
        return []
    parts = []
    for measure, name in (("asr", "attack success"), ("over_refusal", "over-refusal")):
        for judged, less in ((_BETTER, "less"), (_WORSE, "more")):
            at = [row["budget"] for row in own if (row["measure"], row["verdict"]) == (measure, judged)]
            if at:
                parts.append(f"{less} {name} at {listed(at)} examples")
    asr = [row for row in own if row["measure"] == "asr"]
    undecided = [row for row in asr if row["verdict"] == NOT_DECIDED]
    if not parts and len(undecided) < len(asr):
        where = "at any other budget" if undecided else "at any budget"
        parts = [f"no difference {where}"]
    said = [f"Against {RANDOM} choice {selector} has {listed(parts)}."] if parts else []
    return said + [
        f"Whether {selector} beats {RANDOM} choice at {row['budget']:,} examples is not decided, since {row['reason']}."
        for row in undecided
    ]


def _broken(figures: Figures) -> list[str]:
    """Points whose answers are broken."""
    points = [f"{point['selector']} at {point['budget']:,}" for point in figures["broken"]]
    if not points:
        return []
    return [
        f"Unclosed or degenerate answers rose by {100 * MOST_RISE:.0f} points or more, so that low rates mean nothing: "
        f"{listed(points)} examples."
    ]


def _compared(figures: Figures, selector: str, budget: int, measure: str) -> Figures:
    """A comparison with random choice."""
    key = (selector, budget, measure)
    return next(r for r in figures["against_random"] if (r["selector"], r["budget"], r["measure"]) == key)


def _word(judged: str) -> str:
    return f"{judged} than {RANDOM}" if judged in (_BETTER, _WORSE) else judged
