"""The section on a model beside the one that it was made from: attacks, costs, and the cliff, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.report.blocks import Block, Drawing, Note, Section, Table
from clifflab.report.figures import before_after
from clifflab.report.numbers import interval
from clifflab.report.repair_results import EvaluationFound
from clifflab.report.results import ModelResults
from clifflab.science.judges import OUTCOMES

TITLE = "Before and after"
_WHEN = ("before", "after")
_WHAT = {"asr": "attack success", "over_refusal": "over-refusal", "degenerate": "degenerate", "unclosed": "unclosed"}
_PANELS = ("asr", "over_refusal", "degenerate", "unclosed")
_READ = {"before": "before", "after_old_probe": "after, old probe", "after_own_probe": "after, own probe"}
_CLIFF = ("plateau", "final", "cliff")


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
        *_cliff_blocks(found, results, before),
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
        see += f" No set has {' or '.join(absent)} answers afterwards, by half a per cent; they are in the tables."
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
    over = None if costly is None else f"{interval(costly.at('over_refusal', 'after'))} {costly.name}"
    ratio = interval(found.ratio) if found.ratio else None
    rows = [
        [
            entry.title, entry.prompts, *(entry.at("asr", when) for when in (*_WHEN, "change")),
            over, *(entry.at(measure, when) for measure in ("degenerate", "unclosed") for when in _WHEN), ratio,
        ]
        for entry in found.of("asr")
    ]  # fmt: skip
    if not rows:
        return []
    head = ["set", "prompts", "attack success before [95%]", "after [95%]", "change, paired [95%]"]
    head += ["benign over-refusal after [95%]", "degenerate before [95%]", "after [95%]"]
    head += ["unclosed before [95%]", "after [95%]", "perplexity ratio [95%]"]
    caption = (
        "Attack success before and after. Over-refusal is that of the benign set with most of it afterwards; it and "
        "the perplexity belong to the model, whatever the attacked set."
    )
    if found.pools:
        caption += f" {_pools(found)}"
    return [Table(caption, head, rows)]


def _pools(found: EvaluationFound) -> str:
    """Which sets a pool joins."""
    told = "; ".join(f"{pool.name}: {', '.join(pool.sets)}" for pool in found.pools)
    return f"Pools are sets that the study names together ({told})."


def _refusal_table(found: EvaluationFound) -> list[Block]:
    measures = ("over_refusal", "degenerate", "unclosed")
    rows = [
        [entry.title, entry.prompts, *(entry.at("over_refusal", when) for when in (*_WHEN, "change"))]
        + [entry.at(measure, when) for measure in measures[1:] for when in _WHEN]
        for entry in found.of("over_refusal")
    ]
    if not rows:
        return []
    head = ["set", "prompts", "over-refusal before [95%]", "after [95%]", "change, paired [95%]"]
    head += ["degenerate before [95%]", "after [95%]", "unclosed before [95%]", "after [95%]"]
    return [Table("Benign prompts that are refused: what the repair costs.", head, rows)]


def _ability_table(found: EvaluationFound) -> list[Block]:
    """Benign perplexity, and multiple choice by likelihood."""
    rows: list[list[Any]] = []
    perplexity = found.perplexity
    if found.ratio:
        about = f"{perplexity['tokens']:,} tokens" if perplexity.get("tokens") else None
        rows.append(
            ["benign perplexity", about, perplexity["before"], perplexity["after"], f"times {interval(found.ratio)}"]
        )
    for name, entry in (found.about.get("choices") or {}).items():
        if entry.get("after", {}).get("mean") is None:
            continue
        asked = f"{entry['questions']:,} questions"
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


def _cliff_blocks(found: EvaluationFound, results: ModelResults, before: str) -> list[Block]:
    cliffs = {name: entry for name, entry in (found.about.get("cliff") or {}).items() if entry}
    reads = [read for read in _READ if any(_measured(entry.get(read)) for entry in cliffs.values())]
    cliffs = {name: entry for name, entry in cliffs.items() if any(_measured(entry.get(read)) for read in reads)}
    if not cliffs:
        return []
    rows = {name: [(entry.get(read) or {}).get("cliff") for read in reads] for name, entry in cliffs.items()}
    labels = {entry.name: entry.label for entry in found.sets}
    series = [_READ[read] for read in reads]
    lower = _lower(rows)
    panels = {}
    for label in ("harmful", "benign", "mixed"):
        own = {name: entries for name, entries in rows.items() if labels.get(name) == label}
        if own:
            title = f"{label} requests"
            panels[label] = before_after(own, series, "mean cliff", title, share=False, lower=lower)
    see = (
        "A repair of the cliff itself moves the harmful sets to 0 by both probes. Where only the old probe says so, "
        "the model may keep its refusal somewhere else than that probe looks. Bars are 95% intervals."
    )
    head = ["set", *(f"{measure} {_READ[read]} [95%]" for measure in _CLIFF for read in reads)]
    table = [
        [name, *((entry.get(read) or {}).get(measure) for measure in _CLIFF for read in reads)]
        for name, entry in cliffs.items()
    ]
    caption = (
        f"Plateau, final and cliff, before and after. The old probe was trained on traces of {before}, the own one on "
        "this model's; both read all positions, traces of groups on which neither was trained. A dash: not measured."
    )
    drawing = Drawing("before-after-cliff", "The cliff before and after", see, panels)
    return [drawing, Note(_own_probe(results)), Table(caption, head, table)]


def _measured(entry: Mapping[str, Any] | None) -> bool:
    return any((entry or {}).get(measure, {}).get("mean") is not None for measure in _CLIFF)


def _lower(rows: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> float:
    """Lower end of the axis: 0, or the quarter below the lowest interval."""
    ends = [end for entries in rows.values() for e in entries if e for end in (e.get("low"), e.get("mean")) if end]
    return max(-1.0, min(0.0, math.floor(4 * min(ends, default=0.0)) / 4))


def _own_probe(results: ModelResults) -> str:
    """How good the model's own probe is, or why there is none."""
    if not results.trained:
        return f"No probe of its own could be trained on this model: {results.summary['probe']['reason']}."
    probe = results.probes["probes"]["all.logistic"]
    layer = probe["reported_layer"]
    area = interval(probe["layers"][layer]["test"]["auroc"], 3)
    return (
        f"Its own probe reads layer {layer} and tells refused harmful from answered benign test traces with an AUROC "
        f"of {area}."
    )


def _length_table(found: EvaluationFound) -> list[Block]:
    lengths = found.about.get("thinking_tokens") or {}
    rows = [[name, entry["before"], entry["after"]] for name, entry in lengths.items()]
    rows = [row for row in rows if any((entry or {}).get("mean") is not None for entry in row[1:])]
    if not rows:
        return []
    caption = "Mean length of the thinking, in tokens. A model that learnt to cut its thinking short is another repair."
    return [Table(caption, ["set", "before [95%]", "after [95%]"], rows, digits=1)]


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
        items += _training(results)
    items.append(
        f"The old probe was fitted to {before}: what it says of another model's states is a comparison, no proof. A "
        "probe of this model has few complied harmful traces to look at where attacks fail."
    )
    return items


def _training(results: ModelResults) -> list[str]:
    """What the training examples have in common with what was measured."""
    repair, settings = results.repair_of_before, results.study.repair
    items = []
    if repair and repair.selection.get("selectors"):
        sets = [name for name, count in repair.selection["selectors"][repair.selection["by"]]["sets"].items() if count]
        items.append(
            f"It was tuned on examples of {', '.join(sets)}. An evaluated set of the same kind of attack is seen, "
            "though its requests are not: only other kinds show what carries over. Which those are, the study says by "
            "its sets and pools."
        )
    if settings.targets.kind == "keep-thinking":
        items.append(
            "It learnt refusals behind its own thinking, so that a lower rate says that the end of the thinking was "
            "repaired, and not that it thinks better."
        )
    return items


def _missing(found: EvaluationFound) -> list[Block]:
    reasons = found.missing()
    return [Note("Not measured:", reasons)] if reasons else []
