"""Jobs of clifflab on a cluster: sending, finding, reading, stopping them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from clifflab.errors import ClusterError
from clifflab.runtime.status import parse_line
from clifflab.runtime.submit.address import Head, reach
from clifflab.runtime.submit.ids import JobView, pick
from clifflab.runtime.submit.wire import Wire


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
        status, found = self._wire.ask("GET", f"/api/jobs/{submission_id}")
        return view_of(found) if status == 200 and isinstance(found, dict) else None

    def state(self, submission_id: str) -> str | None:
        """Any job's status in small letters, clifflab's or not."""
        status, found = self._wire.ask("GET", f"/api/jobs/{submission_id}")
        return str(found["status"]).lower() if status == 200 and isinstance(found, dict) else None

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
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            raise self._wire.failed("refuses the job", error) from None
        return True

    def stop(self, submission_id: str, seconds: float = 20) -> str | None:
        """Stop a job and wait until it ended; returns its last status."""
        try:
            self._wire.stop_job(submission_id)
        except RuntimeError as error:
            raise self._wire.failed("does not stop the job", error) from None
        until = time.monotonic() + seconds
        while (status := self.state(submission_id)) in ("pending", "running") and time.monotonic() < until:
            time.sleep(0.3)
        return status

    def delete(self, submission_id: str) -> None:
        """Forget a job that ended; nothing where that is not possible."""
        self._wire.ask("DELETE", f"/api/jobs/{submission_id}")

    def log(self, submission_id: str) -> str:
        """All that a job printed so far."""
        try:
            text: str = self._wire.get_job_logs(submission_id)
        except RuntimeError as error:
            raise self._wire.failed("does not give the job's log", error) from None
        return text

    def tail(self, submission_id: str) -> AsyncIterator[str]:
        """What a job prints, from its beginning, as it comes; ends when the job did."""
        return self._wire.tail_job_logs(submission_id)


def connect(address: str | None) -> Cluster:
    """The cluster at an address (see :func:`~clifflab.runtime.submit.address.reach`)."""
    return Cluster(reach(address))


def find_job(client: Cluster, name: str) -> JobView:
    """The job that a user means: an id, or the latest attempt of the job of that name.

    Raises:
        ClusterError: There is none, or there are several.
    """
    return pick(client.jobs(), name)


def last_status(client: Cluster, job: JobView) -> dict[str, Any] | None:
    """The last status that a job's driver printed; None before its first."""
    lines = reversed(client.log(job.id).splitlines())
    return next((found for line in lines if (found := parse_line(line)) is not None), None)


def view_of(job: Mapping[str, Any]) -> JobView | None:
    """A job of clifflab from what the job server tells; None for all others (drivers, other people's jobs)."""
    metadata, submission_id = job.get("metadata") or {}, job.get("submission_id")
    if not submission_id or "clifflab" not in metadata:
        return None

    def seconds(key: str) -> float | None:
        return job[key] / 1000 if job.get(key) else None

    return JobView(
        id=submission_id,
        base=metadata.get("base", submission_id),
        name=metadata.get("name", submission_id),
        kind=metadata.get("kind", "study"),
        status=str(job["status"]).lower(),  # type: ignore[arg-type]
        exit_code=job.get("driver_exit_code"),
        out=metadata.get("out", ""),
        output=metadata.get("output", ""),
        digest=metadata.get("digest", ""),
        started=seconds("start_time"),
        ended=seconds("end_time"),
        message=job.get("message") or "",
        entrypoint=job.get("entrypoint") or "",
    )
