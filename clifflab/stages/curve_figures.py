"""The figures of the less-is-more curve: rows of ``curve.parquet`` and the content of ``curve.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.config import Study
from clifflab.science.judges import OUTCOMES
from clifflab.science.less import COUNTS, RANDOM, Asked, LessIsMore, Trial
from clifflab.science.less_words import findings
from clifflab.stages.curve_plan import BEFORE, Cell, Experiment

Rows = Sequence[Mapping[str, Any]]
_COLUMNS = {"harmful": "harmful_examples", "benign": "benign_examples"}  # where a count's column has another name


def curve_rows(rows: Rows) -> list[dict[str, Any]]:
    """One row for every fine-tune and set, the model before first.

    Args:
        rows: What every fine-tune answered, with its counts, as in the unit files.
    """
    together: dict[tuple[Cell, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        together.setdefault((_cell(row), row["set"]), []).append(row)
    out = []
    for (cell, name), own in together.items():
        outcomes = Counter(row["outcome"] for row in own)
        labels = {row["label"] for row in own}
        counted = {_COLUMNS.get(count, count): own[0][count] for count in COUNTS}
        of: dict[str, int] = {outcome: outcomes[outcome] for outcome in OUTCOMES}
        out.append(
            {
                "model": own[0]["model"],
                **cell._asdict(),
                "set": name,
                "label": labels.pop() if len(labels) == 1 else "mixed",
                "traces": len(own),
                **of,
                **counted,
                "perplexity": own[0]["perplexity"],
            }
        )
    return out


def curve_figures(study: Study, rows: Rows, clusters: Mapping[str, str], plan: Experiment) -> dict[str, Any]:
    """The content of ``curve.json``.

    Args:
        study: The study.
        rows: As for :func:`curve_rows`.
        clusters: Cluster of every group.
        plan: What was asked, of which corpus.
    """
    corpus = plan.corpus
    cells: dict[Cell, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(_cell(row), []).append(row)
    before = next(own for cell, own in cells.items() if cell.selector == BEFORE)
    asked = Asked(
        [row["set"] for row in before],
        [row["label"] == "harmful" for row in before],
        [clusters[row["group"]] for row in before],
        [row["outcome"] for row in before],
        before[0]["perplexity"],
    )
    trials = [
        Trial(
            *cell,
            [row["outcome"] for row in own],
            {name: own[0][name] for name in COUNTS},
            own[0]["perplexity"],
        )
        for cell, own in cells.items()
        if cell.selector != BEFORE
    ]
    settings = study.repair.curve
    found = LessIsMore(asked, trials, study.cliff.bootstrap, study.seed).as_dict()
    labels = {row["set"]: row["label"] for row in curve_rows(before)}
    figures = {
        "reason": "",
        "method": method(study),
        "judged_by": study.judge.kind,
        "guard": study.judge.guard is not None,
        "seeds": settings.seeds,
        "prompts": settings.prompts,
        "asked": len(before),
        "sets": labels,
        "left_out": dict(plan.left_out),
        "texts": {"n": len(plan.read), "reason": plan.unread},
        "corpus": corpus["traces"],
        "cliff_cases": corpus["cliff_cases"],
        "eligible": corpus["eligible"],
        "benign_share": study.repair.select.benign,
        **found,
        "budgets": list(settings.budgets),
        "selectors": list(settings.selectors),
    }
    return {**figures, "findings": findings(figures, figures["method"])}


def method(study: Study) -> str:
    """The selector that the others are compared with: the study's own, or the first that is not random."""
    names = study.repair.curve.selectors
    if study.repair.select.by in names:
        return study.repair.select.by
    return next((name for name in names if name != RANDOM), names[0])


def _cell(row: Mapping[str, Any]) -> Cell:
    return Cell(row["selector"], row["budget"], row["seed"])
