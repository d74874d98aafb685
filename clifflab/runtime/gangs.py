"""Groups of workers that do one task of a study together (a fine-tune), beside the workers that do one each."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clifflab.config import Study
from clifflab.errors import ClifflabError
from clifflab.runtime.gang import Gang, run_gang
from clifflab.runtime.queues import Task
from clifflab.runtime.storage import LocalStore
from clifflab.runtime.work import Job, Result, Worker
from clifflab.stages import Identities
from clifflab.stages.base import Layout
from clifflab.tuning.group import Group
from clifflab.tuning.loop import Listen

Loss = dict[str, Any]
Ended = tuple[Task, Result | BaseException, list[Loss]]


class Gangs:
    """The groups that are at work; each is waited for in a thread of its own.

    Args:
        study: The study, resolved.
        root: Its folder, which all machines see.
        identities: Its fingerprints.

    Attributes:
        waiting: Whether one waits for places.
        held: Machine, GPUs and cores of each worker that is at work.
    """

    def __init__(self, study: Study, root: Path, identities: Identities) -> None:
        self._study, self._root, self._identities = study, root, identities
        self._ended: queue.Queue[Ended] = queue.Queue()
        self._running: dict[int, list[tuple[str, float, float]]] = {}
        self.waiting = False

    @property
    def running(self) -> int:
        """How many groups are at work."""
        return len(self._running)

    @property
    def held(self) -> list[tuple[str, float, float]]:
        """What they hold."""
        return [place for places in self._running.values() for place in places]

    def workers(self, gpus: float) -> int:
        """Workers of a group: as the study says, or one per GPU of a machine."""
        wanted = self._study.repair.tune.workers
        return max(1, int(gpus)) if wanted == "auto" else wanted

    def start(self, task: Task, workers: int, places: list[tuple[str, float, float]]) -> None:
        """Let a group begin where there is room; the driver's account takes it to be in these places.

        Args:
            task: What it does.
            workers: How many it has.
            places: Machine, GPUs and cores of each.
        """
        self._running[id(task)] = places
        cpus = places[0][2] if places else 1.0
        threading.Thread(target=self._work, args=(task, workers, cpus), daemon=True).start()

    def finished(self) -> list[Ended]:
        """What ended since the last call: a result, or what the group met that is no user's error."""
        found = []
        while not self._ended.empty():
            ended = self._ended.get()
            self._running.pop(id(ended[0]))
            found.append(ended)
        return found

    def moved(self, node: str) -> int:
        """A machine is gone: the workers that were there come up elsewhere, once there is room. How many they are."""
        count = 0
        for task, places in self._running.items():
            left = [place for place in places if place[0] != node]
            count += len(places) - len(left)
            self._running[task] = left
        return count

    def _work(self, task: Task, workers: int, cpus: float) -> None:
        job, losses, starts = task.job, list[Loss](), 0
        assert job.unit is not None
        settings = self._study.repair.tune
        # Under the step's fingerprint: what a killed driver left is gone on with, and never taken for another recipe's.
        parts = Layout(self._root).parts(job.step, job.model, self._identities.steps[job.step, job.model])
        gang = Gang(parts / f"{job.unit.key}-gang", workers, self._study.runtime.threads, settings.max_failures, cpus)

        def listen(kind: str, entry: dict[str, Any]) -> None:
            nonlocal starts
            if kind == "start":
                starts += 1
                if starts > 1:
                    losses.append({"attempt": starts - 1, "reason": f"training goes on from step {entry['done']}"})

        body = _Together(self._study, str(self._root), self._identities, job)
        began, clock = time.time(), time.monotonic()
        try:
            counts = run_gang(body, gang, self._study.runtime, listen)
        except ClifflabError as error:
            nowhere: dict[str, Any] = {"worker": "group", "node": None, "pid": None, "gpu_ids": []}
            self._ended.put((task, Result(job, nowhere, error=error, began=began), losses))
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the driver's own thread
            self._ended.put((task, error, losses))
            return
        seconds = round(time.monotonic() - clock, 3)
        where = {"worker": "group", **counts.pop("where")}
        loads = counts.pop("loads")
        self._ended.put((task, Result(job, where, seconds, counts, loads, began=round(began, 3)), losses))


@dataclass(frozen=True)
class _Together:
    """What every worker of a group does of a study's job; plain data that crosses process borders."""

    study: Study
    root: str
    identities: Identities
    job: Job

    def __call__(self, group: Group, listen: Listen) -> dict[str, Any]:
        """Do the job as one of the group; the counts, and where the first worker did it."""
        import ray

        gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
        node = ray.get_runtime_context().get_node_id()
        worker = Worker(self.study, LocalStore(Path(self.root)), self.identities, node, gpu_ids)
        result = worker.do(self.job, group, listen)
        if result.error:
            raise result.error
        return {**result.counts, "where": result.where, "loads": result.loads}
