"""Names of jobs: the same study to the same output is one job, however often it is sent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clifflab.errors import ClusterError, ConfigError, holds_credentials, without_credentials

Status = Literal["pending", "running", "stopped", "succeeded", "failed"]
PREFIX = "clifflab-"


@dataclass(frozen=True)
class JobView:
    """One job of clifflab on a cluster.

    Attributes:
        id: Its submission id.
        base: The id of its first attempt.
        name: What it was called.
        kind: ``study``, ``score`` or ``tune``.
        status: In Ray's words, in small letters.
        exit_code: Of its driver, once it ended by itself.
        out: Where its results go; holds no credential.
        output: Hash of that place, however it was called.
        digest: Hash of what was sent.
        started: Epoch seconds, or None.
        ended: Epoch seconds, or None.
        message: What Ray says of its state.
        entrypoint: The command that it runs.
    """

    id: str
    base: str
    name: str
    kind: str
    status: Status
    exit_code: int | None = None
    out: str = ""
    output: str = ""
    digest: str = ""
    started: float | None = None
    ended: float | None = None
    message: str = ""
    entrypoint: str = ""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.status in ("pending", "running")

    @property
    def attempt(self) -> int:
        """1, 2, ..."""
        number = self.id.removeprefix(f"{self.base}-")
        return int(number) if number.isdigit() else 1

    @property
    def exit(self) -> int:
        """Exit code of a command that waited for its end: its own, 130 if it was stopped, 1 if it could not begin."""
        if self.status == "stopped":
            return 130
        if self.status == "succeeded":
            return 0
        if self.exit_code is None:
            return 1
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code or 1


def full_place(out: str) -> str:
    """An output as every machine understands it: an absolute path, or an address with a scheme.

    Raises:
        ConfigError: It holds a credential.
    """
    if "://" not in out or out.startswith("file://"):
        return os.path.abspath(os.path.expanduser(out.removeprefix("file://")))
    if holds_credentials(out) or without_credentials(out) != out:
        remedy = "leave it out of the address; set it where ray start runs"
        raise ConfigError("--out", without_credentials(out), "holds a credential", remedy)
    return out.rstrip("/")


def place_hash(place: str) -> str:
    """Hash of an output, as :func:`full_place` gives it."""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def job_id(name: str, place: str) -> str:
    """Id of the first attempt of a job: its name, and 8 hexadecimal digits of name and output."""
    return f"{PREFIX}{name}-{hashlib.sha256(json.dumps([name, place]).encode()).hexdigest()[:8]}"


def content_digest(files: Mapping[str, str], entry: Sequence[str], env: Mapping[str, str]) -> str:
    """Hash of all that a job is: files by their own hashes, its command, its environment."""
    content: list[Any] = [sorted(files.items()), list(entry), sorted(env.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def decide(jobs: Sequence[JobView], name: str, place: str, digest: str) -> JobView | str:
    """What becomes of a submission beside the jobs that there are.

    Returns:
        The running job that it is, or the id under which it is to be sent.

    Raises:
        ClusterError: Something else runs under its name or into its output.
    """
    base, output = job_id(name, place), place_hash(place)
    mine = sorted((job for job in jobs if job.base == base), key=lambda job: job.attempt)
    for job in mine:
        if job.active and job.digest == digest:
            return job
        if job.active:
            problem = "runs with another study, other files or other settings"
            raise ClusterError("job", job.id, problem, f"wait for it, clifflab stop {job.id}, or choose another --out")
    other = next((job for job in jobs if job.active and job.output == output), None)
    if other:
        problem = f"writes to the same output ({other.out})"
        raise ClusterError("job", other.id, problem, f"wait for it, clifflab stop {other.id}, or choose another --out")
    return f"{base}-{mine[-1].attempt + 1}" if mine else base


def pick(jobs: Sequence[JobView], name: str, *, alone: bool = False) -> JobView:
    """The job that a user means: an id, or the latest attempt of the job of that name.

    Args:
        jobs: All jobs.
        name: What the user says.
        alone: Take no running job before others of its name: it may be somebody else's.

    Raises:
        ClusterError: There is none, or several that differ in their outputs.
    """
    if exact := next((job for job in jobs if job.id == name), None):
        return exact
    named = sorted(
        (job for job in jobs if name in (job.name, job.base)), key=lambda job: (job.started or 0, job.attempt)
    )
    if not named:
        known = ", ".join(sorted({job.name for job in jobs})) or "none"
        raise ClusterError("job", name, f"no job is called that (there are: {known})", "see clifflab ls")
    active = [job for job in named if job.active]
    if len(active) == 1 and not alone:
        return active[0]
    latest = {job.base: job for job in sorted(named if alone else active or named, key=lambda job: job.active)}
    if len(latest) > 1:
        shown = ", ".join(f"{job.id} ({job.status}, {job.out})" for job in latest.values())
        raise ClusterError("job", name, f"{len(latest)} jobs are called that", f"give the id: {shown}")
    return active[-1] if active else named[-1]
