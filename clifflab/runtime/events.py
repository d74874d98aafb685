"""The event log: one JSON object a line, enough for a post-mortem."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from clifflab.artifacts import output_error
from clifflab.runtime.work import Result


class EventLog:
    """Appends events to ``events.jsonl``; a re-run appends to the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time in seconds since the epoch."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        try:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise output_error(self._path, error) from None

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
