"""One job of a worker, the same in every runtime."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clifflab.artifacts import output_error
from clifflab.config import Study
from clifflab.errors import ClifflabError, InputError
from clifflab.runtime.storage import Store, mirror_job, reads_of
from clifflab.stages import STEPS, Context, Identities, Unit
from clifflab.stages.base import GangStep
from clifflab.tuning.group import Group
from clifflab.tuning.loop import Listen


@dataclass(frozen=True)
class Job:
    """A unit of a step, or (``unit`` is ``None``) the step's merge."""

    step: str
    model: str | None
    unit: Unit | None = None

    @property
    def name(self) -> str:
        """What the event log calls it."""
        return self.unit.key if self.unit else "merge"


@dataclass
class Result:
    """What came of a job, with where it ran.

    Attributes:
        job: The job.
        where: ``node, pid, gpu_ids`` of the worker.
        seconds: Wall time of the job.
        counts: What the step counted.
        loads: Models that the worker loaded for it.
        error: A user's error that ended the job.
        attempt: Which try this was.
        began: When, in seconds since the epoch.
    """

    job: Job
    where: dict[str, Any]
    seconds: float = 0.0
    counts: dict[str, Any] = field(default_factory=dict)
    loads: list[dict[str, Any]] = field(default_factory=list)
    error: ClifflabError | None = None
    attempt: int = 1
    began: float = 0.0


class Worker:
    """Holds a context (and so the loaded models) and does jobs one after the other.

    Args:
        study: The study, resolved.
        store: Its files.
        identities: Its fingerprints.
        node: Name of the node; the host's name by default.
        gpu_ids: GPUs that this worker may use.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        identities: Identities,
        node: str | None = None,
        gpu_ids: list[str] | None = None,
    ) -> None:
        self._store = store
        self._model: str | None = None
        self.context = Context(study, store.root, identities)
        self.where = {"node": node or socket.gethostname(), "pid": os.getpid(), "gpu_ids": gpu_ids or []}

    def do(self, job: Job, group: Group | None = None, listen: Listen | None = None) -> Result:
        """Do one job with the study's number of threads; a user's error comes back in the result.

        Args:
            job: The job.
            group: The workers that do it together, where its step asks for some; this one alone by default.
            listen: Told of the progress of such a step.
        """
        import torch
        from threadpoolctl import threadpool_limits

        result = Result(job, self.where, began=round(time.time(), 3))
        start = time.monotonic()
        threads, before = self.context.study.runtime.threads, torch.get_num_threads()
        self.context.loads.clear()
        if job.model != self._model:
            self._model = job.model
            self.context.forget()
        try:
            torch.set_num_threads(threads)
            with threadpool_limits(threads):
                reads = reads_of(self.context, job) if self._store.remote else []
                result.counts = mirror_job(self._store, reads, lambda: self._compute(job, group, listen))
        except ClifflabError as error:
            result.error = error
        except torch.OutOfMemoryError as error:
            remedy = "use a larger GPU, a smaller dtype, or shorter traces (traces.max_new_tokens)"
            result.error = InputError("models", job.model, f"one trace does not fit the GPU's memory ({error})", remedy)
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(self.context.layout.root)):
                raise
            result.error = output_error(Path(str(error.filename)), error)
        finally:
            torch.set_num_threads(before)
        result.loads = list(self.context.loads)
        result.seconds = round(time.monotonic() - start, 3)
        return result

    def _compute(self, job: Job, group: Group | None, listen: Listen | None) -> dict[str, Any]:
        step = STEPS[job.step]
        if job.unit and isinstance(step, GangStep):
            return step.compute_together(self.context, job.unit, group, listen)
        if job.unit:
            return step.compute(self.context, job.unit)
        return step.merge(self.context, job.model)
