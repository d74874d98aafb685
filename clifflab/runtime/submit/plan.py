"""What a submission is: the command that runs on the cluster, the files that go with it, the paths it needs there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clifflab.config import ModelSpec, Study
from clifflab.data.files import check_source
from clifflab.errors import ConfigError, InputError, refuse_secret_address
from clifflab.runtime.submit.ids import content_digest, full_place
from clifflab.runtime.submit.package import Package
from clifflab.studyfile import dump_study

STUDY = "study.yaml"
TASKS = ("score", "tune")
_ELSEWHERE = re.compile(r"^(hf:|organism:|package:|[A-Za-z][A-Za-z0-9+.-]+://)")
# Options of the tasks by what they name.
_DATA = {"score": ("--probes",), "tune": ("--data",)}
_TEMPLATES = (".jinja", ".jinja2", ".j2", ".txt")
_OUTPUT = {"score": "--output", "tune": "--out"}


@dataclass(frozen=True)
class Shared:
    """A path that is read in place where every node sees it, and is uploaded otherwise.

    Attributes:
        named: What named it (a config field, an option).
        path: Absolute.
        folder: Where it goes in the package.
    """

    named: str
    path: str
    folder: str


@dataclass
class Plan:
    """One submission.

    Attributes:
        kind: ``study``, ``score`` or ``tune``.
        name: Of the job.
        out: What is written to, as the command is told: an absolute path, or an address.
        place: Folder of the results: differs from ``out`` where a study gets a folder of its own in it.
        package: The files that go with it.
        shared: Paths that may have to go with it.
        needed: Paths that every node must see, with what named them.
        models: Paths among these, by the study's model that has them: it fails alone where they are not seen.
        names: All models of the study.
        gpus: Models that ask for a number of GPUs.
        build: From paths that were uploaded, by their places, to the arguments of the command; writes the study.
    """

    kind: str
    name: str
    out: str
    place: str
    package: Package
    build: Callable[[Mapping[str, str]], list[str]]
    shared: list[Shared] = field(default_factory=list)
    needed: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    gpus: dict[str, float] = field(default_factory=dict)

    def digest(self, env: Mapping[str, str], python: str) -> str:
        """Hash of what is sent: the same whether models are uploaded or read in place."""
        entry = [python, *self.build({})]
        return content_digest(self.package.hashes(), entry, env)


def plan_study(study: Study, out: str, name: str | None, package: Package) -> Plan:
    """A study, resolved: what it names and this machine has goes with it.

    Raises:
        ConfigError: It is to run without Ray, or its output's address holds a credential.
        InputError: A file that it names is missing, or cannot be uploaded.
    """
    if study.runtime.kind == "inline":
        raise ConfigError("runtime.kind", "inline", "uses no cluster", "give --set runtime.kind=ray")
    where = full_place(out)
    job = name or study.name
    plan = Plan("study", job, where, f"{where}/{study.name}", package, lambda moved: [])
    data = _StudyData(plan)
    prompts = tuple(
        p.model_copy(update={"path": data.source("prompts.path", p.path, f"files/prompts/{p.name}")})
        for p in study.prompts
    )
    corpus = tuple(
        p.model_copy(update={"path": data.source("repair.corpus.path", p.path, f"files/corpus/{p.name}")})
        for p in study.repair.corpus
    )
    choices = tuple(
        c.model_copy(update={"path": data.source("repair.evaluate.choices.path", c.path, f"files/choices/{c.name}")})
        for c in study.repair.evaluate.choices
    )
    judge = study.judge
    if judge.labels:
        judge = judge.model_copy(update={"labels": data.source("judge.labels", judge.labels, "files/labels")})
    if judge.guard:
        guard = judge.guard
        changes = {"path": data.model("judge.guard.path", guard.path, "files/guard")}
        if guard.template:
            _check_template(guard.template)
            changes["template"] = data.file("judge.guard.template", guard.template, "files/template")
        judge = judge.model_copy(update={"guard": guard.model_copy(update=changes)})
    models = tuple(data.spec(spec) for spec in study.models)
    evaluate = study.repair.evaluate.model_copy(update={"choices": choices})
    repair = study.repair.model_copy(update={"corpus": corpus, "evaluate": evaluate})
    given = study.model_copy(update={"prompts": prompts, "models": models, "judge": judge, "repair": repair})
    plan.names = {spec.name for spec in study.models}
    plan.gpus = {spec.name: spec.gpus for spec in study.models if not isinstance(spec.gpus, str)}

    def build(moved: Mapping[str, str]) -> list[str]:
        package.text(STUDY, dump_study(_moved(given, moved)))
        return ["run", STUDY, "--out", where, "--address", "auto"]

    plan.build = build
    return plan


def plan_task(kind: str, options: Sequence[tuple[str, str | None]], name: str | None, package: Package) -> Plan:
    """``clifflab score`` or ``clifflab tune`` with its options.

    Args:
        kind: ``score`` or ``tune``.
        options: As they were given, in order; None is the value of a flag.
        name: Of the job; by default made of the output's last folder.
        package: Gets the small files.

    Raises:
        ConfigError: An option that is needed is missing, does not go with a cluster, or holds a credential.
        InputError: A file is missing, or cannot be uploaded.
    """
    for option, value in options:
        refuse_secret_address(option, value or "")
    values = dict(options)
    for option, remedy in {
        "--verify": "run it where the results are seen",
        "--address": "give it before score",
    }.items():
        if option in values:
            raise ConfigError(option, values[option], "is not submitted", remedy)
    if values.get("--runtime") == "inline":
        raise ConfigError("--runtime", "inline", "uses no cluster", "leave it out")
    output = values.get(_OUTPUT[kind])
    if not output:
        raise ConfigError(_OUTPUT[kind], "(absent)", "is required", f"see clifflab {kind} --help")
    where = full_place(output)
    if "://" in where:
        raise ConfigError(_OUTPUT[kind], where, "is no folder", "give one that all nodes share")
    plan = Plan(kind, name or _slug(kind, where), where, where, package, lambda moved: [])
    data = _StudyData(plan)
    study = _study_of(values.get("--study"))
    given: list[tuple[str, str | None]] = []
    for option, value in options:
        given.append((option, None if value is None else _rewritten(plan, data, option, value, study)))

    def build(moved: Mapping[str, str]) -> list[str]:
        if study:
            package.text(STUDY, dump_study(_moved(study, moved)))
        words = [kind]
        for option, value in given:
            words += [option] if value is None else [option, moved.get(value, value)]
        return [*words, "--address", "auto"]

    if study:
        study = study.model_copy(update={"models": tuple(_scored(data, study, values.get("--model")))})
    plan.build = build
    return plan


def _rewritten(plan: Plan, data: _StudyData, option: str, value: str, study: Study | None) -> str:
    if option == _OUTPUT[plan.kind]:
        return plan.out
    if option == "--study":
        return STUDY
    if option in _DATA[plan.kind]:
        return data.probes(value) if option == "--probes" else data.source(option, value, "files/data")
    if option == "--input":
        return data.there(option, value)
    if option == "--model" and not (study and value in [spec.name for spec in study.models]):
        return data.model(option, value, "files/model")
    return value


def _check_template(path: str) -> None:
    if Path(path).suffix.lower() not in _TEMPLATES:
        problem = "has no suffix of a template"
        raise InputError("judge.guard.template", path, problem, f"call it one of {', '.join(_TEMPLATES)}")


def _study_of(path: str | None) -> Study | None:
    if path is None:
        return None
    from clifflab.studyfile import load_study

    return load_study(Path(path))


def _scored(data: _StudyData, study: Study, model: str | None) -> list[ModelSpec]:
    """The study's models; the one that is scored with paths that every node knows."""
    asked = model or study.models[0].name
    return [data.spec(spec) if spec.name == asked else spec for spec in study.models]


class _StudyData:
    """Turns what a study or an option names into what a node understands."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._probes = 0

    def source(self, named: str, path: str, folder: str) -> str:
        """A prompt file or another set of rows: uploaded; in place if it is too large for that."""
        if _ELSEWHERE.match(path):
            return path
        if not Path(os.path.expanduser(path)).exists() and Path(path).is_absolute():
            return self.there(named, path)
        check_source(named, path)
        return self.file(named, path, folder)

    def file(self, named: str, path: str, folder: str) -> str:
        """Any file or folder."""
        if not Path(os.path.expanduser(path)).exists():
            return self.there(named, path) if Path(path).is_absolute() else self._missing(named, path)
        if self._plan.package.fits(path):
            return self._plan.package.add(named, path, folder)
        return self._in_place(named, path, folder)

    def model(self, named: str, path: str, folder: str) -> str:
        """A checkpoint: a hub id as it is; a path in place where every node sees it, else uploaded."""
        given = Path(os.path.expanduser(path))
        if _ELSEWHERE.match(path):
            return path
        if given.exists():
            return self._in_place(named, path, folder)
        looks_local = path.startswith(".") or given.suffix == ".gguf" or path.count("/") > 1
        return self.there(named, path) if given.is_absolute() or looks_local else path

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """A model of a study, and its adapter."""
        changes = {"path": self.model("models.path", spec.path, f"files/models/{spec.name}")}
        if spec.adapter and not spec.repairs:
            changes["adapter"] = self.model("models.adapter", spec.adapter, f"files/adapters/{spec.name}")
        self._plan.models |= {path: spec.name for path in changes.values() if path in self._plan.needed}
        return spec.model_copy(update=changes)

    def probes(self, path: str) -> str:
        """The probes of a finished study: the two files that are read, or the folder where this machine has none."""
        given = Path(os.path.expanduser(path))
        weights = given / "probes.safetensors" if given.is_dir() else given
        if not weights.is_file():
            return self.there("--probes", path)
        self._probes += 1
        folder = f"files/probes/{self._probes}"
        about = weights.with_suffix(".json")
        if about.is_file():
            self._plan.package.add("--probes", str(about), folder)
        return self._plan.package.add("--probes", str(weights), folder)

    def there(self, named: str, path: str) -> str:
        """A path that this machine may not have, and every node must."""
        if path.startswith(("hf:", "organism:", "package:")):
            return path
        full = path if "://" in path else os.path.abspath(os.path.expanduser(path))
        self._plan.needed[full] = named
        return full

    def _in_place(self, named: str, path: str, folder: str) -> str:
        full = os.path.abspath(os.path.expanduser(path))
        self._plan.shared.append(Shared(named, full, folder))
        return full

    def _missing(self, named: str, path: str) -> str:
        remedy = "check the path: it counts from the study's folder, or else from here"
        raise InputError(named, path, "no such file or folder", remedy)


def _moved(study: Study, moved: Mapping[str, str]) -> Study:
    """The study with uploaded paths by their places in the package."""

    def change(value: object) -> object:
        if isinstance(value, str):
            return moved.get(value, value)
        if isinstance(value, dict):
            return {key: change(part) for key, part in value.items()}
        return [change(part) for part in value] if isinstance(value, list) else value

    return Study.model_validate(change(study.model_dump(mode="json"))) if moved else study


def _slug(kind: str, where: str) -> str:
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", where.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "results"
    return last if last.startswith(kind) else f"{kind}-{last}"
