"""The study of two models: one as it is, and the same one tuned, on the prompts of a given study."""

from __future__ import annotations

from pathlib import Path

from clifflab.config import ModelSpec, RepairConfig, Study
from clifflab.errors import ConfigError
from clifflab.studyfile import parse_study


def comparison(study: Study, model: str | None, *, adapter: str | None, after: str | None) -> Study:
    """A study that measures a model and a tuned one beside it, and nothing that only explains or repairs.

    It keeps the prompts, the judging and all measuring settings of the study. Heads are not searched, thinking is not
    cut short, and nothing is tuned.

    Args:
        study: Whose prompts and settings are taken.
        model: The model before: the name of one of the study's, or a checkpoint; by default the study's only one.
        adapter: Folder of a PEFT adapter that makes it the tuned model.
        after: In place of an adapter, the tuned model's own checkpoint.

    Raises:
        ConfigError: It is not clear which models are compared.
    """
    if (adapter is None) == (after is None):
        raise ConfigError("evaluate", adapter or "", "needs either --adapter or --after", "give one of them")
    before = _before(study, model)
    if adapter is not None and before.adapter is not None:
        problem = "has an adapter of its own already"
        raise ConfigError("--model", before.name, problem, "give the tuned model's own checkpoint with --after")
    updates = {"name": f"{before.name[:74]}-after", "before": before.name}
    if adapter is not None:
        tuned = before.model_copy(update={**updates, "adapter": _place(adapter)})
    else:
        updates["path"] = _place(after or "")
        tuned = before.model_copy(update={**updates, "revision": None, "adapter": None})
    off = {"heads": study.heads, "ablation": study.ablation, "truncation": study.truncation}
    data = study.model_dump(mode="json")
    data |= {name: {**part.model_dump(mode="json"), "traces": 0} for name, part in off.items()}
    data |= {"models": [spec.model_dump(mode="json") for spec in (before, tuned)]}
    data |= {"repair": RepairConfig(evaluate=study.repair.evaluate).model_dump(mode="json")}
    return parse_study({**data, "name": f"{study.name[:69]}-evaluation"})


def _before(study: Study, model: str | None) -> ModelSpec:
    names = [spec.name for spec in study.models]
    if model is None and len(names) > 1:
        raise ConfigError("--model", "(absent)", f"the study has {len(names)}", f"choose from {', '.join(names)}")
    if model is not None and model not in names:
        return ModelSpec(name="before", path=_place(model))
    spec = study.model(model or names[0])
    if spec.repairs is not None:
        problem = "is made by the study's own repair"
        raise ConfigError("--model", spec.name, problem, "run the study, or give another model")
    return spec.model_copy(update={"before": None})


def _place(path: str) -> str:
    """A path as it counts from here; what is none (a hub id, ``organism:planted``) stays."""
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path
