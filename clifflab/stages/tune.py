"""Stage ``tune``: the fine-tune on the chosen examples, by a group of workers (SPEC section 6)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clifflab.artifacts import file_hash, read_json, write_json
from clifflab.config import ModelSpec, Study
from clifflab.errors import InputError
from clifflab.stages.base import REPAIR, Context, GangStep, Layout, Unit
from clifflab.tuning.group import Alone, Group
from clifflab.tuning.loop import Listen
from clifflab.tuning.run import FIGURES, Order, recipe, result_folder, tune


class TuneStep(GangStep):
    """One unit: the weights that it writes are the result, and its own file marks them whole.

    A group's checkpoints lie beside the unit's file, so that a training goes on after the death of a worker, or of the
    driver.
    """

    name = "tune"
    inputs = ("select",)
    suffix = ".json"

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Only to models that are repaired."""
        return model is not None and study.repairs(model) and study.repair.tuned

    def settings(self, study: Study) -> Any:
        """The recipe."""
        return recipe(study.repair.tune)

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """The figures, and the files of the adapter (or of the whole model) that they name."""
        folder = layout.folder(model, REPAIR)
        figures = read_json(folder / FIGURES) or {"files": []}
        return [folder / FIGURES, *(folder / file for file in figures["files"])]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """One unit."""
        return [Unit(self.name, model, "tune")]

    def compute_together(
        self, context: Context, unit: Unit, group: Group | None, listen: Listen | None
    ) -> dict[str, Any]:
        """Train, and write the weights.

        Raises:
            InputError: Nothing was chosen; or see :func:`clifflab.tuning.run.tune`.
        """
        assert unit.model is not None
        study, out, part = context.study, context.layout.folder(unit.model, REPAIR), context.part(unit)
        data = out / "train.jsonl"
        if why := read_json(out / "selection.json")["reason"]:
            remedy = "mend that, or set repair.tuned to false: what is measured stays"
            raise InputError("repair.select", unit.model, f"there is nothing to tune on ({why})", remedy)
        order = Order(
            data=str(data),
            sha256=file_hash(data),
            out=out,
            settings=study.repair.tune,
            seed=study.seed,
            base=context.identities.models[unit.model],
            fingerprint=context.identity(self.name, unit.model),
            field="repair.select",
        )
        group = group or Alone(part.parent / "alone")
        figures = tune(context.loaded(unit.model), order, group, listen)
        if group.rank == 0:
            write_json(part, {"files": figures["files"]})
        return {"rows": figures["examples"]["train"], "steps": figures["steps"], "workers": group.size}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Nothing to join: the unit wrote everything; weights of another method go."""
        folder = context.layout.folder(model, REPAIR)
        own = result_folder(folder, context.study.repair.tune).name
        for name in {"adapter", "model"} - {own}:
            shutil.rmtree(folder / name, ignore_errors=True)
        figures = read_json(folder / FIGURES)
        return {"steps": figures["steps"], "files": len(figures["files"])}
