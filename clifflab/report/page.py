"""The HTML page: one file, no script, no network. Text from models and files is escaped by the template engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from clifflab.config import Study
from clifflab.errors import shorten
from clifflab.report.blocks import Packed, Section, pack
from clifflab.report.comparison import comparison_section, model_title
from clifflab.report.contamination import duplicates_section
from clifflab.report.curve import curve_sentence
from clifflab.report.repair_short import later_finding, repair_sentence
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
        models: What :func:`draw_model` found of each model, by name; those that failed are not among them.
        failed: Models that could not be finished: ``model``, ``step`` (or ``None``) and ``error`` of each.
    """

    study: Study
    metrics: dict[str, Any]
    models: dict[str, dict[str, Any]]
    failed: Sequence[Mapping[str, Any]] = ()


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
    study = results.study
    keys = {key for model in results.models.values() for key in model["keys"]}
    keys |= {section["anchor"].removeprefix("study-") for section in overall.sections}
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            study=study,
            missing=missing_models(results.failed),
            asked=len({model.name for model in study.models} | {entry["model"] for entry in results.failed}),
            findings=[_finding(results, name) for name in results.models],
            unchecked=unchecked(keys),
            keys=keys,
            overall=[section for section in overall.sections if section["anchor"] not in _BEHIND],
            behind=[section for section in overall.sections if section["anchor"] in _BEHIND],
            models=[
                {"name": model_title(study.model(name)), "sections": model["sections"]}
                for name, model in results.models.items()
            ],
            levels=LEVELS,
            provenance=provenance,
        )
    )


def missing_models(failed: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The notice of models that are missing: name, step and reason of each, as text of one line.

    Args:
        failed: See :class:`StudyResults`; of a model that is named more than once the first entry counts.
    """
    found: dict[str, dict[str, str]] = {}
    for entry in failed:
        model = shorten(entry.get("model") or "", 80)
        step, why = shorten(entry.get("step") or "", 60), shorten(entry.get("error") or "no reason was given", 600)
        found.setdefault(model, {"model": model, "step": step, "why": why})
    return list(found.values())


def _finding(results: StudyResults, name: str) -> dict[str, str]:
    """What was found on one model, for the top of the page."""
    study, summaries = results.study, results.metrics["models"]
    spec = study.model(name)
    found = {"heads": "", "repair": ""}
    if spec.repairs or (spec.before and summaries[name].get("evaluation")):
        before = spec.before or spec.repairs or ""
        return {**found, **later_finding(name, before, summaries.get(before, {}), summaries[name]), "before": before}
    found |= finding(name, summaries[name], results.models[name]["labels"], study.heads.fraction)
    made = any(other.repairs == name for other in study.models)
    told = ["" if made else repair_sentence(summaries[name]), curve_sentence(summaries[name])]
    found["repair"] = " ".join(sentence for sentence in told if sentence)
    return {**found, "before": ""}


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


# Sections about the study as a whole: those before the models' own, and those behind them.
STUDY_SECTIONS: tuple[Callable[[StudyResults], Section | None], ...] = (
    lambda results: comparison_section(
        results.study,
        results.metrics["models"],
        {name: model["probes"] for name, model in results.models.items()},
    ),
    lambda results: duplicates_section(results.metrics["duplicates"]),
)
_BEHIND = ("study-duplicates",)


def _breakable(text: str) -> Markup:
    """Escaped text that may break behind the marks that join the parts of a name."""
    return Markup("<wbr>").join(re.split(r"(?<=[._-])(?=[A-Za-z])", text))


def _reported_quality(results: ModelResults) -> dict[str, Any]:
    """Layer and test AUROC of the reported all-position probe; empty without one."""
    if not results.trained:
        return {}
    probe = results.probes["probes"]["all.logistic"]
    layer = probe["reported_layer"]
    return {"layer": str(layer), "auroc": probe["layers"][layer]["test"]["auroc"]}
