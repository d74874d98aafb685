"""The section on all models of a study beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.config import ModelSpec, Study
from clifflab.report.blocks import Section, Table
from clifflab.report.heads_short import comparison_row
from clifflab.report.repair_short import later_row

Summaries = Mapping[str, Any]


def comparison_section(study: Study, summaries: Summaries, probes: Mapping[str, Mapping[str, Any]]) -> Section | None:
    """The models beside each other, where there are several, and what repairs changed.

    Args:
        study: The study.
        summaries: Each model's part of ``metrics.json``.
        probes: Of each model ``layer`` and ``auroc`` of its reported all-position probe; empty without one.
    """
    specs = [study.model(name) for name in summaries]
    tables = [*_later_table(specs, summaries)]
    if sum(spec.before is None for spec in specs) > 1:  # a model and its repair alone are told by the table above
        first, *rest = _own_tables(study, specs, summaries, probes)
        tables = [first, *tables, *rest]
    return Section("comparison", "The models side by side", tables) if tables else None


def model_title(spec: ModelSpec) -> str:
    """A model's name, and which other one it was made from or is compared with."""
    if spec.repairs:
        return f"{spec.name} ({spec.repairs} after its repair)"
    return f"{spec.name} (beside {spec.before})" if spec.before else spec.name


def _own_tables(
    study: Study, specs: list[ModelSpec], summaries: Summaries, probes: Mapping[str, Mapping[str, Any]]
) -> list[Table]:
    rows = []
    for spec in specs:
        excess, quality = summaries[spec.name]["excess_cliff"], probes[spec.name]
        cells = [quality.get("layer", ""), quality.get("auroc"), excess["all"], excess["final"]]
        rows.append([model_title(spec), *cells])
    head = ["model", "layer", "probe AUROC [95%]", "excess cliff [95%]", "with the paper's probe [95%]"]
    caption = (
        "Excess cliff of each model, by its own probes: mean cliff of harmful complied traces minus that of refused "
        "ones, at matched thinking length. A dash: not defined; the model's own part says why."
    )
    sets = [prompt_set.name for prompt_set in study.prompts]
    titles = [model_title(spec) for spec in specs]

    def of_sets(read: Any) -> list[list[Any]]:
        return [[name, *(read(summaries[spec.name]["sets"][name]) for spec in specs)] for name in sets]

    refused = of_sets(lambda entry: entry["outcomes"]["shares"]["refused"])
    cliffs = of_sets(lambda entry: entry["probes"]["all"]["cliff"])
    return [
        Table(caption, head, rows),
        Table("Share refused by set [95%], all traces.", ["set", *titles], refused),
        *_heads_table(study, specs, summaries),
        Table("Mean cliff by set [95%], each model's own all-position probe, test groups.", ["set", *titles], cliffs),
    ]


def _later_table(specs: list[ModelSpec], summaries: Summaries) -> list[Table]:
    """What changed from the model before; nothing where no model has one."""
    rows = [[model_title(spec), *later_row(summaries[spec.name])] for spec in specs if spec.before]
    if not any(value is not None for row in rows for value in row[1:]):
        return []
    caption = (
        "Each model beside the one that it was made from: attack success on the set that was attacked most "
        "successfully before, the benign set with the highest over-refusal afterwards, degenerate and unclosed answers "
        "of the attacked set, and benign perplexity as a multiple of what it was."
    )
    head = ["model", "attacked set", "attack success before [95%]", "after [95%]"]
    head += ["benign set", "over-refusal before [95%]", "after [95%]"]
    head += ["degenerate after [95%]", "unclosed after [95%]", "perplexity ratio [95%]"]
    return [Table(caption, head, rows)]


def _heads_table(study: Study, specs: list[ModelSpec], summaries: Summaries) -> list[Table]:
    """What removing heads does to each model; nothing where the study leaves it out."""
    fraction = study.heads.fraction
    rows = [[model_title(spec), *comparison_row(summaries[spec.name], fraction)] for spec in specs if not spec.before]
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
