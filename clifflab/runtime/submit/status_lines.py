"""The status lines in a job's log: what its driver prints for those who watch it."""

from __future__ import annotations

import json
from typing import Any

PREFIX = "::clifflab-status:: "


def parse_line(line: str) -> dict[str, Any] | None:
    """The status that a line of a log carries; None for every other line."""
    if not line.startswith(PREFIX):
        return None
    try:
        found = json.loads(line.removeprefix(PREFIX))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
