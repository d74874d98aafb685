"""The section on a model beside the one that it was made from: attacks, costs, and the cliff, before and after."""

from __future__ import annotations

from typing import Any

from clifflab.report.blocks import Block, Drawing, Note, Section, Table
from clifflab.report.cliff_after import cliff_blocks
from clifflab.report.figures import before_after
from clifflab.report.numbers import interval, percent
from clifflab.report.repair_results import EvaluationFound
from clifflab.report.results import ModelResults
from clifflab.science.judges import OUTCOMES

TITLE = "Before and after"
_WHEN = ("before", "after")
_WHAT = {"asr": "attack success", "over_refusal": "over-refusal", "degenerate": "degenerate", "unclosed": "unclosed"}
_PANELS = ("asr", "over_refusal", "degenerate", "unclosed")


def before_after_section(results: ModelResults) -> Section | None:
    """What the change of the model bought, and what it cost."""
    found = results.evaluation
    if found is None:
        return None
    before = results.spec.before or str(found.about.get("before"))
    if found.reason:
        return Section("before-after", TITLE, [Note(f"It was not compared with {before}: {found.reason}.")])
    blocks: list[Block] = [
        Note(_summary(found, before)),
        *_drawing(found),
        *_attack_table(found),
        *_refusal_table(found),
        *_ability_table(found),
        *_transition_tables(found),
        *cliff_blocks(found, results, before),
        *_length_table(found),
        Note("What this shows, and what it does not.", _limits(found, results, before)),
        *_missing(found),
    ]
    return Section("before-after", TITLE, blocks)


def _summary(found: EvaluationFound, before: str) -> str:
    judged = "the guard calls harmful" if found.by_guard else "comply (judged by rules, on the response alone)"
    samples = found.about["samples"]
    drawn = f"{samples:,} samples of each prompt" if samples > 1 else "one sample of each prompt"
    return (
        f"Both models answered the same prompts, {drawn}; {before} is before, this model is after. Attack success is "
        f"the share of harmful prompts whose answers {judged}. Changes are paired: they are taken within prompts, so "
        "that their intervals are shorter than those of the two rates suggest. A model that is broken looks safe: read "
        "attack success together with over-refusal, unclosed and degenerate answers, perplexity and the questions."
    )


def _drawing(found: EvaluationFound) -> list[Block]:
    panels = {}
    for measure in _PANELS:
        rows = {entry.title: [entry.at(measure, when) for when in _WHEN] for entry in found.of(measure)}
        shown = measure in ("asr", "over_refusal") or any((e[1].get("mean") or 0) >= 0.005 for e in rows.values())
        if rows and shown:
            panels[_WHAT[measure]] = before_after(rows, _WHEN, f"share {_SHARE[measure]}", _WHAT[measure])
    if not panels:
        return []
    see = (
        "A repair moves attack success to the left and leaves the other panels where they were. Bars are 95% intervals."
    )
    absent = [_WHAT[m] for m in ("degenerate", "unclosed") if _WHAT[m] not in panels]
    if absent:
        see += f" No set has half a per cent of {' or '.join(absent)} answers afterwards; a table has them."
    return [Drawing("before-after", "Rates before and after", see, panels)]


_SHARE = {
    "asr": "of harmful prompts, attack succeeds",
    "over_refusal": "of benign prompts, refused",
    "degenerate": "of prompts, degenerate answer",
    "unclosed": "of prompts, thinking never ends",
}


def _attack_table(found: EvaluationFound) -> list[Block]:
    """Attack success with what a broken model would hide; pools of sets at the end."""
    costly = found.costliest
    over = costly.at("over_refusal", "after") if costly else None
    rows = [
        [
            entry.title, *(entry.at("asr", when) for when in (*_WHEN, "change")), entry.at("degenerate", "after"),
            entry.at("unclosed", "after"), over, found.ratio, entry.prompts,
        ]
        for entry in found.of("asr")
    ]  # fmt: skip
    if not rows:
        return []
    head = ["set", "attack success before [95%]", "after [95%]", "change, paired [95%]", "degenerate after [95%]"]
    head += ["unclosed after [95%]", "benign over-refusal after [95%]", "perplexity ratio [95%]", "prompts"]
    caption = "Attack success before and after, never without what a broken model would hide."
    if costly:
        caption += (
            f" Over-refusal is that of {costly.name}, the benign set with most of it afterwards; it and the perplexity "
            "belong to the model, whatever the attacked set."
        )
    if found.pools:
        caption += f" {_pools(found)}"
    return [Table(caption, head, rows)]


def _pools(found: EvaluationFound) -> str:
    """Which sets a pool joins."""
    told = "; ".join(f"{pool.name}: {', '.join(pool.sets)}" for pool in found.pools)
    return f"Pools are sets that the study names together ({told})."


def _refusal_table(found: EvaluationFound) -> list[Block]:
    """Over-refusal, and what is broken in any set."""
    over = [
        [entry.title, *(entry.at("over_refusal", when) for when in (*_WHEN, "change")), entry.prompts]
        for entry in found.of("over_refusal")
    ]
    broken = [
        [entry.name, *(entry.at(m, when) for m in ("degenerate", "unclosed") for when in _WHEN), entry.prompts]
        for entry in found.sets
    ]
    head = ["set", "over-refusal before [95%]", "after [95%]", "change, paired [95%]", "prompts"]
    titles = ["set", "degenerate before [95%]", "after [95%]", "unclosed before [95%]", "after [95%]"]
    titles.append("prompts")
    caption = "Answers that are no answers: empty or looping ones, and thinking that never ended. All samples."
    blocks: list[Block] = [Table("Benign prompts that are refused: what a repair costs.", head, over)] if over else []
    return [*blocks, Table(caption, titles, broken)]


def _ability_table(found: EvaluationFound) -> list[Block]:
    """Benign perplexity, and multiple choice by likelihood."""
    rows: list[list[Any]] = []
    perplexity = found.perplexity
    if found.ratio:
        about = f"{perplexity['tokens']:,} tokens" if perplexity.get("tokens") else None
        ratio = f"times {interval(found.ratio, 3)}"
        rows.append(["benign perplexity", about, perplexity["before"], perplexity["after"], ratio])
    for name, entry in found.choices.items():
        left_out = sum((entry.get("rejected") or {}).values())
        asked = f"{entry['questions']:,} questions" + (f" ({left_out:,} left out)" if left_out else "")
        rows.append([f"right answers: {name}", asked, entry["before"], entry["after"], entry["change"]])
    if not rows:
        return []
    caption = (
        "What else may have been lost. Perplexity per token of benign answered traces as the model before wrote them: "
        "at a ratio of 1 they are as likely as before. Right answers: share of multiple-choice questions whose right "
        "choice is the likeliest, with the paired change."
    )
    return [Table(caption, ["measure", "over", "before [95%]", "after [95%]", "change [95%]"], rows, digits=3)]


def _transition_tables(found: EvaluationFound) -> list[Block]:
    """What became of the traces of each outcome."""
    blocks: list[Block] = []
    for label in ("harmful", "benign"):
        counts = found.transitions(label)
        seen = [o for o in OUTCOMES if any(o in pair for pair in counts)]
        rows = [[o, *(counts[o, after] for after in seen)] for o in seen if any(counts[o, a] for a in seen)]
        if rows:
            caption = f"Traces of {label} prompts by outcome before (rows) and after (columns); counts of all samples."
            blocks.append(Table(caption, ["before", *(f"after: {o}" for o in seen)], rows))
    return blocks


def _length_table(found: EvaluationFound) -> list[Block]:
    lengths = found.about.get("thinking_tokens") or {}
    rows = [[name, *(entry.get(when) for when in (*_WHEN, "change"))] for name, entry in lengths.items()]
    rows = [row for row in rows if any((entry or {}).get("mean") is not None for entry in row[1:])]
    if not rows:
        return []
    caption = (
        "Mean length of the thinking, in tokens: a repair by keep-thinking should leave it as it was. Unclosed "
        "thinking counts with what was written of it."
    )
    return [Table(caption, ["set", "before [95%]", "after [95%]", "change, paired [95%]"], rows, digits=1)]


def _limits(found: EvaluationFound, results: ModelResults, before: str) -> list[str]:
    """What a reader may not conclude."""
    items = [
        f"One model {'tuned once' if results.spec.adapter else 'as it is'}, with one seed: the intervals cover the "
        "choice of prompts, not another choice of examples, another order or another start.",
        "Harm is judged by a guard model, which can be wrong in both directions."
        if found.by_guard
        else "Harm is judged by rules that look for refusals. A model that learnt to refuse says what such rules look "
        "for, and an answer that refuses and then helps would count as refused.",
        "Attacks that were not measured may work as before or better, and nobody attacked this model knowing how it "
        "was made.",
    ]
    if results.spec.repairs:
        items += _training(results, found)
    items.append(
        f"The old probe was fitted to {before}: what it says of another model's states is a comparison, no proof. A "
        "probe of this model has few complied harmful traces to look at where attacks fail."
    )
    return items


def _shared(found: EvaluationFound) -> list[str]:
    """How many prompts ask for what a training example asks for, and attack success on the others."""
    items = []
    for kind in ("sets", "pools"):
        for name, entry in found.about.get(kind, {}).items():
            if entry.get("shared_prompts"):
                fresh = entry["fresh"] and entry["fresh"]["rates"].get("asr", {}).get("after")
                others = (
                    f"; attack success on the others {percent(fresh)}" if fresh and fresh["mean"] is not None else ""
                )
                items.append(f"{entry['shared_prompts']} of {entry['prompts']} in {name}{others}")
    if not items:
        return ["No evaluated prompt shares its base request with a training example."]
    return [
        f"Prompts whose base request a training example shares, in other words or another wrapper: {'; '.join(items)}."
    ]


def _training(results: ModelResults, found: EvaluationFound) -> list[str]:
    """What the training examples have in common with what was measured."""
    repair, settings = results.repair_of_before, results.study.repair
    items = []
    if repair and repair.rows:
        items.append(
            f"Its harmful examples are of these kinds: {', '.join(repair.attacks)}. An evaluated set of the same kind "
            "of attack is seen, though its prompts are not: only other kinds show what carries over. Which those are, "
            "the study says by its sets and pools."
        )
        items += _shared(found)
    if settings.targets.kind == "keep-thinking":
        items.append(
            "It learnt refusals behind its own thinking, so that a lower rate says that the end of the thinking was "
            "repaired, and not that it thinks better."
        )
    return items


def _missing(found: EvaluationFound) -> list[Block]:
    left_out = [f"{name}: {reason}" for name, reason in (found.about.get("left_out") or {}).items()]
    for entry in found.sets:
        counts = entry.unreadable
        if any(counts.values()):
            told = " and ".join(f"{count:,} {when}" for when, count in counts.items())
            left_out.append(f"{entry.name}: {told} of the guard's answers could not be read")
    reasons = [*left_out, *found.missing()]
    return [Note("Not measured, or left out:", reasons)] if reasons else []
