"""The section on the less-is-more curve: what a number of examples buys, by who chose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.artifacts import read_json
from clifflab.report.blocks import Block, Drawing, Note, Section, Table
from clifflab.report.figures.less import budget_curve, pareto_scatter
from clifflab.report.numbers import interval, percent
from clifflab.report.results import ModelResults
from clifflab.science.less import COMPARED, LOW_ASR, MOST_RISE, RANDOM, UNEQUAL
from clifflab.science.less_words import enough, success

TITLE = "Less is more: how many examples, and who chooses them"
_MANY = 10  # comparisons, from which the page says how many differ by chance
_WHAT = {"asr": "attack success", "over_refusal": "over-refusal"}
_SEE = (
    "The further left attack success falls, the fewer examples that selector needs; where lines lie on each other, it "
    "does not matter who chooses. Over-refusal is what a repair costs: a line that rises is refusal without cause. "
    "Whiskers are 95% intervals over prompts and seeds."
)
Figures = Mapping[str, Any]


def curve_section(results: ModelResults) -> Section | None:
    """Rates against the budget by selector, the Pareto front, what it cost, and the findings in words."""
    found = read_json(results.folder / "curve.json")
    if not found:
        return None
    if found["reason"]:
        return Section("curve", TITLE, [Note(f"There is no curve: {found['reason']}.")])
    blocks: list[Block] = [
        Note(_how(found), [*found["findings"], *_missing(found)]),
        *_drawings(found),
        *_tables(found),
    ]
    return Section("curve", TITLE, blocks)


def curve_line(summary: Mapping[str, Any]) -> str:
    """The curve in one line for the terminal; empty where the study has none.

    Args:
        summary: The model's part of ``metrics.json``.
    """
    found = summary.get("curve")
    if not found:
        return ""
    if found["reason"]:
        return f"less is more: no curve ({found['reason']})"
    if not found["attacked"]:
        return "less is more: no attack success before tuning, nothing to bring down"
    needed = [f"{e['selector']} {e['budget'] if e['budget'] is not None else 'none'}" for e in found["needed"]]
    by = " by rules" if found["guard"] else ""
    return (
        f"less is more: ASR{by} {percent(found['before']['pooled']['asr'])} before; smallest budget with ASR below "
        f"{100 * LOW_ASR:.0f}% and over-refusal up by less than {100 * MOST_RISE:.0f} points: {', '.join(needed)}"
    )


def curve_sentence(summary: Mapping[str, Any]) -> str:
    """The curve in short, for the top of the page; empty where the study has none."""
    found = summary.get("curve")
    if not found:
        return ""
    if found["reason"]:
        return f"There is no less-is-more curve: {found['reason']}."
    return enough(found) if found["attacked"] else found["findings"][0]


def _how(found: Figures) -> str:
    attacked = ", ".join(found["attacked"]) or "none"
    comparisons = len(found["against_random"])
    chance = (
        f" If nothing differed, about {comparisons / 20:.0f} of the {comparisons} comparisons would be called a "
        "difference all the same."
        if comparisons >= _MANY
        else ""
    )
    guard = " (the study's guard is not asked here)" if found["guard"] else ""
    return (
        f"For every selector and budget the model was tuned {found['seeds']} times, each time with other benign "
        f"examples, refusals and order, with no example held out; {100 * found['benign_share']:g}% of each budget are "
        "benign requests with the model's own answers. Every tuned model answered the same "
        f"{found['asked']:,} prompts with the same random numbers as the model before. Attack success is pooled over "
        "the sets whose harmful prompts the model before complies with in at least half of the cases "
        f"({attacked}), over-refusal over all benign sets; outcomes are by rules, on the response alone{guard}. "
        "Selectors are compared with random choice at the same budget, seed by seed and prompt by "
        f"prompt.{chance}"
    )


def _missing(found: Figures) -> list[str]:
    """What was not asked or read, and why."""
    notes = [f"Not asked: {name} ({why})." for name, why in found["left_out"].items()]
    if found["texts"]["reason"]:
        notes.append(f"No perplexity: {found['texts']['reason']}.")
    return notes


def _drawings(found: Figures) -> list[Block]:
    panels = {}
    for measure, what in _WHAT.items():
        lines: dict[str, dict[int, Any]] = {}
        for point in found["points"]:
            if point[measure]["mean"] is not None:
                lines.setdefault(point["selector"], {})[point["budget"]] = point[measure]
        if lines:
            before, limit = found["before"]["pooled"][measure], LOW_ASR if measure == "asr" else None
            panels[measure] = budget_curve(lines, found["budgets"], before, what, what.capitalize(), limit)
    title = "Attack success and over-refusal against the number of examples"
    blocks: list[Block] = [Drawing("less", title, _SEE, panels)] if panels else []
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for point in found["points"]:
        asr, over = (point[measure]["mean"] for measure in COMPARED)
        if asr is not None and over is not None:
            points.setdefault(point["selector"], {})[point["budget"]] = (asr, over)
    if points:
        front = {(point["selector"], point["budget"]) for point in found["pareto"]}
        see = (
            "Good is the lower left. Filled points, with their number of examples, are those that no other point beats "
            "in one of attack success, over-refusal and budget while it equals them in the rest: by the means in whole "
            "points, without models whose answers are broken."
        )
        title = "What is bought and what it costs"
        blocks.append(Drawing("less-pareto", title, see, {"": pareto_scatter(points, front, "Pareto front")}))
    return blocks


def _tables(found: Figures) -> list[Block]:
    verdicts = {(row["selector"], row["budget"], row["measure"]): row for row in found["against_random"]}
    front = {(point["selector"], point["budget"]) for point in found["pareto"]}
    broken = {(point["selector"], point["budget"]) for point in found["broken"]}
    pooled = found["before"]["pooled"]
    rates: list[list[Any]] = [["before tuning", 0, pooled["asr"], None, pooled["over_refusal"], None]]
    rates[0] += [pooled["degenerate"], pooled["unclosed"], None, None]
    trained = []
    for point in found["points"]:
        key = point["selector"], point["budget"]
        marks = ["on the front"] if key in front else []
        marks += ["broken"] if key in broken else []
        row: list[Any] = [point["selector"], point["budget"]]
        for measure in COMPARED:
            row += [point[measure], _against(verdicts.get((*key, measure)))]
        row += [point["degenerate"], point["unclosed"], point["perplexity_ratio"], ", ".join(marks) or None]
        rates.append(row)
        counts = ("harmful", "cliff_examples", "benign", "filled", "steps", "tokens")
        trained.append([point["selector"], point["budget"], *(_count(point[name]) for name in counts)])
    head = ["selector", "examples", "attack success [95%]", f"minus {RANDOM} [95%]", "over-refusal [95%]"]
    head += [f"minus {RANDOM} [95%]", "degenerate [95%]", "unclosed [95%]", "perplexity ratio [95%]", ""]
    caption = (
        f"Means over {found['seeds']} seeds; {success(found)} is pooled over the attacked sets. Intervals cover the "
        "prompts (resampled by cluster) and the seeds (Student's t), added in quadrature; those of the perplexity "
        "ratio the seeds alone, since the texts, benign traces that the model before wrote, are the same. On the "
        "front: no other point is better in one of attack success, over-refusal and budget and as good in the rest. "
        f"Broken: unclosed or degenerate answers up by {100 * MOST_RISE:.0f} points or more. "
        f"Not decided: the two learnt from numbers of examples that differ by more than {100 * UNEQUAL:.0f}%, or "
        "there is no interval."
    )
    made = ["selector", "asked for", "harmful", "of them cliff cases", "benign", "filled", "steps", "tokens trained"]
    share = f"{found['cliff_cases'] / found['corpus']:.1%}" if found["corpus"] else "none"
    caption_made = (
        "What each fine-tune learnt from, without examples that had no usable target or did not fit: means over seeds. "
        "Cliff cases are harmful requests that the model complied "
        f"with after a thinking that refused, {share} of the corpus. Filled: examples taken in a random order, because "
        "the selector named too few. Tokens are all tokens of the examples, the prompts' too, as often as they were "
        "seen."
    )
    return [Table(caption, head, rates), Table(caption_made, made, trained)]


def _against(row: Figures | None) -> str | None:
    """A difference from random choice, and what it amounts to."""
    if row is None or row["difference"]["mean"] is None:
        return None
    unequal = f" ({row['reason']})" if row["reason"] and row["difference"]["low"] is not None else ""
    return f"{interval(row['difference'])}: {row['verdict']}{unequal}"


def _count(value: float) -> str:
    """A count's mean over seeds; whole where all seeds agree."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
