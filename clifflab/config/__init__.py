"""A study and its parts: strict, frozen configuration (unknown keys are errors).

Only settings that change results belong to a stage's section; how the work is carried out (workers, threads) sits in
:class:`RuntimeConfig`, which never enters a fingerprint.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from clifflab.config.base import SLUG as SLUG
from clifflab.config.base import Section as Section
from clifflab.config.base import Slug, slug
from clifflab.config.heads import AblationConfig as AblationConfig
from clifflab.config.heads import HeadsConfig as HeadsConfig
from clifflab.config.inputs import COLUMN_ROLES as COLUMN_ROLES
from clifflab.config.inputs import ModelSpec as ModelSpec
from clifflab.config.inputs import PromptSet as PromptSet
from clifflab.config.measuring import CliffConfig as CliffConfig
from clifflab.config.measuring import DuplicatesConfig as DuplicatesConfig
from clifflab.config.measuring import GuardConfig as GuardConfig
from clifflab.config.measuring import JudgeConfig as JudgeConfig
from clifflab.config.measuring import ProbeConfig as ProbeConfig
from clifflab.config.measuring import TracesConfig as TracesConfig
from clifflab.config.measuring import TruncationConfig as TruncationConfig
from clifflab.config.repair import RepairConfig as RepairConfig
from clifflab.config.repair import SelectConfig as SelectConfig
from clifflab.config.repair import TargetsConfig as TargetsConfig
from clifflab.config.repair import TuneConfig as TuneConfig
from clifflab.config.score import ScoreConfig as ScoreConfig
from clifflab.config.sweep import expand


class ReportConfig(Section):
    """The report.

    Attributes:
        figures: Draw them, for the page and as files. A study of many models is told by its tables alone without.
    """

    figures: bool = True


class RuntimeConfig(Section):
    """How the work is carried out; never part of a result's identity.

    Attributes:
        kind: ``ray`` runs units in actors, ``inline`` in this process.
        workers: Actors; ``auto`` is one per GPU, else one per CPU core.
        threads: Threads of one worker on a CPU. Equal thread counts give bit-equal results.
        object_store_mb: Size of Ray's object store when it is started here.
        max_attempts: How often a unit is tried when its worker dies or hangs, or the disk refuses it.
        address: A running Ray: ``auto``, or ``host:port``. One of this process's own is started without.
        hang_seconds: A worker that shows no progress for so long is ended, and its unit done again elsewhere.
        backoff_seconds: Pause before a unit is tried again; doubled each time.
        patience_seconds: How long an idle worker waits for work of its own model before it takes another's.
    """

    kind: Literal["ray", "inline"] = "ray"
    workers: Literal["auto"] | int = "auto"
    threads: int = Field(default=1, ge=1)
    object_store_mb: int = Field(default=256, ge=80)
    max_attempts: int = Field(default=4, ge=1)
    address: str | None = Field(default=None, min_length=1)
    hang_seconds: float = Field(default=1800, gt=0)
    backoff_seconds: float = Field(default=1.0, ge=0)
    patience_seconds: float = Field(default=5.0, ge=0)

    @field_validator("workers")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("give at least 1, or auto")
        return value


class Study(Section):
    """A whole study: models x prompt sets, and how each stage is done."""

    name: Slug
    seed: int = Field(default=0, ge=0, lt=2**63)
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    prompts: tuple[PromptSet, ...] = Field(min_length=1)
    duplicates: DuplicatesConfig = DuplicatesConfig()
    traces: TracesConfig = TracesConfig()
    judge: JudgeConfig = JudgeConfig()
    probe: ProbeConfig = ProbeConfig()
    truncation: TruncationConfig = TruncationConfig()
    cliff: CliffConfig = CliffConfig()
    heads: HeadsConfig = HeadsConfig()
    ablation: AblationConfig = AblationConfig()
    repair: RepairConfig = RepairConfig()
    score: ScoreConfig = ScoreConfig()
    report: ReportConfig = ReportConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    _check_name = field_validator("name")(slug)

    @field_validator("models", mode="before")
    @classmethod
    def _sweeps(cls, value: Any) -> Any:
        return expand(value)

    @model_validator(mode="after")
    def _unique_names(self) -> Study:
        for field in ("models", "prompts"):
            names = [part.name for part in getattr(self, field)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{field}: the name {twice[0]!r} is used twice; give each its own")
        folded: dict[str, str] = {}
        for name in (model.name for model in self.models):
            if (other := folded.setdefault(name.casefold(), name)) != name:
                problem = "differ only by case, and are one folder on some disks"
                raise ValueError(f"models: the names {other!r} and {name!r} {problem}; give each its own")
        asked = {part.name for part in self.prompts}
        if both := next((part.name for part in self.repair.corpus if part.name in asked), None):
            raise ValueError(f"repair.corpus: {both!r} is a set of prompts too; give it another name")
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Study:
        if all(prompt_set.ood for prompt_set in self.prompts):
            raise ValueError("prompts: every set is marked ood; leave one unmarked for probes to train on")
        return self

    @model_validator(mode="after")
    def _known_sets(self) -> Study:
        names = [prompt_set.name for prompt_set in self.prompts]
        if unlabelled := next((p.name for p in self.prompts if p.label == "unlabelled"), None):
            raise ValueError(f"prompts: {unlabelled!r} has no label; only a corpus (repair.corpus) goes without")
        named = {
            "heads.attacked": self.heads.attacked,
            "heads.plain": self.heads.plain,
            "ablation.sets": self.ablation.sets,
            "repair.curve.sets": self.repair.curve.sets,
            **{f"repair.evaluate.pools.{pool}": sets for pool, sets in self.repair.evaluate.pools.items()},
        }
        for field, given in named.items():
            unknown = [name for name in given if name not in names]
            if unknown:
                raise ValueError(f"{field}: no set is called {unknown[0]!r}; give some of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _curve_asks_models(self) -> Study:
        given = [prompt_set.name for prompt_set in self.prompts if prompt_set.existing]
        if wrong := next((name for name in self.repair.curve.sets if name in given), None):
            raise ValueError(
                f"repair.curve.sets: {wrong!r} holds finished traces (existing: true), which no model writes anew; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _guard_to_choose(self) -> Study:
        select, curve = self.repair.select, self.repair.curve
        named = {"select.by": [select.by], "select.beside": select.beside, "curve.selectors": curve.selectors}
        field = next((field for field, selectors in named.items() if "guard" in selectors), None)
        if self.repair.corpus and field and self.judge.guard is None:
            raise ValueError(f"repair.{field}: 'guard' needs a guard's verdicts; give judge.guard")
        return self

    @model_validator(mode="after")
    def _known_models(self) -> Study:
        names = [model.name for model in self.models]
        if unknown := next((name for name in self.repair.models if name not in names), None):
            raise ValueError(f"repair.models: no model is called {unknown!r}; give some of {', '.join(names)}")
        for place, model in enumerate(self.models):
            for other in (model.before, model.repairs):
                if other is not None and other not in names[:place]:
                    raise ValueError(f"models: {model.name!r} follows from {other!r}, which must stand before it")
        return self

    def model(self, name: str) -> ModelSpec:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)

    def repairs(self, model: ModelSpec) -> bool:
        """Whether examples are chosen for a model from the corpus."""
        made = model.before is not None or model.adapter is not None
        return bool(self.repair.corpus) and not made and model.name in (self.repair.models or [model.name])

    def searches(self, model: ModelSpec) -> bool:
        """Whether a model is searched for heads, and its thinking cut short."""
        return model.repairs is None or self.repair.heads
