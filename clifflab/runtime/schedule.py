"""What to do next, over all models of a study at once: steps that are ready, queues by model, retries, failures.

Knows nothing of Ray: whoever carries the work out asks for tasks and says what came of them. Times are those of
``time.monotonic``.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from clifflab.config import RuntimeConfig
from clifflab.errors import ClifflabError, OutputError, WorkerError, shorten, without_credentials
from clifflab.runtime.events import EventLog
from clifflab.runtime.progress import Reporter
from clifflab.runtime.queues import Queues, Task
from clifflab.runtime.work import Job, Result
from clifflab.stages import STEPS, Context
from clifflab.stages.base import GUARD, Pair, upstream

_TRACEBACK = 4000  # characters of one in the event log
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Failure:
    """Why a model of the study has no results.

    Attributes:
        model: The model as it was given; a repair's failure is that of the model it repairs.
        step: Where it failed; ``None`` before the first step.
        unit: The piece of work.
        error: What was met.
    """

    model: str
    step: str | None
    unit: str | None
    error: BaseException

    def told(self) -> dict[str, Any]:
        """Plain data, for logs, the report and ``metrics.json``."""
        return {"model": self.model, "step": self.step, "unit": self.unit, "error": shorten(_text(self.error), 400)}


class Files(Protocol):
    """What a schedule asks of the study's folder.

    Attributes:
        shared: Whether all workers see the same files, as a group of them needs.
    """

    shared: bool

    def open(self, pair: Pair) -> None:
        """Bring here what planning a step reads."""
        ...

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The units of a step whose files are not there."""
        ...

    def finish(self, pair: Pair, counts: dict[str, Any]) -> None:
        """A step's outputs are there: name them in its manifest."""
        ...


class Schedule:
    """The steps of a study and where each of them stands.

    Args:
        context: The driver's.
        todo: Steps to do, each after those that it reads.
        settings: How often, and how soon, something is tried again.
        files: The study's folder.
        log: Told of everything.
        reporter: Shows the progress.
    """

    def __init__(
        self,
        context: Context,
        todo: list[Pair],
        settings: RuntimeConfig,
        files: Files,
        log: EventLog,
        reporter: Reporter,
    ) -> None:
        self._context, self._settings, self._files, self._log, self._reporter = context, settings, files, log, reporter
        self._order = {pair: place for place, pair in enumerate(todo)}
        wanted = set(todo)
        self._reads = {p: {q for q in upstream(context.study, STEPS, *p) if q in wanted} for p in todo}
        self._closed: list[Pair] = list(todo)  # not begun
        self._left: dict[Pair, int] = {}  # units of begun steps that are not done; the merge counts as one
        self.queues = Queues()
        self._never: set[Pair] = set()  # steps that will not be whole in this run
        self.failures: list[Failure] = []
        self.seconds: dict[Pair, deque[float]] = {}

    # -- what there is to do ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin every step whose inputs are whole.

        Raises:
            ClifflabError: A step of the whole study cannot be planned.
        """
        unfinished = set(self._closed) | set(self._left) | self._never
        for pair in [p for p in self._closed if not self._reads[p] & unfinished]:
            self._closed.remove(pair)
            if self.failed(pair[1]):
                self._never.add(pair)
                continue
            try:
                self._open(pair)
            except Exception as error:
                if pair[1] is None:
                    raise
                self._fail(Task(Job(*pair), None, self._order[pair]), error)

    def _open(self, pair: Pair) -> None:
        name, model = pair
        self._files.open(pair)
        jobs = [Job(name, model, unit) for unit in STEPS[name].plan(self._context, model)]
        missing = self._files.missing(jobs)
        self._reporter.start(_title(pair), len(jobs), len(jobs) - len(missing))
        self._log.write("step_start", step=name, model=model, units=len(jobs), missing=len(missing))
        self._left[pair] = len(missing) + 1
        self._add(missing or [Job(name, model)])

    def _add(self, jobs: list[Job]) -> None:
        tasks = []
        for job in jobs:
            key = STEPS[job.step].needs(self._context, job.unit, job.model)
            tasks.append(Task(job, key, self._order[job.step, job.model], groups=self._files.shared))
        self.queues.add(tasks)
        first, keys = jobs[0], {task.key for task in tasks}
        key = keys.pop() if len(keys) == 1 else None
        spec = next((spec for spec in self._context.study.models if spec.name == key), None)
        needs = {"gpus": spec.gpus, "replicas": spec.replicas} if spec else {}
        self._log.write(
            "ready", step=first.step, model=first.model, units=len(jobs), merge=first.unit is None, key=key, **needs
        )  # fmt: skip

    def take(self, task: Task) -> None:
        """A task is begun."""
        self.queues.take(task)

    def expects(self, key: str) -> bool:
        """Whether work for a model in memory may still come."""
        left = [pair for pair in (*self._closed, *self._left) if not self.failed(pair[1])]
        coming = any(STEPS[name].loads and (model == key or key == GUARD) for name, model in left if model)
        return coming or bool(self.queues.size(key))

    @property
    def models(self) -> set[str]:
        """The given models, those that repairs make left out."""
        return {self.root(model.name) for model in self._context.study.models}

    @property
    def over(self) -> bool:
        """Whether nothing waits, and no step can be begun any more; what runs may change that."""
        unfinished = set(self._closed) | set(self._left) | self._never
        ready = any(not self._reads[pair] & unfinished for pair in self._closed)
        return not self.queues and not ready

    def mean_seconds(self, pair: Pair) -> float | None:
        """Mean time of the last units of a step; ``None`` before the first."""
        seconds = self.seconds.get(pair)
        return sum(seconds) / len(seconds) if seconds else None

    # -- what came of it -------------------------------------------------------------------------------------------

    def done(self, task: Task, result: Result) -> None:
        """A worker came back with a result, or with a user's error.

        Raises:
            ClifflabError: The error ends the study: it is not of one model.
        """
        self._log.result(result)
        if result.error:
            if isinstance(result.error, OutputError):
                self.again(task, result.error)
            else:
                self._fail(task, result.error)
            return
        pair = task.pair
        if pair not in self._left:  # its model failed in the meantime: what was made stays for another run
            return
        self.seconds.setdefault(pair, deque(maxlen=20)).append(result.seconds)
        self._left[pair] -= 1
        if task.job.unit:
            self._reporter.advance(_title(pair))
        if not self._left[pair]:
            del self._left[pair]
            self._files.finish(pair, result.counts)
            self._log.write("step_done", step=pair[0], model=pair[1], **result.counts)
            self._reporter.finish(_title(pair))
        elif self._left[pair] == 1 and pair not in self._never:
            self._add([Job(*pair)])

    def lost(self, task: Task, reason: str, **about: Any) -> None:
        """The worker died, or hung, at a task: it is done again, up to the cap.

        Raises:
            WorkerError: It was the last try, of work for the study as a whole.
        """
        job = task.job
        where = {"step": job.step, "model": job.model, "unit": job.name, "attempt": task.attempt}
        self._log.write("worker_lost", **about, **where, reason=reason)
        hung = reason.startswith("hung")
        if not task.used_up(self._settings.max_attempts):
            what = "hung" if hung else "died"
            self._reporter.note(f"a worker {what} at {job.step} {job.name} (try {task.attempt}): done again elsewhere")
        remedy = "look for what blocks it, or raise runtime.hang_seconds" if hung else (
            "look for a lack of memory, or lower the step's batch_size"
        )  # fmt: skip
        self.again(
            task,
            WorkerError(
                f"{job.step}: unit {job.name}: its worker {'hung or ' if hung else ''}died {task.attempt} times "
                f"({shorten(reason)}); {remedy}, and run again: it continues"
            ),
        )

    def again(self, task: Task, error: BaseException) -> None:
        """A task failed in a way that may pass: it waits for its next try, up to the cap."""
        if task.pair not in self._left:  # its model was left in the meantime
            return
        if task.used_up(self._settings.max_attempts):
            self._poison(task, error)
            return
        pause = min(_LONGEST_PAUSE, self._settings.backoff_seconds * 2 ** (task.attempt - 1))
        task.attempt += 1
        task.after = time.monotonic() + pause
        if not isinstance(error, WorkerError):
            self._log.write(
                "retry", step=task.job.step, model=task.job.model, unit=task.job.name, attempt=task.attempt,
                pause=round(pause, 3), error=shorten(_text(error), 400), traceback=_traceback(error),
            )  # fmt: skip
        self.queues.postpone(task)

    def lost_in_load(self, model: str, reason: str) -> None:
        """Workers die while they load a model, whatever they are to do with it: it is left."""
        remedy = "look for a lack of memory, or give it more gpus"
        self.give_up(
            model, WorkerError(f"{model}: its workers died while they loaded it ({shorten(reason)}); {remedy}")
        )

    def give_up_key(self, key: str, error: ClifflabError) -> None:
        """No worker can have a model in memory: the models whose work waits for it are left."""
        for pair in self.queues.counts(key):
            if pair[1] is not None and not self.failed(pair[1]):
                self.give_up(pair[1], error)

    def give_up(self, model: str, error: ClifflabError) -> None:
        """A model cannot be used here."""
        pair = next((pair for pair in self._order if pair[1] == model), None)
        if pair is not None:
            self._fail(Task(Job(*pair), None, self._order[pair]), error)

    def _poison(self, task: Task, error: BaseException) -> None:
        """It fails wherever it is tried. The step's other units are done; it and its model are not."""
        if isinstance(error, OutputError) or task.job.model is None:
            raise error
        self._never.add(task.pair)
        self._note(task, error)
        self._left[task.pair] -= 1  # its other units are done, and never merged

    def _fail(self, task: Task, error: BaseException) -> None:
        """It would fail wherever it is tried: its model is left, the others go on."""
        if task.job.model is None or isinstance(error, OutputError):
            raise error
        self._note(task, error)
        group = self.group(task.job.model)
        self.queues.drop(group)
        self._never |= {pair for pair in [*self._closed, *self._left] if pair[1] in group}
        self._closed = [pair for pair in self._closed if pair[1] not in group]
        self._left = {pair: left for pair, left in self._left.items() if pair[1] not in group}

    def _note(self, task: Task, error: BaseException) -> None:
        job = task.job
        failure = Failure(self.root(job.model or ""), job.step, job.name, error)
        more = {} if isinstance(error, ClifflabError) else {"traceback": _traceback(error)}
        self._log.write(
            "unit_failed", step=job.step, model=job.model, unit=job.name, attempts=task.attempt,
            error=failure.told()["error"], **more,
        )  # fmt: skip
        if not self.failed(failure.model):
            self._log.write("model_failed", **failure.told(), models=sorted(self.group(failure.model)))
        self.failures.append(failure)

    def failed(self, model: str | None) -> bool:
        """Whether a model has failed, itself or in its repair."""
        return model is not None and self.root(model) in {failure.model for failure in self.failures}

    def root(self, model: str) -> str:
        """The given model that a model belongs to: that which it is a repair of, or itself."""
        spec = next((spec for spec in self._context.study.models if spec.name == model), None)
        return self.root(spec.repairs) if spec and spec.repairs else model

    def group(self, model: str) -> set[str]:
        """All models that belong together with one."""
        return {spec.name for spec in self._context.study.models if self.root(spec.name) == self.root(model)}


def _title(pair: Pair) -> str:
    return f"{pair[0]} {pair[1] or ''}".strip()


def _text(error: BaseException) -> str:
    """One line of an error."""
    if isinstance(error, ClifflabError):
        return str(error)
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".strip()


def _traceback(error: BaseException) -> str | None:
    if isinstance(error, ClifflabError):
        return None
    text = getattr(error, "traceback_str", None) or "".join(traceback.format_exception(error))
    return without_credentials(text)[-_TRACEBACK:]
