"""Where a submitted run stands: what its driver told last, how its job ended, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.errors import one_line
from clifflab.runtime.status.lines import PREFIX, parse_line
from clifflab.runtime.status.state import RunState
from clifflab.runtime.status.steps import DONE, FAILED, PARTIAL, RUNNING, STOPPED, WAITING

_UNTRAINED, _PARTIAL = 3, 4  # exit codes of a run
_LONGEST = 300
_OURS, _BUG = "clifflab: ", "Traceback (most recent call last)"
_ENDED = {"pending": WAITING, "stopped": STOPPED, "succeeded": DONE, "failed": FAILED}


def state_of(status: str, exit_code: int | None = None) -> str:
    """A job's state in the words for runs.

    Args:
        status: The job's, in Ray's words: pending, running, stopped, succeeded, failed.
        exit_code: Of its driver, once it ended.
    """
    state = _ENDED.get(status, RUNNING)
    if state == FAILED and exit_code in (_PARTIAL, _UNTRAINED):
        return PARTIAL if exit_code == _PARTIAL else DONE
    return state


def of_job(
    told: Mapping[str, Any] | None,
    name: str,
    status: str,
    exit_code: int | None = None,
    message: str = "",
    words: str = "",
) -> dict[str, Any]:
    """Where a submitted run stands.

    Args:
        told: The last status line; ``None`` before the first.
        name: What the job is called.
        status: The job's, in Ray's words: pending, running, stopped, succeeded, failed.
        exit_code: Of its driver, once it ended.
        message: What Ray says of it; of a failed job, the end of its log after some words of Ray's own.
        words: What its driver said last (:func:`last_words`).

    Returns:
        The snapshot with ``job``, its name, and ``told``: whether anything is known of its progress.
    """
    found = {**(told or RunState(name).snapshot(0.0)), "job": name, "told": told is not None}
    ended = state_of(status, exit_code)
    if ended != RUNNING and (found["state"] in (RUNNING, WAITING) or (ended == FAILED and found["state"] == DONE)):
        found["state"] = ended
    if found["state"] == FAILED and not found.get("error"):
        said = words if exit_code is not None else ""  # without one it was ended, and does not know by what
        found["error"] = _end(said or last_words(message) or message) or None
    return found


def last_words(log: str) -> str:
    """Why a driver ended, from its log: its last line in clifflab's name, or of a traceback behind that.

    Empty where there is neither.
    """
    last = ""
    for line in reversed(log.splitlines()):
        text = line.strip()
        if not text or PREFIX in text:
            continue
        if text.startswith(_OURS):
            return text.removeprefix(_OURS)
        last = last or text
        if text.startswith(_BUG):
            return last
    return ""


def read_log(log: str) -> tuple[dict[str, Any] | None, str]:
    """The last snapshot that a job's log tells, ``None`` before the first, and its last words."""
    lines = reversed(log.splitlines())
    return next((found for line in lines if (found := parse_line(line)) is not None), None), last_words(log)


def _end(text: str) -> str:
    """The end of a text, which is where the reason stands."""
    text = one_line(text)
    return text if len(text) <= _LONGEST else "..." + text[3 - _LONGEST :]
