"""All work in this process, one task after the other: for debugging, and as the yardstick of Ray's overhead."""

from __future__ import annotations

import time

from clifflab.config import Study
from clifflab.runtime.schedule import Schedule
from clifflab.runtime.storage import Store
from clifflab.runtime.work import Worker
from clifflab.stages import Identities

WORKER = "inline"


class InlineRuntime:
    """Does tasks in order, here."""

    places = 1
    gpus = 0.0

    def __init__(self, study: Study, store: Store, identities: Identities) -> None:
        self._store = store
        self.adopt(study, identities)

    def adopt(self, study: Study, identities: Identities) -> None:
        """Work for this study from now on."""
        import torch

        gpu_ids = ["0"] if torch.cuda.is_available() else []
        self._worker = Worker(study, self._store, identities, gpu_ids=gpu_ids)

    def run(self, schedule: Schedule) -> None:
        """Do everything, the earliest step first.

        Raises:
            ClifflabError: What ends the study, and not a model alone.
        """
        schedule.open()
        while True:
            queues = schedule.queues
            queues.settle(time.monotonic())
            firsts = [task for key in (None, *queues.keys) if (task := queues.first(key))]
            tasks = [*firsts, *queues.groups]
            if not tasks:
                pause = queues.next_pause(time.monotonic())
                if pause is None:
                    return
                time.sleep(pause)
                continue
            task = min(tasks, key=lambda task: task.order)
            schedule.take(task)
            try:
                result = self._worker.do(task.job)
            except Exception as error:
                if len(schedule.models) == 1:
                    raise  # a bug shows where it is
                schedule.again(task, error)
                continue
            result.where, result.attempt = {"worker": WORKER, **result.where}, task.attempt
            schedule.done(task, result)
            schedule.open()

    def close(self) -> None:
        """Nothing to end."""
