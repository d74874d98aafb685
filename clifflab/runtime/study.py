"""Running a study from its first missing piece to its report."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clifflab.artifacts import code_version, read_json, refuse_links, write_text
from clifflab.config import Study
from clifflab.errors import InputError, OutputError, shorten
from clifflab.runtime.events import EventLog
from clifflab.runtime.folder import StudyFiles
from clifflab.runtime.folder import identify as identify
from clifflab.runtime.folder import plan as plan
from clifflab.runtime.prepare import check_each, on_gpus, prepare_each, without
from clifflab.runtime.prepare import prepare as prepare
from clifflab.runtime.progress import Reporter, Silent
from clifflab.runtime.reach import reach
from clifflab.runtime.schedule import Failure, Schedule
from clifflab.runtime.status import Watcher
from clifflab.runtime.storage import Store, open_store
from clifflab.runtime.submit.here import package_folder
from clifflab.stages import Context, Identities
from clifflab.stages.base import Pair
from clifflab.studyfile import dump_study


class Runtime(Protocol):
    """Carries work out somewhere."""

    @property
    def places(self) -> int:
        """How many workers there are places for."""
        ...

    @property
    def gpus(self) -> float:
        """GPUs that there are."""
        ...

    def run(self, schedule: Schedule) -> None:
        """Carry a schedule out."""
        ...

    def adopt(self, study: Study, identities: Identities) -> None:
        """Work for this study from now on."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


@dataclass(frozen=True)
class StudyResult:
    """Where a finished study lies, and what it found.

    Attributes:
        root: Its folder.
        metrics: The content of ``metrics.json``.
        warnings: What a reader of the numbers must know; not empty where a probe could not be trained.
        failed: Models that have no results, each with ``model, step, unit, error``.
        address: Where the results are kept, if not in that folder.
    """

    root: Path
    metrics: dict[str, Any]
    warnings: list[str]
    failed: list[dict[str, Any]] = field(default_factory=list)
    address: str = ""


def run(
    study: Study, out: Path | str = "runs", *, runtime: str | None = None, reporter: Reporter | None = None
) -> StudyResult:
    """Run a study, or what is missing of it.

    A model that cannot be used, or fails on the way, does not stop the others: the result is then theirs, and
    ``failed`` says what is missing.

    Args:
        study: What to measure.
        out: Parent of its folder, a path or an address (``s3://bucket/runs``); results go to ``out/<study.name>/``.
        runtime: ``ray`` or ``inline``; the study's own setting by default.
        reporter: Told of the progress.

    Raises:
        ClifflabError: A user's mistake, in one line; or what the first of the models failed by, where all did.
    """
    reporter = reporter or Silent()
    given = study
    study, failures = prepare_each(given)
    kind, place, memory = runtime or study.runtime.kind, str(out), None
    if kind == "ray" and study.runtime.address is not None:
        place = place if "://" in place else str(Path(place).absolute())
        unseen, memory = reach(without(study, {f.model for f in failures}), place, reporter, package_folder())
        failures += unseen
        study = on_gpus(study, given) if memory else study
    store = open_store(place, study.name)
    with store.lock():
        refuse_links(store.root)
        store.pull()
        run = _Run(study, store, place, kind, reporter, memory)
        try:
            run.carry_out(failures)
        finally:
            with suppress(OutputError):  # where it was the disk, that is what is told
                run.close()
                store.push()
    metrics = read_json(store.root / "metrics.json")
    warnings = [f"{name}: {m['probe']['reason']}" for name, m in metrics["models"].items() if m["probe"].get("reason")]
    return StudyResult(store.root, metrics, warnings, told(failures), store.address if store.remote else "")


def followers(full: Study, left: Study, failures: list[Failure]) -> list[Failure]:
    """The models that are left out because one that they are compared with failed."""
    known, kept = {failure.model for failure in failures}, {model.name for model in left.models}
    return [
        Failure(
            model.name, None, None,
            InputError("models.before", model.before, "failed, and this model is compared with it", "mend that one"),
        )
        for model in full.models
        if model.name not in known | kept and not model.repairs
    ]  # fmt: skip


def told(failures: list[Failure]) -> list[dict[str, Any]]:
    """Plain data of failures, the first of each model."""
    return list({failure.model: failure.told() for failure in reversed(failures)}.values())[::-1]


@dataclass
class _Run:
    """One run of a study; ``study`` names all its models, those that cannot be used too."""

    study: Study
    store: Store
    out: str
    kind: str
    reporter: Reporter
    gpu_memory_mb: int | None

    def __post_init__(self) -> None:
        self._watcher = Watcher(self.store.root, self.study.name)
        self._log = EventLog(self.store.root / "events.jsonl", [self._watcher.add])

    def carry_out(self, failures: list[Failure]) -> None:
        """Do what is missing; what fails joins the failures."""
        context = self._identified(failures)
        write_text(self.store.root / "study.yaml", dump_study(self.study))
        todo = plan(context)
        first = {model for step, model in todo if step == "traces"}
        if first and (more := check_each(context.study, first, self.reporter.note)):
            failures += more
            context = self._identified(failures)
            todo = plan(context)
        self._log.write(
            "run_start", driver_pid=os.getpid(), runtime=self.kind, code=code_version(), steps=len(todo),
            models=[model.name for model in self.study.models], address=self.study.runtime.address,
            plan=[list(pair) for pair in todo], backoff_seconds=self.study.runtime.backoff_seconds,
        )  # fmt: skip
        for failure in failures:
            self._tell(failure)
        files = StudyFiles(context, self.store)
        files.begin(todo, {model.name for model in self.study.models} - {model.name for model in context.study.models})
        try:
            if todo:
                context = self._work(context, todo, files, failures)
            else:
                self.reporter.note("everything is whole already: nothing to compute")
        except BaseException as error:
            if isinstance(error, Exception):  # not where it was stopped
                self._log.write("run_done", state="failed", failed=told(failures), error=shorten(str(error), 400))
            raise
        StudyFiles(context, self.store).end(told(failures))
        self._log.write("run_done", state="partial" if failures else "done", failed=told(failures))

    def close(self) -> None:
        """Tell how it was left."""
        self._watcher.close()

    def _identified(self, failures: list[Failure]) -> Context:
        """The context of the models that can be used."""
        study = without(self.study, {failure.model for failure in failures})
        if not study.models:
            raise failures[0].error
        failures += followers(self.study, study, failures)
        return identify(study, self.store.root, told(failures))

    def _work(self, context: Context, todo: list[Pair], files: StudyFiles, failures: list[Failure]) -> Context:
        """Carry the steps out; the context of what the report is about."""
        runtime = self._start(context)
        try:
            self._log.write("workers", gpus=runtime.gpus, places=runtime.places)
            schedule = Schedule(context, todo, context.study.runtime, files, self._log, self.reporter)
            runtime.run(schedule)
            if not schedule.failures:
                return context
            for failure in schedule.failures:
                self._show(failure)
            failures += schedule.failures
            context = self._identified(failures)
            runtime.adopt(context.study, context.identities)
            files = StudyFiles(context, self.store)
            rest = Schedule(context, plan(context), context.study.runtime, files, self._log, self.reporter)
            runtime.run(rest)
            if rest.failures:
                raise rest.failures[0].error
            return context
        finally:
            self.reporter.abort()
            runtime.close()

    def _tell(self, failure: Failure) -> None:
        self._log.write("model_failed", **failure.told())
        self._show(failure)

    def _show(self, failure: Failure) -> None:
        self.reporter.note(f"{failure.model}: {failure.told()['error']} (left out: the other models go on)")

    def _start(self, context: Context) -> Runtime:
        study, root, identities = context.study, self.store.root, context.identities
        if self.kind == "inline":
            from clifflab.runtime.inline import InlineRuntime

            return InlineRuntime(study, self.store, identities)
        from clifflab.runtime.actor import Place
        from clifflab.runtime.fleet import Fleet

        place = Place(str(root.parent) if not self.store.remote else self.out, package_folder())
        return Fleet(study, place, root, identities, self._log, self.reporter, self.gpu_memory_mb)
