"""The worker inside a Ray actor: it sees only its own GPUs, and keeps its model from job to job."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any

from clifflab.artifacts import code_version
from clifflab.config import Study
from clifflab.errors import without_credentials
from clifflab.pulse import beats
from clifflab.runtime.status.meters import record
from clifflab.runtime.storage import open_store
from clifflab.runtime.submit.here import current_folder
from clifflab.runtime.work import Job, Result, Worker
from clifflab.stages import Identities

_STACK = 6000  # characters of a hung worker's stack
WATCH = "watch"  # the concurrency group in which a worker answers while it computes


@dataclass(frozen=True)
class Place:
    """Where a study's files are, as every worker finds them.

    Attributes:
        out: The parent of its folder: a path that all machines see, or an address.
        package: Folder of the files that were sent with the study, on the driver's machine; empty where none were.
    """

    out: str
    package: str = ""


class StudyActor:
    """Does a study's jobs one after the other; answers meanwhile whether it makes progress.

    Args:
        study: The study, resolved by the driver.
        place: Where its files are.
        identities: Its fingerprints.
        blind: It is to see no GPU, though its machine may have some.
    """

    def __init__(self, study: Study, place: Place, identities: Identities, *, blind: bool) -> None:
        import ray

        context = ray.get_runtime_context()
        gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
        if blind:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for devices
        self._thread = 0
        study = rebased(study, place.package)
        store = open_store(place.out, study.name)
        self._worker = Worker(study, store, identities, context.get_node_id(), gpu_ids)

    def hello(self) -> dict[str, Any]:
        """Where this is, which GPUs it sees, and what code runs here."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = None if visible is None else [gpu for gpu in visible.split(",") if gpu]
        return {**self._worker.where, "code": code_version(), "visible": seen}

    def do(self, job: Job) -> Result:
        """Do one job."""

        self._thread = threading.get_ident()
        result = self._worker.do(job)
        if result.error is None:
            record(job.step, job.model, result.counts, result.seconds)
        return result

    def progress(self) -> int:
        """A number that grows while work goes on."""
        return beats()

    def stack(self) -> str:
        """Where the work is just now, for a post-mortem."""
        frame = sys._current_frames().get(self._thread)
        text = "".join(traceback.format_stack(frame)) if frame else ""
        return without_credentials(text)[-_STACK:]


def rebased(study: Study, package: str) -> Study:
    """The study with the files that were sent with it found in this machine's copy of them."""
    if not package or (here := current_folder()) == package:
        return study

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [moved(item) for item in value]
        if isinstance(value, str) and value.startswith(package + os.sep):
            return here + value[len(package) :]
        return value

    return Study.model_validate(moved(study.model_dump(mode="json")))
