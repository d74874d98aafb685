"""All jobs in this process, one after the other: for debugging, and as the yardstick of Ray's overhead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from clifflab.config import Study
from clifflab.runtime.work import Job, Result, Worker
from clifflab.stages import Identities


class InlineRuntime:
    """Does jobs in order, here."""

    workers = 1

    def __init__(self, study: Study, root: Path, identities: Identities) -> None:
        import torch

        self._worker = Worker(study, root, identities, gpu_ids=["0"] if torch.cuda.is_available() else [])

    def run(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Results in the order of the jobs."""
        for job in jobs:
            yield self._worker.do(job)

    def lost(self) -> list[dict[str, object]]:
        """No worker can be lost without this process."""
        return []

    def close(self) -> None:
        """Nothing to end."""
