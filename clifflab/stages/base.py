"""What a stage is: a plan of units, a pure computation of each, and a merge into tables.

A unit's result is a file of its own, written atomically under a name that follows from the unit; a merge reads the
files in the plan's order. Nothing here knows on how many workers units run.
"""

from __future__ import annotations

import gc
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clifflab.artifacts import code_version, fingerprint, package_versions, read_parquet
from clifflab.config import ModelSpec, Study
from clifflab.data.files import source_hash

if TYPE_CHECKING:
    from clifflab.engines.guard import GuardJudge
    from clifflab.models.loading import LoadedModel
    from clifflab.text.render import Renderer
    from clifflab.tuning.group import Group
    from clifflab.tuning.loop import Listen

T = TypeVar("T")
CORPUS, REPAIR = "corpus", "repair"  # folders of a model's results
GUARD = "(guard)"  # among models in memory; no model can have this name
Pair = tuple[str, str | None]


@dataclass(frozen=True)
class Unit:
    """One piece of work of a step.

    Attributes:
        step: Name of the step.
        model: Name of the model, or ``None`` for work on the study as a whole.
        key: Name of the unit within the step; file-name safe, sorts in plan order.
        payload: What the step needs to compute it; plain data.
    """

    step: str
    model: str | None
    key: str
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Where a study's files are."""

    root: Path

    def folder(self, model: str | None, branch: str = "") -> Path:
        """Folder of a model's results, or of the study's own; of those on a corpus, in a branch."""
        own = self.root / model if model else self.root
        return own / branch if branch else own

    def all_parts(self, step: str, model: str | None) -> Path:
        """Folder of a step's unit files, whatever their fingerprint."""
        return self.root / ".work" / (model or "_study") / step

    def parts(self, step: str, model: str | None, identity: str) -> Path:
        """Folder of the unit files of a step with this fingerprint."""
        return self.all_parts(step, model) / identity[:16]

    def manifest(self, step: str, model: str | None) -> Path:
        """The step's manifest; what has one with the right fingerprint is whole."""
        return self.root / ".steps" / (model or "_study") / f"{step}.json"


@dataclass(frozen=True)
class Identities:
    """Fingerprints of all steps of a study, computed once by the driver and handed to every worker.

    Attributes:
        steps: Fingerprint of each step's result by ``(step, model)``.
        models: What each model is.
        sources: Hash of each prompt set's source.
        reads: What else each step reads, by content (see :meth:`Step.reads`).
        failed: Models that were left out, for the report: ``model, step, unit, error``.
    """

    steps: dict[Pair, str]
    models: dict[str, dict[str, Any]]
    sources: list[str]
    reads: dict[str, Any] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        study: Study,
        steps: Mapping[str, Step],
        file_hash: Callable[[Path], str],
        failed: Sequence[dict[str, Any]] = (),
    ) -> Identities:
        """Fingerprint a resolved study: settings, inputs, models, seed, code and the packages behind the numbers."""
        from clifflab.models.loading import model_identity

        models: dict[str, dict[str, Any]] = {}
        sources = [source_hash(prompt_set.path) for prompt_set in study.prompts]
        reads = {name: read for name, step in steps.items() if (read := step.reads(study, file_hash)) is not None}
        found: dict[Pair, str] = {}
        for name, model in ordered(study, steps):
            step = steps[name]
            if model and model not in models:
                spec = study.model(model)
                models[model] = {"name": model, **model_identity(spec, file_hash)}
                if spec.repairs:
                    models[model]["adapter"] = found["tune", spec.repairs]
            inputs = {f"{i}:{m}": found[i, m] for i, m in upstream(study, steps, name, model)}
            found[name, model] = fingerprint(
                {
                    "step": name,
                    "model": models[model] if model else None,
                    "settings": step.settings(study),
                    "seed": study.seed,
                    "inputs": inputs,
                    "sources": None if inputs else sources,
                    "reads": reads.get(name),
                    "code": code_version(),
                    "packages": package_versions(),
                    **({"failed": list(failed)} if failed and step.tells_failures else {}),
                }
            )
        return cls(found, models, sources, reads, list(failed))


class Context:
    """What a worker knows: the study, its files, and the models that it has loaded.

    Args:
        study: The study, resolved.
        root: Folder of the study's results.
        identities: Its fingerprints.
    """

    def __init__(self, study: Study, root: Path, identities: Identities) -> None:
        self.study, self.layout, self.identities = study, Layout(root), identities
        self.loads: list[dict[str, Any]] = []
        self._held: dict[str, Any] = {}
        self._kept: dict[str, tuple[list[int], Any]] = {}

    def loaded(self, model: str) -> LoadedModel:
        """The model, loaded once; whatever else this worker held before is let go."""
        from clifflab.models.loading import load

        return self._hold(model, lambda: load(self.spec(model)))

    def spec(self, model: str) -> ModelSpec:
        """The model's configuration, with the place of what this study's repair makes."""
        spec = self.study.model(model)
        if spec.repairs is None:
            return spec
        made = self.layout.folder(spec.repairs, REPAIR)
        if self.study.repair.tune.method == "full":
            return spec.model_copy(update={"path": str(made / "model"), "adapter": None})
        return spec.model_copy(update={"adapter": str(made / "adapter")})

    def guard(self) -> GuardJudge:
        """The study's guard, loaded once; the studied model is let go."""
        from clifflab.engines.guard import load_guard

        config = self.study.judge.guard
        assert config is not None
        return self._hold(GUARD, lambda: load_guard(config))

    def renderer(self, model: str) -> Renderer:
        """The model's token ids and text, without its weights."""
        from clifflab.models.loading import load_renderer

        if model in self._held:
            held: Renderer = self._held[model].renderer
            return held
        return self.once(f"renderer:{model}", [], lambda: load_renderer(self.spec(model)))

    def _hold(self, name: str, load: Callable[[], T]) -> T:
        if name not in self._held:
            self._let_go()
            start = time.monotonic()
            self._held[name] = load()
            seconds = round(time.monotonic() - start, 3)
            self.loads.append({"model": name, "began": round(time.time() - seconds, 3), "seconds": seconds})
        held: T = self._held[name]
        return held

    def forget(self) -> None:
        """Let go of tables and what was made from them; models stay."""
        self._kept.clear()

    def _let_go(self) -> None:
        """Free the memory of the model that was held, and of what was made from it."""
        import torch

        if not self._held:
            return
        self._held.clear()
        self._kept.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def table(self, path: Path) -> Any:
        """An Arrow table, read once as long as the file stays the same."""
        return self.once(f"table:{path}", [path], lambda: read_parquet(path))

    def once(self, key: str, files: Sequence[Path], compute: Callable[[], T]) -> T:
        """A value that follows from files, computed once as long as they stay the same."""
        stamps = [os.stat(path).st_mtime_ns if path.exists() else 0 for path in files]
        if key not in self._kept or self._kept[key][0] != stamps:
            self._kept[key] = (stamps, compute())
        value: T = self._kept[key][1]
        return value

    def identity(self, step: str, model: str | None) -> str:
        """Fingerprint of a step's result."""
        return self.identities.steps[step, model]

    def part(self, unit: Unit) -> Path:
        """File of a unit's result."""
        from clifflab.stages import STEPS

        identity = self.identity(unit.step, unit.model)
        return self.layout.parts(unit.step, unit.model, identity) / f"{unit.key}{STEPS[unit.step].suffix}"


class Step(ABC):
    """One stage.

    Attributes:
        name: Its name, in tables and logs.
        per_model: Whether it runs once a model, or once a study.
        inputs: Names of the steps whose results it reads.
        suffix: File suffix of a unit's result.
        transient: Its unit files are its result; they are deleted when every step that reads them is whole.
        compares: It reads the results of the model before (``ModelSpec.before``) too.
        loads: Its units need the model in memory.
        merge_loads: Its merge does too.
        tells_failures: It shows which models were left out.
    """

    name: str
    per_model: bool = True
    inputs: tuple[str, ...] = ()
    suffix: str = ".parquet"
    transient: bool = False
    compares: bool = False
    loads: bool = True
    merge_loads: bool = False
    tells_failures: bool = False

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Whether a study has this step for this model (``None``: at all, for a step of the whole study)."""
        return True

    def needs(self, context: Context, unit: Unit | None, model: str | None) -> str | None:
        """The model that must be in memory for a unit (``None``: for the merge); ``None`` where it does without.

        A worker that holds no model may do such work, on a machine without a GPU too.
        """
        return model if (self.loads if unit else self.merge_loads) else None

    @abstractmethod
    def settings(self, study: Study) -> Any:
        """The part of the configuration that its result depends on; plain data."""

    def reads(self, study: Study, file_hash: Callable[[Path], str]) -> Any:
        """What it reads beside its inputs and the studied model, named by content; ``None`` where there is nothing."""
        return None

    @abstractmethod
    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """The files that it makes."""

    @abstractmethod
    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Its units, in order. Cheap: reads counts, computes nothing."""

    def plan_reads(self, context: Context, model: str | None) -> list[Path]:
        """Unit files of other steps that planning reads."""
        return []

    @abstractmethod
    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Compute one unit and write its file; returns counts for the event log."""

    @abstractmethod
    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Make the outputs from the unit files; returns counts for the event log and the manifest."""


class GangStep(Step):
    """A stage whose units are each done by a group of workers together, and not by one of many."""

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Compute one unit alone."""
        return self.compute_together(context, unit, None, None)

    @abstractmethod
    def compute_together(
        self, context: Context, unit: Unit, group: Group | None, listen: Listen | None
    ) -> dict[str, Any]:
        """Compute one unit as one worker of a group, or alone.

        Args:
            context: What the worker knows.
            unit: The unit.
            group: The workers; ``None`` where there is one.
            listen: Told by the first worker of the progress.
        """


def chunks(total: int, size: int, step: str, model: str | None) -> list[Unit]:
    """Units of consecutive rows ``[start, stop)``."""
    return [
        Unit(step, model, f"{number:06d}", {"start": start, "stop": min(start + size, total)})
        for number, start in enumerate(range(0, total, size))
    ]


def ordered(study: Study, steps: Mapping[str, Step]) -> list[Pair]:
    """All steps of a study as ``(step, model)``, each after those that it reads.

    The steps of the whole study come first, then model after model, and the report last.
    """
    own = [(name, None) for name, step in steps.items() if not step.per_model and step.applies(study, None)]
    mine: list[Pair] = [
        (name, model.name)
        for model in study.models
        for name, step in steps.items()
        if step.per_model and step.applies(study, model)
    ]
    return [*own[:-1], *mine, *own[-1:]]


def upstream(study: Study, steps: Mapping[str, Step], name: str, model: str | None) -> list[Pair]:
    """What a step reads: its inputs, of its own model or of all; and where it compares, of the model before too.

    A model that is made by the repair of another one comes after that.
    """
    spec = study.model(model) if model else None
    models = [*study.models] if spec is None else [spec]
    if spec and spec.before and steps[name].compares:
        models.append(study.model(spec.before))
    found: list[Pair] = []
    for i in steps[name].inputs:
        if not steps[i].per_model:
            found += [(i, None)] if steps[i].applies(study, None) else []
        else:
            found += [(i, m.name) for m in models if steps[i].applies(study, m)]
    if spec and spec.repairs:
        found.append(("tune", spec.repairs))
    return found
