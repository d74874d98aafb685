"""The sections on how a model is repaired: which examples of the corpus were chosen, and how the tuning went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.report.blocks import Block, Drawing, Note, Section, Table
from clifflab.report.corpus_results import corpus_families, corpus_rejects, corpus_scores
from clifflab.report.figures import choice_bars, learning_curve, score_histogram
from clifflab.report.repair_results import RepairFound
from clifflab.report.results import ModelResults
from clifflab.science.judges import OUTCOMES

SELECTION_TITLE = "Which examples the repair learns from"
TUNING_TITLE = "How the tuning went"
_SCORES = ("misalignment", "cliff", "final", "plateau")
RANKED_BY = {
    "misalignment": "those with the largest misalignment: the highest score of the plateau's window minus final",
    "cliff": "those with the largest cliff",
    "final": "those with the smallest score at the final position",
    "plateau": "those with the highest plateau",
    "random": "drawn at random",
    "rules": "those that the rule judge says were complied with",
    "guard": "those whose response the guard calls harmful",
}
_LEFT_OUT = {
    "benign": "benign (of use for the benign part alone)",
    "outcome": "another outcome than asked for",
    "low_plateau": "plateau too low",
    "short_thinking": "thinking too short",
}
_LEARNT = {
    "assistant": "Only what the assistant writes is learnt: thinking, closing tokens and response.",
    "response": "Only the response behind the closing tokens is learnt.",
}


def selection_section(results: ModelResults) -> Section | None:
    """What was chosen from the corpus, and what other selectors would have chosen."""
    found = results.repair
    if found is None or not found.selection:
        return None
    if found.selection.get("reason"):
        return Section("selection", SELECTION_TITLE, [Note(f"No example was chosen: {found.selection['reason']}.")])
    blocks: list[Block] = [
        Note(_choice(found, results), _choice_notes(found, results)),
        *_drawing(found, results),
        _selectors_table(found),
        *_overlap_table(found),
        *_corpus_table(found, results),
    ]
    return Section("selection", SELECTION_TITLE, blocks)


def tuning_section(results: ModelResults) -> Section | None:
    """Learning curve and counts of the fine-tune."""
    found = results.repair
    if found is None or not found.tuning:
        return None
    about = found.tuning
    if about.get("reason"):
        return Section("tuning", TUNING_TITLE, [Note(f"Nothing was tuned: {about['reason']}.")])
    see = (
        "Losses fall only as far as the targets differ from what the model writes anyway: thinking that is kept costs "
        "what it cost before. "
        + (
            "Where the held-out line turns up while the other falls, the model learns the examples by heart, and the "
            "weights of an earlier step are kept."
            if about["validation"]
            else "No example was held out, so that nothing says from where on they are learnt by heart."
        )
        + " Observations of one training: no intervals."
    )
    best = about["best"]["step"] if about["best"] else None
    blocks: list[Block] = [Note(_recipe(about), _tuning_notes(about))]
    if any(point["loss"] is not None for point in about["curve"]):
        curve = learning_curve(about["curve"], about["validation"], best, "")
        blocks.append(Drawing("tuning", "Learning curve", see, {"": curve}))
    blocks += _validation_table(about)
    return Section("tuning", TUNING_TITLE, blocks)


def _choice(found: RepairFound, results: ModelResults) -> str:
    about = found.selection
    budget, plateau = about["budget"], results.study.repair.select.plateau
    rows, benign = about["targets"]["rows"], about["targets"].get("benign", budget["benign"])
    share = f" ({rows / budget['corpus']:.1%})" if budget["corpus"] else ""
    chosen, ranked = found.kinds(about["by"], plateau)["cliff case"], RANKED_BY.get(about["by"], about["by"])
    return (
        f"The repair learns from {rows:,} of {budget['corpus']:,} traces of the corpus{share}: "
        f"{benign:,} benign requests with the model's own answers, so that it stays helpful, and "
        f"{rows - benign:,} of the {about['eligible']:,} eligible traces, {ranked}. "
        f"Eligible are those {_eligible(about['labels'], plateau)}. The corpus holds "
        f"{about['cliff_cases']:,} cliff cases, harmful requests that were complied with after a plateau of at least "
        f"{plateau:g}; {chosen:,} of them were chosen."
    )


def _eligible(labels: Mapping[str, int], plateau: float) -> str:
    """What makes a trace eligible, by how many of the corpus have labels."""
    if not labels["without"]:
        return "labelled harmful, closed, whole and scored"
    closed = f"closed, whole and scored with a plateau of at least {plateau:g}"
    if not labels["with"]:
        return f"{closed}, since the corpus has no labels"
    return (
        f"labelled harmful, closed, whole and scored, and of the {labels['without']:,} traces without a label (of "
        f"{labels['with'] + labels['without']:,}) those {closed}"
    )


def _choice_notes(found: RepairFound, results: ModelResults) -> list[str]:
    about, targets = found.selection, found.selection["targets"]
    notes = []
    if told := _counted(about["left_out"], _LEFT_OUT):
        notes.append(f"Not eligible, by the first reason that holds: {told}.")
    rejected = corpus_rejects(results.layout.root)
    near = rejected.pop("contaminated", 0) or about.get("contaminated", 0)
    limit = results.study.repair.select.decontaminate
    notes.append(
        f"Left out of the corpus beforehand: {near:,} requests that are asked in the evaluation too, or nearly "
        f"(similarity of word shingles of at least {limit:g})" + (f"; {told}." if (told := _counted(rejected)) else ".")
    )
    if targets["kind"] == "keep-thinking":
        whose = (
            "the model's own, from requests of the corpus that it refused"
            if targets["refusals"] == "own"
            else "written by clifflab in many forms"
        )
        told = f"the refusals are {whose} ({targets['distinct']:,} different texts)"
        notes.append(f"Targets keep the model's own thinking and closing tokens and end in a refusal; {told}.")
    else:
        notes.append(f"Targets are those that the corpus gives ({targets['distinct']:,} different texts).")
    notes.append("Benign requests never have a refusal as target: they keep the answer that the model gave.")
    if told := _counted(targets["rejected"]):
        learnt = f"{targets['rows']:,} of {about['budget']['examples']:,} examples have one"
        notes.append(f"Chosen, but without a usable target, by reason: {told}; with those in their place, {learnt}.")
    if told := _counted(about.get("cut") or {}):
        notes.append(f"Cut at the limit of tokens, and so neither answers nor refusals to learn from: {told}.")
    return notes


def _counted(counts: Mapping[str, int], words: Mapping[str, str] | None = None) -> str:
    """Counts by reason in words."""
    names = words or {}
    return "; ".join(f"{names.get(r, r.replace('_', ' '))}: {count:,}" for r, count in counts.items() if count)


def _drawing(found: RepairFound, results: ModelResults) -> list[Block]:
    """Where the chosen traces lie among all, and what each selector chose; for each the sentence that belongs to it."""
    settings, by = results.study.repair.select, found.selection["by"]
    panels, see = {}, []
    measure = by if by in _SCORES else "misalignment"
    scores = corpus_scores(results.folder, measure, settings.probe, found.chosen_ids(by))
    if scores is not None and scores.kinds:
        panels["scores"] = score_histogram(scores.kinds, scores.chosen, measure, "every trace of the corpus")
        how = "" if by in _SCORES else ", though not by this score"
        see.append(
            f"By score, on a logarithmic scale: all traces by their {measure} score; the hatched ones were "
            f"chosen{how}, the benign share of the budget left out."
        )
    choices = {name: kinds for name in found.selectors if (kinds := found.kinds(name, settings.plateau))}
    if choices:
        panels["selectors"] = choice_bars(choices, "what each selector chose")
        see.append(
            "By selector: a selector that takes many refused requests spends the budget on what the model does already."
        )
    if not panels:
        return []
    told = f"{' '.join(see)} Counts of the whole corpus: no sample, no interval."
    return [Drawing("selection", "What was chosen", told, panels)]


def _selectors_table(found: RepairFound) -> Table:
    rows = []
    for name in found.selectors:
        entry = found.selection["selectors"][name]
        rho = entry["spearman_with_final"]
        rows.append(
            [
                _own(name, found), entry["chosen"], _share(entry["benign_share"]),
                *(entry["outcomes"].get(outcome, 0) for outcome in ("complied", "refused")), entry["cliff_cases"],
                entry["filled"], entry["groups"], _share(entry.get("blind_benign_share")),
                None if rho is None else f"{rho:.2f}",
            ]
        )  # fmt: skip
    head = ["selector", "examples", "benign part", "harmful, answered", "harmful, refused", "cliff cases", "filled up"]
    head += ["groups", "benign without labels", "rank correlation with final only"]
    caption = (
        "The selectors side by side, at one budget; the benign part is the same for all. Filled up: harmful examples "
        "that the judge did not name, drawn at random. Benign without labels: share of benign requests among what the "
        "selector would take if no request had a label. Rank correlation: Spearman's, with the ranking by the final "
        "score alone, over all eligible traces; the choice is made at the top, where the overlap below says how much "
        "the two differ. Counts and shares of the choice itself: no sample, no interval. A dash: not defined."
    )
    return Table(caption, head, rows)


def _overlap_table(found: RepairFound) -> list[Block]:
    overlap, names = found.selection["overlap"], found.selectors
    if len(names) < 2 or not overlap:
        return []
    rows = [[_own(a, found), *(_jaccard(overlap, a, b) for b in names)] for a in names]
    caption = (
        "Overlap of the choices: harmful examples that two selectors share, over all that either chose (Jaccard): 1 is "
        "the same choice. No sample, no interval."
    )
    return [Table(caption, ["selector", *names], rows)]


def _jaccard(overlap: Mapping[str, Mapping[str, float]], a: str, b: str) -> str | None:
    value = 1.0 if a == b else overlap.get(a, {}).get(b, overlap.get(b, {}).get(a))
    return None if value is None else f"{value:.2f}"


def _corpus_table(found: RepairFound, results: ModelResults) -> list[Block]:
    """The families of the corpus, and where each selector took its examples from."""
    corpus = corpus_families(results.layout.root, results.folder)
    if corpus is None:
        return []
    taken = {name: found.families(name) for name in found.selectors}
    rows = [
        [*key, counts.total(), *(counts[o] for o in OUTCOMES), *(taken[s][key] for s in found.selectors)]
        for key, counts in corpus.items()
    ]
    caption = (
        "The corpus by category, or by set where there is none: what the model did with it, and how many examples each "
        "selector took from there, the benign part included. Counts of all traces."
    )
    head = ["of the corpus", "label", "traces", *OUTCOMES, *(f"by {name}" for name in found.selectors)]
    return [Table(caption, head, rows)]


def _own(name: str, found: RepairFound) -> str:
    return f"{name} (this repair)" if name == found.selection["by"] else name


def _recipe(about: Mapping[str, Any]) -> str:
    """The fine-tune in a paragraph."""
    recipe, parameters = about["recipe"], about["parameters"]
    trained = f"{parameters['trainable']:,} of {parameters['all']:,} parameters"
    share = f" ({parameters['trainable'] / parameters['all']:.1%})" if parameters["all"] else ""
    if about["method"] == "lora":
        layers = ", ".join(recipe["modules"])
        where = "every linear layer but the output head" if layers == "all-linear" else f"the layers {layers}"
        how = f"LoRA of rank {recipe['rank']} (alpha {recipe['alpha']}) on {where}: {trained}{share} were trained."
    else:
        how = f"All weights were free: {trained} were trained."
    warm = f" after a warm-up over {100 * recipe['warmup']:g}% of the steps" if recipe["warmup"] else ""
    return (
        f"{how} At most {recipe['epochs']:,} epochs in batches of {recipe['batch_size']:,} examples over all workers "
        f"({about['workers']:,} here), learning rate at most {recipe['learning_rate']:g}, {recipe['schedule']} "
        f"schedule{warm}, AdamW with weight decay {recipe['weight_decay']:g}, gradients clipped at norm "
        f"{recipe['clip']:g}. {_LEARNT[recipe['loss_on']]}"
    )


def _tuning_notes(about: Mapping[str, Any]) -> list[str]:
    examples, tokens, best = about["examples"], about["tokens"], about["best"]
    held = examples["validation"]
    counts = _counted(examples["rejected"]) or "none"
    told = f"{held:,} were held out by group to stop in time" if held else "none was held out"
    notes = [f"Examples: {examples['train']:,} were learnt from, {told}. Rejected, by reason: {counts}."]
    if examples["cut"]:
        notes.append(f"The middle of the thinking was cut in {examples['cut']:,} examples to fit the context.")
    notes.append(f"Tokens of one epoch: {tokens['epoch']:,}, of which {tokens['learnt']:,} are targets.")
    end = (
        "it stopped early, without a smaller loss on the held-out examples"
        if about["stopped_early"]
        else "all epochs were done"
    )
    notes.append(f"Optimizer steps: {about['steps']:,}; {end}.")
    if best:
        loss = "" if best["loss"] is None else f", with a loss of {best['loss']:.3f} on the held-out examples"
        notes.append(f"Kept are the weights of step {best['step']:,} (epoch {best['epoch']:g}){loss}.")
    else:
        notes.append("Kept are the weights of the last step.")
    return notes


def _validation_table(about: Mapping[str, Any]) -> list[Block]:
    points = about["validation"]
    if not points:
        return []
    rows = [[f"{p['epoch']:g}", p["step"], None if p["loss"] is None else f"{p['loss']:.4f}"] for p in points]
    caption = "Loss per target token on the held-out examples, in nats; observations of one training, no intervals."
    return [Table(caption, ["epoch", "step", "loss"], rows)]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"
