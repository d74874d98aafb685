"""Where a run stands, for those who watch it: ``status.json``, lines in a job's log, and what a terminal shows."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clifflab.artifacts import read_json, write_json
from clifflab.errors import ClifflabError
from clifflab.runtime.events import EventReader
from clifflab.runtime.status.jobs import of_job as of_job
from clifflab.runtime.status.jobs import read_log as read_log
from clifflab.runtime.status.jobs import state_of as state_of
from clifflab.runtime.status.lines import LINES as LINES
from clifflab.runtime.status.lines import PREFIX as PREFIX
from clifflab.runtime.status.lines import lines_wanted, print_line
from clifflab.runtime.status.lines import parse_line as parse_line
from clifflab.runtime.status.lines import status_line as status_line
from clifflab.runtime.status.lines import tell_whole as tell_whole
from clifflab.runtime.status.shape import as_snapshot
from clifflab.runtime.status.state import RunState
from clifflab.runtime.status.steps import RUNNING, STOPPED
from clifflab.runtime.status.view import render as render

if TYPE_CHECKING:
    from clifflab.runtime.storage import Store

STATUS, EVENTS, LOCK = "status.json", "events.jsonl", ".lock"

_WRITE_EVERY = 5.0  # seconds between two writes of status.json
_LINE_EVERY, _LINE_EVERY_LATER, _FIRST = 10.0, 60.0, 3600.0  # between two lines: in the first hour, and after it


def write_status(root: Path, snapshot: Mapping[str, Any]) -> None:
    """Write a run's ``status.json``, whole or not at all.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    write_json(root / STATUS, snapshot)


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
        self._lines = lines_wanted()
        self._began = self._written = self._told = float("-inf")

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event in; a run's first and last are told at once, the others once in a while."""
        self._state.add(event)
        now, kind = self._clock(), event.get("event")
        if kind in ("run_start", "start"):
            self._began = now
        ends = kind in ("run_start", "start", "run_done", "end", "failed")
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
            print_line(snapshot)


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
        found = self._state.snapshot(now)
        if not found["started"]:
            found = as_snapshot(read_json(self.root / STATUS)) or found
            return found if self._held(found["state"]) else {**found, "state": STOPPED}
        return found if self._held(found["state"]) else self._state.snapshot(now, alive=False)

    def _pull(self) -> None:
        if self._store is not None:
            self._store.pull([self.root / EVENTS, self.root / STATUS])

    def _held(self, state: str) -> bool:
        """Whether somebody holds the folder's lock; where that cannot be known, what was told is believed."""
        if self._store is not None or state != RUNNING:
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
