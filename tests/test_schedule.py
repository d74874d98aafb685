"""The order of work over several models: what waits for what, retries and their pauses, poison, models that fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clifflab.config import RuntimeConfig, Study
from clifflab.errors import ClifflabError, InputError, OutputError, WorkerError
from clifflab.runtime import schedule as module
from clifflab.runtime.events import EventLog
from clifflab.runtime.progress import Silent
from clifflab.runtime.queues import Task
from clifflab.runtime.schedule import Schedule
from clifflab.runtime.work import Job, Result
from clifflab.stages.base import Unit

WHERE = {"worker": "w", "node": "n", "pid": 1, "gpu_ids": []}


def step(name: str, inputs: tuple[str, ...] = (), *, per_model: bool = True, units: int = 2, loads: bool = True) -> Any:
    return SimpleNamespace(
        name=name, inputs=inputs, per_model=per_model, transient=False, compares=False, loads=loads,
        applies=lambda study, model: True,
        plan=lambda context, model: [Unit(name, model, f"{number}") for number in range(units)],
        needs=lambda context, unit, model: model if unit and loads else None,
    )  # fmt: skip


STEPS = {
    each.name: each
    for each in (
        step("prompts", per_model=False, units=1, loads=False),
        step("traces", ("prompts",)),
        step("judge", ("traces",), loads=False, units=1),
        step("cliff", ("traces",)),
        step("report", ("judge", "cliff"), per_model=False, units=1, loads=False),
    )
}


class Files:
    """Remembers what was finished; ``there`` are units of a run before."""

    shared = True

    def __init__(self, there: set[tuple[str, str | None, str]] = frozenset()) -> None:  # type: ignore[assignment]
        self.there, self.finished = there, list[tuple[str, str | None]]()

    def open(self, pair: tuple[str, str | None]) -> None:
        pass

    def missing(self, jobs: Any) -> list[Job]:
        return [job for job in jobs if (job.step, job.model, job.name) not in self.there]

    def finish(self, pair: tuple[str, str | None], counts: dict[str, Any]) -> None:
        self.finished.append(pair)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(module, "STEPS", STEPS)
    study = Study.model_validate(
        {
            "name": "s",
            "models": [{"name": name, "path": "organism:planted"} for name in ("a", "b")],
            "prompts": [{"name": "p", "path": "organism:benign", "label": "benign", "limit": 4}],
        }
    )

    def build(files: Files | None = None, **settings: Any) -> Schedule:
        pairs = [("prompts", None)]
        pairs += [(name, model) for model in ("a", "b") for name in ("traces", "judge", "cliff")]
        pairs += [("report", None)]
        runtime = RuntimeConfig(max_attempts=3, backoff_seconds=8, **settings)
        context: Any = SimpleNamespace(study=study)
        log = EventLog(tmp_path / "events.jsonl")
        found = Schedule(context, pairs, runtime, files or Files(), log, Silent())
        found.open()
        return found

    return build


def log(tmp_path: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return [entry for entry in found if entry["event"] == event]


def waiting(schedule: Schedule, now: float) -> list[Task]:
    """Everything that may begin, the earliest step first."""
    schedule.queues.settle(now)
    return list(schedule.queues)


def names(tasks: list[Task]) -> list[str]:
    return [f"{task.job.step}/{task.job.model}/{task.job.name}" for task in tasks]


def do(schedule: Schedule, task: Task, error: ClifflabError | None = None) -> None:
    schedule.take(task)
    schedule.done(task, Result(task.job, dict(WHERE), 0.1, error=error))
    schedule.open()


def do_all(schedule: Schedule, now: float = 0.0, unless: Any = lambda task: False) -> list[str]:
    done = []
    while left := [task for task in waiting(schedule, now) if not unless(task)]:
        done += names(left[:1])
        do(schedule, left[0])
    return done


def test_models_wait_for_their_own_steps_alone(make: Any) -> None:
    files = Files()
    schedule = make(files)
    assert names(waiting(schedule, 0.0)) == ["prompts/None/0"]
    do(schedule, waiting(schedule, 0.0)[0])
    assert names(waiting(schedule, 0.0)) == ["prompts/None/merge"]
    do(schedule, waiting(schedule, 0.0)[0])
    assert names(waiting(schedule, 0.0)) == ["traces/a/0", "traces/a/1", "traces/b/0", "traces/b/1"]
    assert [task.key for task in waiting(schedule, 0.0)] == ["a", "a", "b", "b"]
    done = do_all(schedule, unless=lambda task: task.job.model == "a")
    assert "cliff/b/merge" in done, "b does not wait for a"
    assert "report/None/0" not in done
    assert not schedule.over
    assert do_all(schedule)[-1] == "report/None/merge"
    assert schedule.over
    assert files.finished[-1] == ("report", None)
    assert len(files.finished) == len(set(files.finished)) == 8


def test_what_is_there_is_not_done_again(make: Any) -> None:
    schedule = make(Files({("prompts", None, "0"), ("traces", "a", "0"), ("traces", "b", "0"), ("traces", "b", "1")}))
    done = do_all(schedule)
    assert [name for name in done if name.startswith(("prompts", "traces"))] == [
        "prompts/None/merge", "traces/a/1", "traces/a/merge", "traces/b/merge",
    ]  # fmt: skip


def test_a_lost_unit_waits_and_is_done_again_up_to_the_cap(make: Any, tmp_path: Path) -> None:
    schedule = make()
    do_all(schedule, unless=lambda task: task.job.step == "traces")
    task = waiting(schedule, 0.0)[0]
    for attempt, pause in ((1, 8), (2, 16)):
        import time

        schedule.take(task)
        schedule.lost(task, "killed", worker="w")
        now = time.monotonic()
        assert task not in waiting(schedule, now), "it waits"
        assert schedule.queues.next_pause(now) == pytest.approx(pause, abs=1)
        assert task in waiting(schedule, now + pause + 1)
        assert task.attempt == attempt + 1
    schedule.take(task)
    schedule.lost(task, "killed", worker="w")
    assert isinstance(schedule.failures[0].error, WorkerError)
    assert "its worker died 3 times" in str(schedule.failures[0].error)
    assert [entry["attempt"] for entry in log(tmp_path, "worker_lost")] == [1, 2, 3]
    done = do_all(schedule)
    assert "traces/a/1" in done, "the poisoned unit's neighbours are done"
    assert not {"traces/a/merge", "judge/a/0", "report/None/0"} & set(done)
    assert "cliff/b/merge" in done
    assert schedule.over
    assert [entry["model"] for entry in log(tmp_path, "model_failed")] == ["a"]


def test_what_fails_in_one_place_alone_is_no_poison(make: Any) -> None:
    """A broken GPU fails whatever is tried on it: that many tries count only where they were in several places."""
    schedule = make()
    do_all(schedule, unless=lambda task: task.job.step == "traces")
    task = waiting(schedule, 0.0)[0]
    task.places = 4
    for place in ("bad", "bad", "bad", "bad", "other", "third"):
        assert not schedule.failures
        assert task in waiting(schedule, 1e9)
        schedule.take(task)
        task.tried.add(place)
        schedule.again(task, RuntimeError("CUDA error"))
    assert schedule.failures


def test_a_users_error_ends_the_model_and_no_other(make: Any, tmp_path: Path) -> None:
    schedule = make()
    do_all(schedule, unless=lambda task: task.job.step == "traces")
    first, second = waiting(schedule, 0.0)[:2]
    schedule.take(second)  # under way when the first fails
    do(schedule, first, InputError("models.path", "a", "is broken", "mend it"))
    schedule.done(second, Result(second.job, dict(WHERE), 0.1))
    assert {task.job.model for task in waiting(schedule, 0.0)} == {"b"}
    do_all(schedule)
    assert schedule.over
    assert [(failure.model, failure.step) for failure in schedule.failures] == [("a", "traces")]
    assert log(tmp_path, "unit_failed")[0]["error"].endswith("is broken; mend it")


def test_bugs_and_disks_are_tried_again(make: Any) -> None:
    schedule = make()
    do_all(schedule, unless=lambda task: task.job.step == "traces")
    task = waiting(schedule, 0.0)[0]
    for _ in range(3):
        assert task in waiting(schedule, 1e9)
        schedule.take(task)
        schedule.again(task, RuntimeError("CUDA error"))
    assert schedule.failures[0].told()["error"] == "RuntimeError: CUDA error"
    other = next(task for task in waiting(schedule, 0.0) if task.job.model == "b")
    full = OutputError("output", "/x", "no space left on the disk", "make space")
    for _ in range(2):
        assert other in waiting(schedule, 1e9)
        schedule.take(other)
        schedule.done(other, Result(other.job, dict(WHERE), 0.1, error=full))
    assert other in waiting(schedule, 1e9)
    schedule.take(other)
    with pytest.raises(OutputError, match="no space"):  # every model writes to that disk
        schedule.done(other, Result(other.job, dict(WHERE), 0.1, error=full))


def test_work_on_the_whole_study_ends_it(make: Any) -> None:
    schedule = make()
    task = waiting(schedule, 0.0)[0]
    schedule.take(task)
    with pytest.raises(InputError):
        schedule.done(task, Result(task.job, dict(WHERE), 0.1, error=InputError("prompts", "p", "bad", "mend")))


def test_a_model_is_expected_to_come_back(make: Any) -> None:
    schedule = make()
    assert schedule.expects("a")
    do_all(schedule)
    assert not schedule.expects("a")
