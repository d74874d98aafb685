"""Jobs over Ray actors: one per GPU (or per core), each with its models loaded once.

The driver owns the queue. An actor that dies is replaced and its job is done again by another, up to a cap; results are
files under names that follow from the job, so doing one twice is harmless.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clifflab.config import Study
from clifflab.errors import ClifflabError, WorkerError, shorten
from clifflab.runtime.gang import Gang, run_gang
from clifflab.runtime.local import start_ray
from clifflab.runtime.work import Job, Result, Worker
from clifflab.stages import STEPS, Identities
from clifflab.stages.base import GangStep, Layout
from clifflab.tuning.group import Group
from clifflab.tuning.loop import Listen


class ActorRuntime:
    """A pool of actors that outlives the steps of a study, so that each actor loads a model once."""

    def __init__(self, study: Study, root: Path, identities: Identities) -> None:
        self._started = start_ray(study.runtime)
        import ray

        self._ray, self._study, self._root = ray, study, root
        self._identities = ray.put(identities)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(resources.get("GPU", 0))
        wanted = study.runtime.workers
        # In a Ray that runs already there may be fewer places than workers wanted; an actor without one never starts.
        places = gpus or max(1, int(resources.get("CPU", 1)))
        self.workers = places if wanted == "auto" else min(wanted, places)
        self._options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
        self._idle: deque[Any] = deque()
        self._alive: list[Any] = []
        self._lost: list[dict[str, object]] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Results as they come.

        Raises:
            WorkerError: A job's worker died more often than ``runtime.max_attempts``.
        """
        together = [job for job in jobs if job.unit and isinstance(STEPS[job.step], GangStep)]
        for job in together:
            yield self._together(job)
        jobs = [job for job in jobs if job not in together]
        errors = self._ray.exceptions
        dead = (errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError, errors.WorkerCrashedError)
        queue: deque[tuple[Job, int]] = deque((job, 1) for job in jobs)
        running: dict[Any, tuple[Any, Job, int]] = {}
        while queue or running:
            while queue and (actor := self._take()) is not None:
                job, attempt = queue.popleft()
                running[actor.do.remote(job)] = (actor, job, attempt)
            done, _ = self._ray.wait(list(running), num_returns=1)
            actor, job, attempt = running.pop(done[0])
            try:
                result: Result = self._ray.get(done[0])
            except dead as error:
                self._ray.kill(actor)  # a worker that ran out of memory may still stand
                self._alive.remove(actor)
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                self._lost.append(
                    {"step": job.step, "model": job.model, "unit": job.name, "attempt": attempt, "reason": reason}
                )
                if attempt >= self._study.runtime.max_attempts:
                    raise WorkerError(
                        f"{job.step}: unit {job.name}: its worker died {attempt} times ({shorten(reason)}); "
                        "look for a lack of memory, or lower the step's batch_size, and run again: it continues"
                    ) from None
                queue.appendleft((job, attempt + 1))
                continue
            self._idle.append(actor)
            result.attempt = attempt
            yield result

    def _together(self, job: Job) -> Result:
        """Let a group of workers do one job; the pool's actors give their places up for it."""
        for actor in self._alive:
            self._ray.kill(actor)
        self._alive.clear()
        self._idle.clear()
        assert job.unit is not None
        settings = self._study.repair.tune
        workers = None if settings.workers == "auto" else settings.workers
        identities = self._ray.get(self._identities)
        # Under the step's fingerprint: what a killed driver left is gone on with, and never taken for another recipe's.
        parts = Layout(self._root).parts(job.step, job.model, identities.steps[job.step, job.model])
        place = parts / f"{job.unit.key}-gang"
        gang = Gang(place, workers, self._study.runtime.threads, settings.max_failures)
        starts = 0

        def listen(kind: str, entry: dict[str, Any]) -> None:
            nonlocal starts
            if kind == "start":
                starts += 1
                if starts > 1:
                    about = {"step": job.step, "model": job.model, "unit": job.name, "attempt": starts - 1}
                    self._lost.append({**about, "reason": f"training goes on from step {entry['done']}"})

        body = _Together(self._study, str(self._root), identities, job)
        began = time.monotonic()
        try:
            counts = run_gang(body, gang, self._study.runtime, listen)
        except ClifflabError as error:
            return Result(job, {"node": None, "pid": None, "gpu_ids": []}, error=error)
        seconds = round(time.monotonic() - began, 3)
        return Result(job, counts.pop("where"), seconds, counts, counts.pop("loads"))

    def lost(self) -> list[dict[str, object]]:
        """Workers lost since the last call, with what they were at."""
        gone, self._lost = self._lost, []
        return gone

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for actor in self._alive:
            self._ray.kill(actor)
        self._alive.clear()
        self._idle.clear()
        if self._started:
            self._ray.shutdown()

    def _take(self) -> Any:
        """An idle actor, a new one while there are too few, or ``None``."""
        if self._idle:
            return self._idle.popleft()
        if len(self._alive) >= self.workers:
            return None
        actor = self._ray.remote(_Actor).options(**self._options).remote(self._study, str(self._root), self._identities)
        self._alive.append(actor)
        return actor


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
        worker = Worker(self.study, Path(self.root), self.identities, node, gpu_ids)
        result = worker.do(self.job, group, listen)
        if result.error:
            raise result.error
        return {**result.counts, "where": result.where, "loads": result.loads}


class _Actor:
    """The worker inside a Ray actor: sees only its own GPU."""

    def __init__(self, study: Study, root: str, identities: Identities) -> None:
        import ray

        context = ray.get_runtime_context()
        gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
        self._worker = Worker(study, Path(root), identities, context.get_node_id(), gpu_ids)

    def do(self, job: Job) -> Result:
        """Do one job."""
        return self._worker.do(job)
