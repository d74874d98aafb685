"""The cliff of a model beside that of the one it was made from, by the old probe and by its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.report.blocks import Block, Drawing, Note, Table
from clifflab.report.figures import before_after
from clifflab.report.numbers import interval
from clifflab.report.repair_results import EvaluationFound
from clifflab.report.results import ModelResults

_READ = {"before": "before", "after_old_probe": "after, old probe", "after_own_probe": "after, own probe"}
_CLIFF = ("cliff", "plateau", "final")


def cliff_blocks(found: EvaluationFound, results: ModelResults, before: str) -> list[Block]:
    """Figure and table of the cliffs, and how far the probes can be trusted; nothing where no probe reads either model.

    Args:
        found: The comparison.
        results: The later model.
        before: Name of the earlier one.
    """
    cliffs = {name: entry for name, entry in (found.about.get("cliff") or {}).items() if entry}
    reads = [read for read in _READ if any(_measured(entry.get(read)) for entry in cliffs.values())]
    cliffs = {name: entry for name, entry in cliffs.items() if any(_measured(entry.get(read)) for read in reads)}
    if not cliffs:
        return []
    rows = {name: [(entry.get(read) or {}).get("cliff") for read in reads] for name, entry in cliffs.items()}
    labels = {entry.name: entry.label for entry in found.sets}
    series = [_READ[read] for read in reads]
    ends = _ends(rows)
    panels = {}
    for label in ("harmful", "benign", "mixed"):
        own = {name: entries for name, entries in rows.items() if labels.get(name) == label}
        if own:
            title = f"{label} requests"
            panels[label] = before_after(own, series, "mean cliff", title, ends=ends)
    see = (
        "A repair of the cliff itself moves the harmful sets to 0 by both probes. Where only the old probe says so, "
        "the model may keep its refusal somewhere else than that probe looks. Bars are 95% intervals."
    )
    table = [_row(name, entry, read) for name, entry in cliffs.items() for read in reads]
    caption = (
        f"Plateau, final and cliff, before and after. The old probe was trained on traces of {before}, the own one on "
        "this model's; both at all positions. Traces of groups that the reading probe has not seen. The change is "
        "that of the cliff within traces, by the old probe on both sides. A dash: not measured."
    )
    drawing = Drawing("before-after-cliff", "The cliff before and after", see, panels)
    head = ["set", "read", "cliff [95%]", "change, paired [95%]", "plateau [95%]", "final [95%]"]
    return [drawing, Note(_own_probe(results), _excess(found)), Table(caption, head, table)]


def _row(name: str, entry: Mapping[str, Any], read: str) -> list[Any]:
    found = entry.get(read) or {}
    change = entry.get("change") if read == "after_old_probe" else None
    return [name, _READ[read], found.get("cliff"), change, found.get("plateau"), found.get("final")]


def _excess(found: EvaluationFound) -> list[str]:
    """The excess cliff by each reading, or why it is not defined."""
    entries = found.about.get("excess_cliff") or {}
    told = []
    for read, name in _READ.items():
        entry = entries.get(read) or {}
        if entry.get("mean") is not None:
            told.append(f"{name} {interval(entry)}")
        elif entry.get("reason"):
            told.append(f"{name} not defined ({entry['reason']})")
    old = (found.about.get("probes") or {}).get("old")
    notes = [f"Excess cliff, complied minus refused at matched length: {'; '.join(told)}."] if told else []
    return [*notes, f"The old probe does not read this model: {old}."] if old else notes


def _measured(entry: Mapping[str, Any] | None) -> bool:
    return any((entry or {}).get(measure, {}).get("mean") is not None for measure in _CLIFF)


def _ends(rows: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> tuple[float, float]:
    """Ends of the axis: 0 and 1, or the quarters beyond the intervals."""
    found = [end for entries in rows.values() for e in entries if e for end in (e.get("low"), e.get("high"), e["mean"])]
    there = [0.0, 1.0, *(end for end in found if end is not None)]
    return math.floor(4 * min(there)) / 4, math.ceil(4 * max(there)) / 4


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
