"""A study made ready to run: everything that it names is there, and nothing is left to the machine or the moment."""

from __future__ import annotations

from clifflab.config import ModelSpec, Study
from clifflab.config.inputs import REPAIRED
from clifflab.data.files import check_source
from clifflab.data.labels import read_labels
from clifflab.engines.guard import resolve_guard
from clifflab.errors import ConfigError, InputError
from clifflab.models.loading import absolute, load_renderer, resolve_spec


def prepare(study: Study) -> Study:
    """Check cheaply everything that a study names, and settle what depends on this machine and moment.

    Raises:
        InputError: A prompt source, a model, a guard or the judges' labels are not there.
    """
    for place, sets in (("prompts", study.prompts), ("repair.corpus", study.repair.corpus)):
        for index, prompt_set in enumerate(sets):
            check_source(f"{place}.{index}.path", prompt_set.path)
    for index, choice_set in enumerate(study.repair.evaluate.choices):
        check_source(f"repair.evaluate.choices.{index}.path", choice_set.path)
    if study.judge.labels:
        read_labels(study.judge.labels, field="judge.labels")
    guard = resolve_guard(study.judge.guard) if study.judge.guard else None
    study = study.model_copy(update={"models": tuple(absolute(model) for model in study.models)})
    return study.model_copy(
        update={
            "models": with_repaired(study, tuple(resolve_spec(model) for model in study.models)),
            "judge": study.judge.model_copy(update={"guard": guard}),
        }
    )


def with_repaired(study: Study, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
    """The models, each followed by the one that its repair makes (``NAME-repaired``), where the study repairs it.

    Raises:
        ConfigError: Another model has that name, or the adapter of a model comes from a repair that there is not.
    """
    repair, found = study.repair, list[ModelSpec]()
    repaired = {model.name for model in models if repair.tuned and study.repairs(model)}
    given = {model.name.casefold() for model in models}  # some disks take names that differ by case for one
    for index, model in enumerate(models):
        if model.repairs is not None and model.repairs not in repaired:
            remedy = "give repair.corpus, and name that model in repair.models"
            raise ConfigError(f"models.{index}.adapter", model.adapter, "this study makes no such repair", remedy)
        found.append(model)
        if model.name in repaired and not any(other.repairs == model.name for other in models):
            name = f"{model.name}-repaired"
            if name.casefold() in given:
                raise ConfigError(f"models.{index}.name", name, "is the name of the repaired model", "choose another")
            found.append(
                model.model_copy(update={"name": name, "adapter": f"{REPAIRED}{model.name}", "before": model.name})
            )
    return tuple(found)


def check_format(index: int, spec: ModelSpec) -> None:
    """Fail before the first trace where a model's template and thinking format contradict each other."""
    try:
        load_renderer(spec)
    except InputError as error:
        if error.field != "thinking_format":
            raise
        raise InputError(f"models.{index}.thinking_format", error.value, error.problem, error.remedy) from None
