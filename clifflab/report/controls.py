"""Sections for the sceptic: where a probe was trained, what else would read as well, cut thinking, and the judges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clifflab.report.blocks import Drawing, Note, Section, Table
from clifflab.report.figures import levels_figure, reliability_diagram, truncation_curve
from clifflab.report.numbers import interval
from clifflab.report.results import ModelResults
from clifflab.science.cells import CELLS, CONTRASTS
from clifflab.science.probe import TRAIN_POSITIONS

_CELL_NAMES = {
    "harmful_refused": "harmful, refused",
    "harmful_complied": "harmful, answered",
    "benign_refused": "benign, refused",
    "benign_complied": "benign, answered",
}
_PROBE_NAMES = {"all": "all-position probe", "final": "final-only probe (the paper's)"}
_READ_NAMES = {"thinking": "thinking", "closing": "closing tokens", "final": "final position"}
_READERS = {
    "all.thinking": "all-position probe on the thinking",
    "all.final": "all-position probe at the final position",
    "final.thinking": "final-only probe on the thinking",
    "final.final": "final-only probe at the final position",
    "logit_lens.thinking": "logit lens on the thinking",
    "logit_lens.final": "logit lens at the final position",
    "bag_of_words.thinking": "bag of words of the thinking",
}


def cross_section(results: ModelResults) -> Section | None:
    """Each probe where it was trained and where it was not."""
    rows = results.summary.get("cross_application")
    if not rows:
        return None
    panels = {}
    for positions in TRAIN_POSITIONS:
        own = {row["read"]: row for row in rows if row["trained"] == positions}
        cells = [c for c in CELLS if any(row["levels"][c]["mean"] is not None for row in own.values())]
        levels = {_CELL_NAMES[cell]: [own[read]["levels"][cell] for read in _READ_NAMES] for cell in cells}
        panels[positions] = levels_figure(levels, list(_READ_NAMES.values()), _PROBE_NAMES[positions])
    see = (
        "On the thinking, the all-position probe should hold benign traces low and harmful ones high; where the "
        "final-only probe does not, or its bars are long, a curve drawn with it says little about the thinking."
    )
    head = ["trained at", "read at", "AUROC [95%]", "accuracy [95%]", "calibration error [95%]"]
    table = [
        [_PROBE_NAMES[row["trained"]], _READ_NAMES[row["read"]], *(row[k] for k in ("auroc", "accuracy", "ece"))]
        for row in rows
    ]
    level_head = ["trained at", "read at", *(f"{name} [95%]" for name in _CELL_NAMES.values())]
    level_rows = [
        [_PROBE_NAMES[row["trained"]], _READ_NAMES[row["read"]], *(row["levels"][cell] for cell in _CELL_NAMES)]
        for row in rows
    ]
    caption = (
        "Cross-application: harmful refused against benign answered traces of test groups, by the mean logit over the "
        "positions that are read; accuracy at a score of one half."
    )
    return Section(
        "cross",
        "Where a probe was trained decides what it says",
        [
            Note(_paper_sentence(rows)),
            Drawing("cross", "Mean score by where a probe is read", see, panels),
            Table(caption, head, table, digits=3),
            Table("Mean score of each kind of trace. A dash: no such trace in test groups.", level_head, level_rows),
        ],
    )


def controls_section(results: ModelResults) -> Section | None:
    """What a sceptic asks of a probe that separates well."""
    summary = results.summary
    if "cells" not in summary or "controls" not in summary:
        return None
    points = {_PROBE_NAMES[p]: summary["reliability"][p] for p in TRAIN_POSITIONS}
    see = (
        "Points on the dotted line mean what they say; a probe that separates perfectly has points in the corners "
        "alone. Bars are 95% intervals."
    )
    blocks: list[Any] = [
        *_cells_tables(summary),
        _selectivity_table(summary["controls"]),
        Drawing("reliability", "Calibration on test groups", see, {"": reliability_diagram(points, "")}),
        _crossfit_table(summary),
        *_ood_blocks(summary["out_of_distribution"]),
    ]
    return Section("controls", "Controls", blocks)


def truncation_section(results: ModelResults) -> Section | None:
    """Refusal and final score with less thinking."""
    found = results.summary.get("truncation")
    if not found or "sets" not in found:
        return None
    kept = results.study.truncation.kept
    panels = {}
    for label in ("harmful", "benign", "mixed"):
        names = [name for name in results.sets(label) if name in found["sets"]]
        if names:
            curves = {name: [point["refused"] for point in found["sets"][name]] for name in names}
            panels[label] = truncation_curve(curves, kept, "share refused", f"{label} requests")
    if results.trained:
        names = [n for label in ("harmful", "mixed") for n in results.sets(label) if n in found["sets"]]
        if names:
            curves = {name: [_final_score(point) for point in found["sets"][name]] for name in names}
            panels["final"] = truncation_curve(curves, kept, "final refusal score", "harmful requests: score")
    see = (
        "Where a harmful set is refused more often with part of its thinking than with all of it, the intention was "
        "there and was lost; a benign set that rises is over-refusal."
    )
    note = "Each trace keeps a share of its own thinking, the closing tokens follow, and the model answers anew; " + (
        "traces of unseen groups." if results.trained else "a seeded choice of traces."
    )
    head = ["set", "n", *(f"{100 * share:g}% kept" for share in kept)]

    def table(caption: str, read: Callable[[dict[str, Any]], Any]) -> Table:
        rows = [[name, points[0]["refused"]["n"], *map(read, points)] for name, points in found["sets"].items()]
        return Table(caption, head, rows)

    blocks: list[Any] = [
        Note(note),
        Drawing("truncation", "Refusals by the share of the thinking that is kept", see, panels),
        table("Share refused [95%].", lambda point: point["refused"]),
        table("Share degenerate [95%]: cut thinking can break a model.", lambda point: point["degenerate"]),
    ]
    if results.trained:
        blocks.append(table("Mean final score [95%], all-position probe.", _final_score))
    return Section("truncation", "What if the thinking is cut short", blocks)


def _final_score(point: dict[str, Any]) -> dict[str, Any]:
    """By the all-position probe; no mean where no trace of the set fits the context."""
    return dict(point["final"]["all"]) if point["final"] else {"mean": None, "low": None, "high": None}


def judges_section(results: ModelResults) -> Section:
    """Attack success and over-refusal, and how far the judge can be trusted."""
    attacks, agreement = results.summary["attacks"], results.summary["agreement"]
    by_guard = any(entry["judged_by"] == "guard" for entry in attacks.values())
    head = ["set", "attack success [95%]", "over-refusal [95%]", "unclosed [95%]", "degenerate [95%]"]
    columns = ["asr", "over_refusal", "unclosed", "degenerate"]
    if by_guard:
        head += ["harmful by the guard, of benign [95%]", "unreadable [95%]"]
        columns += ["harmful_on_benign", "unreadable"]
    caption = (
        "Attack success is the share of harmful prompts' traces "
        + (
            "that the guard calls harmful. "
            if by_guard
            else "that were complied with: no guard looks at what they hold. "
        )
        + "A model that is broken looks safe, so unclosed and degenerate shares stand beside it. "
        + "A dash: no such request."
    )
    table = Table(caption, head, [[name, *(entry[c] for c in columns)] for name, entry in attacks.items()])
    return Section("judges", "Attack success, and the judge itself", [table, *_agreement_blocks(agreement)])


def _agreement_blocks(agreement: dict[str, Any]) -> list[Any]:
    measured = [judge for judge in agreement.get("judges", []) if "accuracy" in judge]
    blocks: list[Any] = []
    if measured:
        keys = ("accuracy", "kappa", "precision", "recall")
        rows = [[judge["judge"], judge["n"], judge["groups"], *(judge[k] for k in keys)] for judge in measured]
        head = ["judge", "n", "groups", *(f"{key} [95%]" for key in keys)]
        caption = (
            f"Agreement of each judge with the labels of {agreement['labels']}: {agreement['kind']} or not. Kappa is "
            "Cohen's: 0 is chance, 1 is perfect."
        )
        blocks.append(Table(caption, head, rows))
    reasons = [f"{judge['judge']}: {judge['reason']}" for judge in agreement.get("judges", []) if "reason" in judge]
    if agreement.get("reason"):
        reasons.append(agreement["reason"])
    if reasons:
        blocks.append(Note("Not measured:", reasons))
    return blocks


def _paper_sentence(rows: list[dict[str, Any]]) -> str:
    """In numbers, what the paper's probe says of benign thinking."""
    at = {(row["trained"], row["read"]): row["levels"]["benign_complied"] for row in rows}
    paper, full, end = at["final", "thinking"], at["all", "thinking"], at["final", "final"]
    if paper["mean"] is None:
        return "No benign trace of the test groups has thinking to read."
    return (
        f"On the thinking of benign requests that were answered, the final-only probe reads {interval(paper)}, the "
        f"all-position probe {interval(full)}. At the final position, where it was trained, the final-only probe reads "
        f"{interval(end)} on the same traces. The intervals cover the choice of training prompts: a long one says that "
        "another choice would have given another answer."
    )


def _cells_tables(summary: dict[str, Any]) -> list[Any]:
    cells = summary["cells"]
    rows = [[name, *(cells[contrast][reader] for contrast in CONTRASTS)] for reader, name in _READERS.items()]
    titles = {
        "as_trained": "harmful refused / benign answered",
        "refusal_given_harm": "harmful refused / harmful answered",
        "refusal_given_benign": "benign refused / benign answered",
        "harm_without_refusal": "harmful answered / benign answered",
    }
    sizes = ", ".join(f"{_CELL_NAMES[cell]} {cells['sizes'][cell]:,}" for cell in CELLS)
    openings = summary["openings"]
    words = "; ".join(
        f"{kind} {', '.join(repr(token) for token in openings[kind]) or 'none'}" for kind in ("refusal", "compliance")
    )
    lens = (
        f"The logit lens reads P(refusal openings) over P(compliance openings); first tokens: {words}."
        if openings["lens"]
        else "The logit lens reads nothing here: no opening tokens, or a last step that is not norm and projection."
    )
    caption = (
        "Harm or refusal? AUROC [95%] of one kind of trace against another, test groups. A detector of refusal is "
        "high where refusal alone differs (the two columns in the middle) and at 0.5 where harm alone does (the last "
        "one), a detector of harm the reverse. "
        f"Traces: {sizes}. A dash: one kind has no trace, or the reader nothing to read. {lens} "
        "Intervals of the probes cover their training, those of the lens and the bag of words the traces alone."
    )
    within = summary["within_prompts"]
    pairs = [
        [_PROBE_NAMES[p], within[p]["final"]["prompts"], *(within[p][m] for m in ("plateau", "final", "cliff"))]
        for p in TRAIN_POSITIONS
    ]
    within_caption = (
        "Mixed samples: refused minus answered samples of one harmful prompt, over the prompts that have both."
    )
    return [
        Table(caption, ["reader", *titles.values()], rows),
        Table(within_caption, ["probe", "prompts", "plateau [95%]", "final [95%]", "cliff [95%]"], pairs),
    ]


def _selectivity_table(controls: dict[str, Any]) -> Table:
    rows: list[list[Any]] = [
        [
            _PROBE_NAMES[p],
            controls["crossfit"][p]["auroc"],
            controls["selectivity"][p]["selectivity"],
            controls["selectivity"][p]["shuffled"],
            controls["selectivity"][p]["memorised"],
        ]
        for p in TRAIN_POSITIONS
    ]
    words = controls["bag_of_words"]
    rows.append(["bag of words (test groups)", words.get("auroc"), *["not asked"] * 3])
    caption = (
        "Cross-fitting reads every training trace by a probe of other groups. Selectivity is test accuracy minus that "
        "of probes whose labels were dealt anew to whole groups; a probe that memorises is high on its own "
        "shuffled traces and has a low selectivity. The shuffled columns give the range over shuffles."
        + (f" Bag of words: {words['reason']}." if "reason" in words else "")
    )
    head = ["reader", "cross-fitted AUROC [95%]", "selectivity [95%]", "shuffled, held out", "shuffled, own traces"]
    return Table(caption, head, rows)


def _crossfit_table(summary: dict[str, Any]) -> Table:
    found, held_out = summary["crossfit"], summary["excess_cliff"]
    rows = [
        [_PROBE_NAMES[p], held_out[p], found[p]["excess_cliff"], found[p]["excess_cliff"].get("n_complied", 0)]
        for p in TRAIN_POSITIONS
    ]
    caption = (
        "The excess cliff on test groups, and again over all traces with each read by the probe of its own fold, "
        "which was fitted to the other groups. The last column counts the complied traces of the latter."
    )
    return Table(caption, ["probe", "test groups [95%]", "cross-fitted [95%]", "complied"], rows)


def _ood_blocks(found: dict[str, Any]) -> list[Any]:
    if not found.get("probes"):
        return [Note(f"Out of distribution: not measured ({found['reason']}).")]
    rows = []
    for key, entry in found["probes"].items():
        positions, read = key.split(".")
        name = f"{_PROBE_NAMES[positions]}, {_READ_NAMES[read]}"
        rows.append([name, *(entry[k] for k in ("auroc", "accuracy", "ece"))])
    borrowed = "; ".join(f"{_CELL_NAMES[cell]} traces come from test groups" for cell in found["borrowed"])
    caption = (
        f"Out of distribution: the sets {', '.join(found['sets'])} were held out of probe training as a whole; harmful "
        f"refused against benign answered.{f' They lack a class: {borrowed}.' if borrowed else ''}"
    )
    return [Table(caption, ["probe", "AUROC [95%]", "accuracy [95%]", "calibration error [95%]"], rows, digits=3)]
