"""The event log: one JSON object a line, enough for a post-mortem, and its readers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clifflab.artifacts import output_error

if TYPE_CHECKING:  # readers of a log need none of what its writers load
    from clifflab.runtime.work import Result

Listener = Callable[[Mapping[str, Any]], object]


class EventLog:
    """Appends events to ``events.jsonl``; a re-run appends to the same file.

    Args:
        path: The file.
        listeners: Told of each event once it is written.
    """

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._path, self._listeners = path, tuple(listeners)
        self._begun = False

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time in seconds since the epoch."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            if not self._begun:
                line = ("\n" if _cut_short(self._path) else "") + line
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(line)
        except OSError as error:
            self._begun = False  # a part of the line may be there
            raise output_error(self._path, error) from None
        self._begun = True
        for listener in self._listeners:
            listener(entry)

    def result(self, result: Result) -> None:
        """Log a job and the model loads that it caused."""
        job, where = result.job, result.where
        for load in result.loads:
            self.write("model_load", **load, **where)
        self.write(
            "unit" if job.unit else "merge",
            step=job.step,
            model=job.model,
            unit=job.name,
            attempt=result.attempt,
            began=result.began,
            seconds=result.seconds,
            **where,
            **result.counts,
            **({"error": str(result.error)} if result.error else {}),
        )


class EventReader:
    """Reads a log that may still grow; a line that a killed driver left broken is passed over.

    Args:
        path: The file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._rest = path, 0, b""

    def new(self) -> list[dict[str, Any]]:
        """The events written since the last call; a line without its end waits for the next one."""
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._place)
                data = handle.read()
        except FileNotFoundError:
            return []
        self._place += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [event for line in lines if (event := _event(line)) is not None]


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a log."""
    return EventReader(path).new()


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return None
    return event if isinstance(event, dict) else None


def _cut_short(path: Path) -> bool:
    """Whether the last line has no end: a driver was killed, or the disk was full, while it was written."""
    try:
        with path.open("rb") as handle:
            if not handle.seek(0, 2):
                return False
            handle.seek(-1, 2)
            return handle.read(1) != b"\n"
    except FileNotFoundError:
        return False
