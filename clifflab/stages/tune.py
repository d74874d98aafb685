"""Stage ``tune``: fine-tune a model on the examples that were chosen for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clifflab.artifacts import file_hash, read_json, write_json
from clifflab.config import ModelSpec, Study
from clifflab.stages.base import REPAIR, Context, Layout, Step, Unit
from clifflab.tuning.group import Alone, Group
from clifflab.tuning.loop import Listen
from clifflab.tuning.run import FIGURES, Order, recipe, result_folder, tune

_UNIT = "tuning"


class TuneStep(Step):
    """One unit, which a group of workers may do together."""

    name = "tune"
    inputs = ("select",)
    suffix = ".json"
    gang = True

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Models that are repaired."""
        return model is not None and study.repair.tuned and study.repairs(model)

    def settings(self, study: Study) -> Any:
        """The recipe; not how many workers carry it out."""
        return recipe(study.repair.tune)

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """The figures, and the files of the adapter or the model that they name."""
        figures = layout.folder(model, REPAIR) / FIGURES
        written = (read_json(figures) or {}).get("files", [])
        return [figures, *(figures.parent / name for name in written)]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """The whole tuning."""
        return [Unit(self.name, model, _UNIT, {"train": "train.jsonl"})]

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Tune in this process."""
        assert unit.model is not None
        figures = tune_job(context, unit.model, Alone(tune_folder(context, unit.model) / "alone"))
        return finish_unit(context, unit, figures)

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Everything is in its place already; what an earlier recipe left goes."""
        settings = context.study.repair.tune
        folder = context.layout.folder(model, REPAIR)
        own = result_folder(folder, settings).name
        for name in {"adapter", "model"} - {own}:
            shutil.rmtree(folder / name, ignore_errors=True)
        figures = read_json(folder / FIGURES)
        return {"steps": figures["steps"], "examples": figures["examples"]["train"]}


def tune_job(context: Context, model: str, group: Group, listen: Listen | None = None) -> dict[str, Any]:
    """What each worker of the step does.

    Args:
        context: The worker's own.
        model: Name of the model.
        group: The workers.
        listen: Told of the progress on the first of them.

    Raises:
        ClifflabError: See :func:`clifflab.tuning.run.tune`.
    """
    folder = context.layout.folder(model, REPAIR)
    data = folder / "train.jsonl"
    order = Order(
        data=str(data),
        sha256=file_hash(data),
        out=folder,
        settings=context.study.repair.tune,
        seed=context.study.seed,
        base=context.identities.models[model],
        fingerprint=context.identity("tune", model),
        field=f"{model}/{REPAIR}/train.jsonl",
    )
    return tune(context.loaded(model), order, group, listen)


def tune_folder(context: Context, model: str) -> Path:
    """Where a training's checkpoints are while it runs."""
    return context.layout.parts("tune", model, context.identity("tune", model))


def finish_unit(context: Context, unit: Unit, figures: dict[str, Any]) -> dict[str, Any]:
    """Mark the unit as done; returns its counts."""
    counts = {"steps": figures["steps"], "tokens": figures["tokens"]["epoch"], "workers": figures["workers"]}
    write_json(context.part(unit), counts)
    return counts
