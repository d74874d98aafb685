"""The sections on layers: scores by layer and position, and how well the probe of each layer reads."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from clifflab.report.blocks import Drawing, Section, Table
from clifflab.report.figures import auroc_by_layer, layer_map
from clifflab.report.results import ModelResults
from clifflab.science.probe import ESTIMATORS, TRAIN_POSITIONS

_MAPS = 3  # maps of the harmful sets with the largest cliffs, beside one benign control


def maps_section(results: ModelResults) -> Section | None:
    """Layer by position."""
    if not results.trained:
        return None
    rows = results.curves.filter(pc.equal(results.curves["train_positions"], "all"))
    panels = {}
    for name in _mapped_sets(results):
        own = rows.filter(pc.equal(rows["set"], name))
        panels[name] = layer_map(own, name, results.layer("all"), results.closing)
    if not panels:
        return None
    see = (
        "Bright is a strong intention to refuse: look for layers that are bright through the thinking and dark at the "
        "last closing tokens; the reported layer is framed."
    )
    title = "Mean score by layer and position (all-position probes; means alone, their intervals are in curves.parquet)"
    return Section("maps", "In which layers", [Drawing("map", title, see, panels)])


def probes_section(results: ModelResults) -> Section | None:
    """How well the probes read."""
    if not results.trained:
        return None
    about = results.probes["probes"]
    panels = {}
    for positions in TRAIN_POSITIONS:
        areas = {}
        for estimator in ESTIMATORS:
            probe = about[f"{positions}.{estimator}"]
            areas[estimator] = ([layer["test"]["auroc"] for layer in probe["layers"]], probe["reported_layer"])
        panels[positions] = auroc_by_layer(areas, f"trained at {positions} positions")
    see = (
        "1 is a perfect separation of refused harmful from answered benign traces, 0.5 is chance; the ringed layer was "
        "chosen on other groups. Bands are 95% intervals."
    )
    names = {"logistic": "logistic regression", "difference": "difference in means"}
    rows = []
    for positions in TRAIN_POSITIONS:
        for estimator in ESTIMATORS:
            probe = about[f"{positions}.{estimator}"]
            test = probe["layers"][probe["reported_layer"]]["test"]
            rows.append(
                [
                    f"{names[estimator]}, {positions}",
                    str(probe["reported_layer"]),
                    *(test[k] for k in ("auroc", "accuracy", "ece")),
                ]
            )
    caption = (
        "Quality on test groups at the reported layer: the deepest whose validation AUROC is within one standard error "
        "of the best; the size of the cliff plays no part in the choice."
    )
    head = ["probe, trained at", "layer", "AUROC [95%]", "accuracy [95%]", "calibration error [95%]"]
    counts = results.probes["examples"]
    examples = [
        [split, *(counts.get(split, {}).get(k, 0) for k in ("harmful_refused", "benign_complied"))]
        for split in ("train", "validation", "test")
    ]
    split_head = ["split", "harmful refused", "benign answered"]
    blocks: list[Any] = [
        Drawing("auroc", "AUROC by layer, test groups", see, panels),
        Table(caption, head, rows, digits=3),
        Table("Traces that probes were trained and judged on (counts).", split_head, examples),
    ]
    return Section("probes", "How well the probes read", blocks)


def _mapped_sets(results: ModelResults) -> list[str]:
    cliffs = {name: entry["probes"]["all"]["cliff"]["mean"] for name, entry in results.summary["sets"].items()}
    harmful = sorted((n for n in results.sets("harmful") if cliffs[n] is not None), key=lambda n: -cliffs[n])
    benign = [n for n in results.sets("benign") if cliffs[n] is not None]
    return [*harmful[:_MAPS], *benign[:1]]
