"""The HTML page: one file, no script, no network. Text from models and files is escaped by the template engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from clifflab.config import Study
from clifflab.report.blocks import Packed, Section, Table, pack
from clifflab.report.contamination import duplicates_section
from clifflab.report.heads_short import comparison_row
from clifflab.report.results import ModelResults
from clifflab.report.sections import model_sections
from clifflab.report.short import finding, unchecked
from clifflab.report.tokens import LEVELS


@dataclass(frozen=True)
class StudyResults:
    """What the sections of the whole study are made from.

    Attributes:
        study: The study.
        metrics: Content of ``metrics.json``.
        models: What :func:`draw_model` found of each model, by name.
    """

    study: Study
    metrics: dict[str, Any]
    models: dict[str, dict[str, Any]]


def draw_model(results: ModelResults, number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """One model's part of the page as plain data, and the files of its figures.

    Args:
        results: The model's results.
        number: Which model of the study it is, from 0.
    """
    sections = model_sections(results)
    packed = pack(sections, f"figures/{results.name}", f"m{number}", results.study.report.figures)
    about = {
        "sections": packed.sections,
        "index": packed.index,
        "keys": [section.key for section in sections],
        "labels": results.labels,
        "template": results.renderer.template_hash,
        "probes": _reported_quality(results),
    }
    return about, packed.files


def draw_study(results: StudyResults) -> Packed:
    """The sections of the whole study, before those of its models."""
    sections = [section for make in STUDY_SECTIONS if (section := make(results))]
    return pack(sections, "figures/_study", "study", results.study.report.figures)


def render_page(results: StudyResults, overall: Packed, provenance: dict[str, Any]) -> str:
    """The page.

    Args:
        results: The study's results.
        overall: From :func:`draw_study`.
        provenance: From :func:`~clifflab.report.provenance.provenance`.
    """
    study, summaries = results.study, results.metrics["models"]
    keys = {key for model in results.models.values() for key in model["keys"]}
    keys |= {section["anchor"].removeprefix("study-") for section in overall.sections}
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            study=study,
            findings=[
                finding(name, summaries[name], model["labels"], study.heads.fraction)
                for name, model in results.models.items()
            ],
            unchecked=unchecked(keys),
            keys=keys,
            overall=[section for section in overall.sections if section["anchor"] not in _BEHIND],
            behind=[section for section in overall.sections if section["anchor"] in _BEHIND],
            models=[{"name": name, "sections": model["sections"]} for name, model in results.models.items()],
            levels=LEVELS,
            provenance=provenance,
        )
    )


def environment() -> jinja2.Environment:
    """The templates: everything that they are given is escaped, but for drawings."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("clifflab.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["drawn"] = Markup  # only for what clifflab.report.export drew, which escapes all text itself
    made.filters["breakable"] = _breakable
    return made


def comparison(results: StudyResults) -> Section | None:
    """The models beside each other, where there are several."""
    if len(results.models) < 2:
        return None
    summaries = results.metrics["models"]
    rows = []
    for name, model in results.models.items():
        excess = summaries[name]["excess_cliff"]
        cells = [model["probes"].get("layer", ""), model["probes"].get("auroc"), excess["all"], excess["final"]]
        rows.append([name, *cells])
    head = ["model", "layer", "probe AUROC [95%]", "excess cliff [95%]", "with the paper's probe [95%]"]
    caption = (
        "Excess cliff of each model: mean cliff of harmful complied traces minus that of refused ones, at matched "
        "thinking length. A dash: not defined; the model's own part says why."
    )
    names = list(results.models)
    refused = [[s, *(summaries[n]["sets"][s]["outcomes"]["shares"]["refused"] for n in names)] for s in _sets(results)]
    cliffs = [[s, *(summaries[n]["sets"][s]["probes"]["all"]["cliff"] for n in names)] for s in _sets(results)]
    return Section(
        "comparison",
        "The models side by side",
        [
            Table(caption, head, rows),
            Table("Share refused by set [95%], all traces.", ["set", *names], refused),
            *_heads_table(results),
            Table("Mean cliff by set [95%], all-position probe, test groups.", ["set", *names], cliffs),
        ],
    )


def _heads_table(results: StudyResults) -> list[Table]:
    """What removing heads does to each model; nothing where the study leaves it out."""
    summaries, fraction = results.metrics["models"], results.study.heads.fraction
    rows = [[name, *comparison_row(summaries[name], fraction)] for name in results.models]
    if not any(value is not None for row in rows for value in row[1:]):
        return []
    caption = (
        f"Heads that hold the refusal back, and the model without the top {100 * fraction:g}% of all heads: attack "
        "success on the set that is attacked most successfully to begin with, the highest over-refusal of a benign "
        "set, degenerate answers of the attacked set, and benign perplexity as a multiple of the unchanged model's."
    )
    head = ["model", "suppression heads", "set", "attack success [95%]", "without them [95%]"]
    head += ["over-refusal [95%]", "without them [95%]", "degenerate without them [95%]", "perplexity ratio [95%]"]
    return [Table(caption, head, rows)]


# Sections about the study as a whole: those before the models' own, and those behind them.
STUDY_SECTIONS: tuple[Callable[[StudyResults], Section | None], ...] = (
    comparison,
    lambda results: duplicates_section(results.metrics["duplicates"]),
)
_BEHIND = ("study-duplicates",)


def _breakable(text: str) -> Markup:
    """Escaped text that may break behind the marks that join the parts of a name."""
    return Markup("<wbr>").join(re.split(r"(?<=[._-])(?=[A-Za-z])", text))


def _sets(results: StudyResults) -> list[str]:
    return [prompt_set.name for prompt_set in results.study.prompts]


def _reported_quality(results: ModelResults) -> dict[str, Any]:
    """Layer and test AUROC of the reported all-position probe; empty without one."""
    if not results.trained:
        return {}
    probe = results.probes["probes"]["all.logistic"]
    layer = probe["reported_layer"]
    return {"layer": str(layer), "auroc": probe["layers"][layer]["test"]["auroc"]}
