"""Runs ``clifflab score``, kills its workers and its driver by a plan, and keeps account of what was done twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clifflab.bench.processes import Family
from tests.forkserver import Command

_LOOK = 0.02
_HOW = (".lock", "events.jsonl", "status.json", ".work")  # how a job went, not what it gave


@dataclass(frozen=True)
class Plan:
    """When to kill.

    Attributes:
        blocks: Blocks of the job.
        workers: Its scoring workers.
        driver: Shares of the blocks at whose completion the driver is killed; it is then run again.
        kills: Workers to kill, at least.
        every: Seconds between two of these kills; while fewer blocks than ``apart`` were done since the last, it waits.
        apart: See there.
        limit: Seconds that all may take.
    """

    blocks: int
    workers: int
    driver: tuple[float, ...]
    kills: int
    every: float
    apart: int
    limit: float


@dataclass(frozen=True)
class Kill:
    """What was killed, and when."""

    time: float
    what: str
    pid: int
    done: int


@dataclass
class Account:
    """What happened.

    Attributes:
        kills: All kills, in order.
        attempts: When each attempt at a block began, by block.
        runs: Exit codes of the runs of the command.
    """

    kills: list[Kill] = field(default_factory=list)
    attempts: dict[str, set[float]] = field(default_factory=lambda: defaultdict(set))
    runs: list[int] = field(default_factory=list)

    def killed(self, what: str) -> int:
        """How many of a kind."""
        return sum(kill.what == what for kill in self.kills)

    def repeated(self) -> list[int]:
        """For each kill, how many blocks were begun again behind it (and before the next one)."""
        again = [when for times in self.attempts.values() for when in sorted(times)[1:]]
        borders = [kill.time for kill in self.kills]
        counts = [0] * len(borders)
        for when in again:
            behind = [place for place, border in enumerate(borders) if border <= when]
            assert behind, "a block was begun twice before anything was killed"
            counts[behind[-1]] += 1
        return counts


class Chaos:
    """Carries a plan out.

    Args:
        start: Begins the command, which goes on in the same folder each time.
        root: The job's folder.
        plan: When to kill.
        seed: Of the choice of workers.
    """

    def __init__(self, start: Callable[[], Command], root: Path, plan: Plan, seed: int = 0) -> None:
        self._start, self._root, self._plan = start, root, plan
        self._random = random.Random(seed)
        self._families: list[Family] = []
        self.account = Account()

    def run(self) -> Account:
        """Run the command until it ends by itself; what happened."""
        left = list(self._plan.driver)
        end = time.monotonic() + self._plan.limit
        try:
            while True:
                process = self._start()
                self._families.append(Family(process.pid))
                killed = self._until(process, left[0] if left else None, end)
                self.account.runs.append(process.wait())
                self._look()
                if not killed:
                    return self.account
                left.pop(0)
        finally:
            self._clear()

    def _until(self, process: Command, share: float | None, end: float) -> bool:
        """Kill workers until the driver's turn comes, or the command ends; whether the driver was killed."""
        family = self._families[-1]
        last, at, seen = time.monotonic(), self.done(), len(self._log())
        while process.poll() is None:
            assert time.monotonic() < end, "takes too long"
            self._look()
            family.members()  # those whose parent dies later are known by then
            done, now = self.done(), time.monotonic()
            if share is not None and done >= share * self._plan.blocks:
                self._kill(process.pid, "driver", done)
                return True
            if now - last >= self._plan.every and done - at >= self._plan.apart and self._wanted():
                pid = self._scoring(family, seen)
                if pid is not None:
                    self._kill(pid, "worker", done)
                    last, at = time.monotonic(), done
            time.sleep(_LOOK)
        return False

    def _wanted(self) -> bool:
        """With a pace, workers are killed as long as it runs; without one, only as many as the plan has."""
        return self._plan.every > 0 or self.account.killed("worker") < self._plan.kills

    def _kill(self, pid: int, what: str, done: int) -> None:
        self.account.kills.append(Kill(time.time(), what, pid, done))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _scoring(self, family: Family, seen: int) -> int | None:
        """A worker of this run that has scored a block."""
        pids = {event["pid"] for event in self._log()[seen:] if event["event"] == "block" and "pid" in event}
        pids -= {kill.pid for kill in self.account.kills}
        alive = [worker.pid for worker in family.workers() if worker.pid in pids]
        return self._random.choice(alive) if alive else None

    def done(self) -> int:
        """Blocks that are committed."""
        return len(list((self._root / "receipts").glob("0*.json")))

    def _log(self) -> list[dict[str, Any]]:
        try:
            text = (self._root / "events.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _look(self) -> None:
        """Take down the marks of attempts: an empty file each, which the next run and the end clear away."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._root / ".work" / "attempts") as marks:
            for mark in marks:
                with contextlib.suppress(FileNotFoundError):
                    self.account.attempts[mark.name.partition("-")[0]].add(mark.stat().st_mtime)

    def _clear(self) -> None:
        """End what killed drivers left: their workers end by themselves within seconds, some services of Ray do not."""
        end = time.monotonic() + 20
        while any(family.workers() for family in self._families) and time.monotonic() < end:
            time.sleep(0.2)
        for process in [process for family in self._families for process in family.members()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def contents(root: Path) -> dict[str, str]:
    """Checksums of all that a finished job gave, by file."""
    files = [path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] not in _HOW]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
