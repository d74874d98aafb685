"""Where a run stands, for those who watch it: ``status.json``, lines in a job's log, and what a terminal shows."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clifflab.artifacts import read_json, write_json
from clifflab.errors import ClifflabError, shorten
from clifflab.runtime.events import EventReader
from clifflab.runtime.status.shape import as_snapshot
from clifflab.runtime.status.state import RunState
from clifflab.runtime.status.steps import DONE, FAILED, PARTIAL, RUNNING, STOPPED, WAITING
from clifflab.runtime.status.view import render as render

if TYPE_CHECKING:
    from clifflab.runtime.storage import Store

PREFIX = "::clifflab-status:: "  # marks a status line among whatever else a job prints
LINES = "CLIFFLAB_STATUS_LINES"
STATUS, EVENTS, LOCK = "status.json", "events.jsonl", ".lock"

_WRITE_EVERY = 5.0  # seconds between two writes of status.json
_LINE_EVERY, _LINE_EVERY_LATER, _FIRST = 10.0, 60.0, 3600.0  # between two lines: in the first hour, and after it
_MOST_STEPS = 60
_UNTRAINED, _PARTIAL = 3, 4  # exit codes of a run


def write_status(root: Path, snapshot: Mapping[str, Any]) -> None:
    """Write a run's ``status.json``, whole or not at all.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    write_json(root / STATUS, snapshot)


def status_line(snapshot: Mapping[str, Any]) -> str:
    """One line for a job's log: the snapshot without what grows with the number of steps and workers.

    Steps that are done are told by their models' sums.
    """
    steps = [step for step in snapshot["steps"] if step["state"] != "done"][:_MOST_STEPS]
    workers = {key: value for key, value in snapshot["workers"].items() if key != "list"}
    return PREFIX + json.dumps({**snapshot, "steps": steps, "workers": {**workers, "list": []}}, allow_nan=False)


def parse_line(line: str) -> dict[str, Any] | None:
    """The snapshot of a status line; ``None`` for any other line, one cut short, or one of another shape.

    The line may stand behind what a log puts in front of it.
    """
    _, mark, text = line.partition(PREFIX)
    if not mark:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return as_snapshot(found)


def of_job(
    told: Mapping[str, Any] | None, name: str, status: str, exit_code: int | None = None, message: str = ""
) -> dict[str, Any]:
    """Where a submitted run stands: what its driver told last, and how its job ended.

    Args:
        told: The last status line; ``None`` before the first.
        name: What the job is called.
        status: The job's, in Ray's words: pending, running, stopped, succeeded, failed.
        exit_code: Of its driver, once it ended.
        message: What Ray says of it.
    """
    found = {**(told or RunState(name).snapshot(0.0)), "job": name}
    ended = {"pending": WAITING, "stopped": STOPPED, "succeeded": DONE, "failed": FAILED}.get(status)
    if ended == FAILED and exit_code in (_PARTIAL, _UNTRAINED):
        ended = PARTIAL if exit_code == _PARTIAL else DONE
    if ended and found["state"] in (RUNNING, WAITING):
        found["state"] = ended
        if ended == FAILED and not found.get("error"):
            found["error"] = shorten(message, 300) or None
    return found


class Watcher:
    """Listens to a run's event log: keeps ``status.json`` fresh, and prints status lines where they are asked for.

    Args:
        root: Folder of the run.
        study: Its name.
        clock: Seconds since the epoch.
    """

    def __init__(self, root: Path, study: str, clock: Callable[[], float] = time.time) -> None:
        self._root, self._clock = root, clock
        self._state = RunState(study)
        self._lines = os.environ.get(LINES) == "1"
        self._began = self._written = self._told = float("-inf")

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event in; a run's first and last are told at once, the others once in a while."""
        self._state.add(event)
        now, kind = self._clock(), event.get("event")
        if kind in ("run_start", "start"):
            self._began = now
        ends = kind in ("run_start", "start", "run_done", "end")
        every = _LINE_EVERY if now - self._began < _FIRST else _LINE_EVERY_LATER
        line = self._lines and (ends or now - self._told >= every)
        write = ends or now - self._written >= _WRITE_EVERY
        if line or write:
            self._tell(now, write=write, line=line)

    def close(self) -> None:
        """Tell where the run was left, if its end was not told: it was interrupted, or failed by a bug."""
        snapshot = self._state.snapshot(self._clock(), alive=False)
        if snapshot["state"] == STOPPED:
            self._tell(self._clock(), write=True, line=self._lines, alive=False)

    def _tell(self, now: float, *, write: bool, line: bool, alive: bool = True) -> None:
        snapshot = self._state.snapshot(now, alive=alive)
        if write:
            self._written = now
            with contextlib.suppress(ClifflabError, OSError):  # who watches must not end the run
                write_status(self._root, snapshot)
        if line:
            self._told = now
            sys.stdout.write(status_line(snapshot) + "\n")
            sys.stdout.flush()


class RunFolder:
    """A run's folder, looked at again and again; only what is new of its log is read.

    Args:
        root: The folder.
        store: What brings it here, where it is remote.
    """

    def __init__(self, root: Path, store: Store | None = None) -> None:
        self.root, self._store = root, store
        self._reader = EventReader(root / EVENTS)
        self._state = RunState((store.address if store else str(root.resolve())).rstrip("/").rpartition("/")[2])
        self._pull()

    @classmethod
    def at(cls, address: str) -> RunFolder:
        """The folder at an address that storage knows, such as ``s3://bucket/runs/quickstart``.

        Raises:
            OutputError: It is no such address, or nothing reaches it.
        """
        from clifflab.runtime.storage import open_store

        out, _, name = address.rstrip("/").rpartition("/")
        store = open_store(out, name)
        return cls(store.root, store if store.remote else None)

    @property
    def is_one(self) -> bool:
        """Whether a run left anything to look at there."""
        return (self.root / EVENTS).is_file() or (self.root / STATUS).is_file()

    @property
    def remote(self) -> bool:
        """Whether a look at it asks a server."""
        return self._store is not None

    def snapshot(self, now: float) -> dict[str, Any]:
        """Where the run stands: from its log, else as it last told in ``status.json``."""
        self._pull()
        for event in self._reader.new():
            self._state.add(event)
        found = self._state.snapshot(now, alive=self._held())
        if found["started"]:
            return found
        return as_snapshot(read_json(self.root / STATUS)) or found

    def _pull(self) -> None:
        if self._store is not None:
            self._store.pull([self.root / EVENTS, self.root / STATUS])

    def _held(self) -> bool:
        """Whether somebody holds the folder's lock; where that cannot be known, the log is believed."""
        if self._store is not None or self._state.snapshot(0.0)["state"] != RUNNING:
            return True  # it said how it ended: no need to touch the lock
        try:
            with (self.root / LOCK).open() as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False
