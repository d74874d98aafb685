"""Jobs of clifflab on a cluster: sending, finding, reading, stopping them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from clifflab.errors import ClusterError, one_line
from clifflab.runtime.submit.address import Head, reach
from clifflab.runtime.submit.ids import JobView, pick
from clifflab.runtime.submit.wire import Wire, job_path

_LATEST = 1e14  # milliseconds since 1970: later than any calendar needs


class Cluster:
    """The job server of one cluster.

    Args:
        head: Its dashboard.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        self._wire = Wire(head)

    def jobs(self) -> list[JobView]:
        """All jobs that clifflab sent, the oldest first."""
        status, found = self._wire.ask("GET", "/api/jobs/")
        if status != 200 or not isinstance(found, list):
            raise ClusterError("--address", self.head.address, "does not list its jobs", "look at the dashboard's logs")
        views = (view_of(job) for job in found)
        return sorted((view for view in views if view), key=lambda view: (view.started or 0, view.attempt))

    def job(self, submission_id: str) -> JobView | None:
        """One job as it is now; None where there is none."""
        status, found = self._wire.ask("GET", job_path(submission_id))
        if status not in (200, 404):
            raise self._wire.failed(f"does not tell of the job {submission_id}, HTTP {status}", found)
        return view_of(found) if status == 200 else None

    def state(self, submission_id: str) -> str | None:
        """Any job's status in small letters, clifflab's or not; None where there is no such job."""
        status, found = self._wire.ask("GET", job_path(submission_id))
        if status == 404:
            return None
        told = found.get("status") if status == 200 and isinstance(found, dict) else None
        if not isinstance(told, str):
            raise self._wire.failed(f"does not tell of the job {submission_id}, HTTP {status}", found)
        return told.lower()

    def send(
        self,
        submission_id: str,
        entrypoint: str,
        *,
        archive: Path | None,
        env: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> bool:
        """Upload an archive and start a job.

        Returns:
            False where a job of that id is there already.

        Raises:
            ClusterError: The job server refuses it.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(env)}
        if archive is not None:
            runtime_env["working_dir"] = str(archive)
        try:
            self._wire.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=dict(metadata),
            )
        except (RuntimeError, TypeError, ValueError, LookupError) as error:  # the last three: odd answers
            if "already exists" in str(error):
                return False
            raise self._wire.failed("refuses the job", error) from None
        return True

    def stop(self, submission_id: str, seconds: float = 20) -> str | None:
        """Stop a job and wait until it ended; returns its last status."""
        code, found = self._wire.ask("POST", f"{job_path(submission_id)}/stop")
        if code != 200:
            raise self._wire.failed("does not stop the job", found)
        until = time.monotonic() + seconds
        while (status := self.state(submission_id)) in ("pending", "running") and time.monotonic() < until:
            time.sleep(0.3)
        return status

    def delete(self, submission_id: str) -> None:
        """Forget a job that ended; nothing where that is not possible."""
        self._wire.ask("DELETE", job_path(submission_id))

    def log(self, submission_id: str) -> str:
        """All that a job printed so far."""
        status, found = self._wire.ask("GET", f"{job_path(submission_id)}/logs")
        text = found.get("logs") if status == 200 and isinstance(found, dict) else None
        if not isinstance(text, str):
            raise self._wire.failed("does not give the job's log", found)
        return text

    def tail(self, submission_id: str) -> AsyncIterator[str]:
        """What a job prints, from its beginning, as it comes; ends with the job, or when nothing came for a while."""
        return self._wire.tail(submission_id)


def connect(address: str | None) -> Cluster:
    """The cluster at an address (see :func:`~clifflab.runtime.submit.address.reach`)."""
    return Cluster(reach(address))


def find_job(client: Cluster, name: str, *, alone: bool = False) -> JobView:
    """The job that a user means: an id, or the latest attempt of the job of that name (``alone``: see ``pick``).

    Raises:
        ClusterError: There is none, or there are several.
    """
    return pick(client.jobs(), name, alone=alone)


def view_of(job: object) -> JobView | None:
    """A job of clifflab from what the job server tells; None for all others (drivers, other people's jobs).

    Whoever may send jobs may write what they like there: nothing is taken for granted, and every text is made fit to
    be shown.
    """
    if not isinstance(job, dict) or not isinstance(job.get("metadata"), dict):
        return None
    metadata, submission_id, status = job["metadata"], job.get("submission_id"), job.get("status")
    if not (isinstance(submission_id, str) and submission_id and isinstance(status, str) and "clifflab" in metadata):
        return None

    def text(found: object, default: str = "") -> str:
        return one_line(found) if isinstance(found, str) and found else default

    def seconds(key: str) -> float | None:
        told = job.get(key)
        return told / 1000 if isinstance(told, int | float) and 0 < told < _LATEST else None

    code = job.get("driver_exit_code")
    own = text(submission_id)
    return JobView(
        id=own,
        base=text(metadata.get("base"), own),
        name=text(metadata.get("name"), own),
        kind=text(metadata.get("kind"), "study"),
        status=text(status).lower(),  # type: ignore[arg-type]
        exit_code=code if isinstance(code, int) else None,
        out=text(metadata.get("out")),
        output=text(metadata.get("output")),
        digest=text(metadata.get("digest")),
        started=seconds("start_time"),
        ended=seconds("end_time"),
        message=text(job.get("message")),
        entrypoint=text(job.get("entrypoint")),
    )
