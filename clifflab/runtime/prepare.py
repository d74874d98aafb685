"""A study made ready to run: everything that it names is there, and nothing is left to the machine or the moment."""

from __future__ import annotations

from collections.abc import Callable, Collection

from clifflab.config import ModelSpec, Study
from clifflab.config.inputs import REPAIRED
from clifflab.data.files import check_source
from clifflab.data.labels import read_labels
from clifflab.engines.guard import resolve_guard
from clifflab.errors import ClifflabError, ConfigError, InputError
from clifflab.models.loading import absolute, fetch, load_renderer, resolve_spec
from clifflab.runtime.schedule import Failure


def prepare(study: Study) -> Study:
    """Check cheaply everything that a study names, and settle what depends on this machine and moment.

    Raises:
        InputError: A prompt source, a model, a guard or the judges' labels are not there.
    """
    study, failures = prepare_each(study)
    if failures:
        raise failures[0].error
    return study


def prepare_each(study: Study) -> tuple[Study, list[Failure]]:
    """The same, where a model that cannot be used is no reason to leave the others.

    Returns:
        The study with all its models, and those of them that cannot be used.

    Raises:
        InputError: Something is not there that is no model, or none of the models can be used.
    """
    for place, sets in (("prompts", study.prompts), ("repair.corpus", study.repair.corpus)):
        for index, prompt_set in enumerate(sets):
            check_source(f"{place}.{index}.path", prompt_set.path)
    for index, choice_set in enumerate(study.repair.evaluate.choices):
        check_source(f"repair.evaluate.choices.{index}.path", choice_set.path)
    if study.judge.labels:
        read_labels(study.judge.labels, field="judge.labels")
    guard = resolve_guard(study.judge.guard) if study.judge.guard else None
    models, failures = list[ModelSpec](), list[Failure]()
    for model in study.models:
        try:
            models.append(resolve_spec(absolute(model)))
        except ClifflabError as error:
            failures.append(Failure(model.name, None, None, error))
            models.append(absolute(model))
    if len(failures) == len(study.models):
        raise failures[0].error
    update = {"models": with_repaired(study, tuple(models)), "judge": study.judge.model_copy(update={"guard": guard})}
    return study.model_copy(update=update), failures


def on_gpus(study: Study, given: Study) -> Study:
    """The prepared study, where ``dtype: auto`` is what it is on a GPU: workers have some, the driver may have none.

    Args:
        study: The study, prepared.
        given: The study as it was given.
    """
    automatic = {model.name for model in given.models if model.dtype == "auto"}
    models = tuple(
        model.model_copy(update={"dtype": "bfloat16"})
        if model.name in automatic or (model.repairs or "") in automatic
        else model
        for model in study.models
    )
    judge = study.judge
    if judge.guard and given.judge.guard and given.judge.guard.dtype == "auto":
        judge = judge.model_copy(update={"guard": judge.guard.model_copy(update={"dtype": "bfloat16"})})
    return study.model_copy(update={"models": models, "judge": judge})


def check_each(study: Study, models: Collection[str | None], note: Callable[[str], None]) -> list[Failure]:
    """What is wrong with models that are about to be used: files that cannot be read, templates that contradict.

    Args:
        study: The study, prepared.
        models: Names of those that are about to be used.
        note: Told of what takes time.
    """
    failures = list[Failure]()
    for index, spec in enumerate(study.models):
        if spec.repairs or spec.name not in models:
            continue
        try:
            fetch(spec, note)  # once, here, before several workers want it
            check_format(index, spec)
        except ClifflabError as error:
            failures.append(Failure(spec.name, None, None, error))
    return failures


def without(study: Study, models: Collection[str]) -> Study:
    """The study without some of its models, those that their repairs make, and those that are compared with them."""
    gone, kept = set(models), list[ModelSpec]()
    for model in study.models:
        if model.name in gone or model.before in gone or model.repairs in gone:
            gone.add(model.name)
        else:
            kept.append(model)
    return study.model_copy(update={"models": tuple(kept)})


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
