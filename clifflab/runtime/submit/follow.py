"""A job's log as it comes: its lines as they are, its status lines as one line of progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Protocol, cast

import aiohttp

from clifflab.errors import ClusterError
from clifflab.runtime.status import parse_line
from clifflab.runtime.status.view import duration
from clifflab.runtime.submit.client import Cluster
from clifflab.runtime.submit.ids import JobView

PATIENCE = 120.0  # seconds that a broken connection is tried anew
_PAUSE = 1.0
_EXIT_CODE = 3.0  # seconds in which Ray writes it after the end


class Screen(Protocol):
    """Where a followed job is shown."""

    def line(self, text: str) -> None:
        """A line of the job's own."""
        ...

    def status(self, text: str) -> None:
        """Where it stands, in few words."""
        ...

    def note(self, text: str) -> None:
        """A word about the connection."""
        ...


def follow(cluster: Cluster, job: JobView, screen: Screen, patience: float = PATIENCE) -> JobView:
    """Show a job's log from its beginning until the job ends; returns the job as it ended.

    A broken connection is tried anew for ``patience`` seconds; nothing is shown twice.

    Raises:
        ClusterError: The connection does not come back, or the job is gone. The job itself goes on.
    """
    feed = _Feed(screen)
    broken: float | None = None
    while True:
        problem: Exception | None = None
        try:
            asyncio.run(_read(cluster, job.id, feed))
            now = cluster.job(job.id)
            if now is None:
                raise ClusterError("job", job.id, "is gone from the cluster", "send it again: it continues")
            if not now.active:
                feed.rest(cluster.log(job.id))
                return _with_exit(cluster, now)
        except ClusterError as error:
            if error.field == "job":
                raise
            problem = error
        except (aiohttp.ClientError, OSError, RuntimeError, TimeoutError) as error:
            problem = error
        if problem is None or feed.came:
            broken = None
        if problem is not None:
            if broken is None:
                broken = time.monotonic()
                screen.note("the connection broke; trying again (the job goes on)")
            elif time.monotonic() - broken > patience:
                remedy = f"the job goes on; later: clifflab logs -f {job.id}"
                raise ClusterError("--address", cluster.head.address, "does not answer any more", remedy) from problem
        time.sleep(_PAUSE)


def show_log(text: str, screen: Screen) -> None:
    """A log that is there already, without its status lines."""
    for line in text.splitlines():
        if parse_line(line) is None:
            screen.line(line)


def compact(status: Mapping[str, Any]) -> str:
    """A status in one line: study, what runs, units, what failed, speed, time left."""
    units = status.get("units") or {}
    parts = [f"{status.get('study', 'run')}: {status.get('state', 'running')}"]
    running = [step for step in status.get("steps") or [] if step.get("state") == "running"]
    if running:
        first = running[0]
        more = f" and {len(running) - 1} more" if len(running) > 1 else ""
        parts.append(f"{first.get('step')} {first.get('model') or ''}".strip() + more)
    if units.get("total"):
        failed = f", {units['failed']} failed" if units.get("failed") else ""
        parts.append(f"{units.get('done', 0)}/{units['total']} units{failed}")
    if (left := status.get("eta_s") or 0.0) >= 1:
        parts.append(f"{'at least' if status.get('eta_at_least') else 'about'} {duration(left)} left")
    return ", ".join(parts)


class _Feed:
    """Cuts what comes into lines, and knows how much of the log was shown."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._partial, self._status = "", ""
        self._seen = self._skip = 0
        self.came = False

    def again(self) -> None:
        """The log begins from its beginning."""
        self._skip, self.came = self._seen, False

    def take(self, text: str) -> None:
        """The next part of the log."""
        cut = min(self._skip, len(text))
        self._skip -= cut
        text = text[cut:]
        if not text:
            return
        self.came = True
        self._seen += len(text)
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._show(line)

    def rest(self, log: str) -> None:
        """The whole log: what was not shown yet, its last line included."""
        self._skip = 0  # of a connection that ended before it came so far
        self.take(log[self._seen :])
        if self._partial:
            self._show(self._partial)
        self._partial = ""

    def _show(self, line: str) -> None:
        status = parse_line(line)
        if status is None:
            self._screen.line(line)
        elif (text := compact(status)) != self._status:
            self._status = text
            self._screen.status(text)


async def _read(cluster: Cluster, submission_id: str, feed: _Feed) -> None:
    feed.again()
    async with aclosing(cast(Any, cluster.tail(submission_id))) as texts:
        async for text in texts:
            feed.take(text)


def _with_exit(cluster: Cluster, job: JobView) -> JobView:
    """The ended job with its exit code, which Ray writes a moment later."""
    until = time.monotonic() + _EXIT_CODE
    while job.exit_code is None and job.status in ("failed", "succeeded") and time.monotonic() < until:
        time.sleep(0.2)
        job = cluster.job(job.id) or job
    return job
