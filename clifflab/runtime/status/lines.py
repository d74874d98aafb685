"""Status lines: a snapshot in one line of a job's log, among whatever else the job prints."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from clifflab.runtime.status.shape import as_snapshot
from clifflab.runtime.status.state import RunState

PREFIX = "::clifflab-status:: "  # marks a status line among whatever else a job prints
LINES = "CLIFFLAB_STATUS_LINES"

_MOST_STEPS = 60


def lines_wanted() -> bool:
    """Whether this process is to print status lines."""
    return os.environ.get(LINES) == "1"


def status_line(snapshot: Mapping[str, Any]) -> str:
    """One line for a job's log: the snapshot without what grows with the number of steps and workers.

    Steps that are done are told by their models' sums.
    """
    steps = [step for step in snapshot["steps"] if step["state"] != "done"][:_MOST_STEPS]
    workers = {key: value for key, value in snapshot["workers"].items() if key != "list"}
    return PREFIX + json.dumps({**snapshot, "steps": steps, "workers": {**workers, "list": []}}, allow_nan=False)


def print_line(snapshot: Mapping[str, Any]) -> None:
    """Print a snapshot's line at once."""
    sys.stdout.write(status_line(snapshot) + "\n")
    sys.stdout.flush()


def tell_whole(name: str) -> None:
    """Print, where lines are wanted, the line of a run that found everything done by an earlier one."""
    if lines_wanted():
        state, now = RunState(name), time.time()
        state.add({"time": now, "event": "run_start", "steps": 0})
        state.add({"time": now, "event": "run_done", "state": "done"})
        print_line(state.snapshot(now))


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
