"""The shape of a snapshot. Logs and files hold what anybody wrote: what has another shape is no snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.runtime.status.steps import DONE, FAILED, PARTIAL, RUNNING, STOPPED, WAITING

_LARGEST = 1e18  # of any number; what is beyond it, infinite or no number at all cannot be shown


def as_snapshot(found: object) -> dict[str, Any] | None:
    """What was read from a line or a file, if it is a snapshot of a run; ``None`` for everything else."""
    return found if isinstance(found, dict) and _fits(found, _SNAPSHOT) else None


def _fits(value: object, shape: Any) -> bool:
    """Whether a value has a shape: a table of keys (more may be there), ``[shape]`` for lists, or a test of its own."""
    if isinstance(shape, dict):
        return isinstance(value, Mapping) and all(key in value and _fits(value[key], of) for key, of in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    fits: bool = shape(value)
    return fits


def _text(value: object) -> bool:
    return isinstance(value, str)


def _some_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _truth(value: object) -> bool:
    return isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _some_number(value: object) -> bool:
    return value is None or _number(value)


def _some_list(value: object) -> bool:
    return value is None or isinstance(value, list)


def _count(value: object) -> bool:
    return _number(value) and isinstance(value, int)


def _some_count(value: object) -> bool:
    return value is None or _count(value)


def _state(value: object) -> bool:
    return value in (WAITING, RUNNING, DONE, PARTIAL, FAILED, STOPPED)


def _counts(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, _count)


_SUMS = {"units": _counts("total", "done", "failed", "queued"), "rows": _count, "tokens": _count, "busy_s": _number}
_MODEL = {
    "model": _text,
    "state": _text,
    "step": _some_text,
    "error": _some_text,
    "steps": {"done": _count, "total": _some_count},
    **_SUMS,
}
_WORKER = {"kind": _some_text, "node": _some_text, "model": _some_text, "gpu_ids": _some_list}
_SNAPSHOT: dict[str, Any] = {
    "study": _text,
    "state": _state,
    "error": _some_text,
    "run": _count,
    "runtime": _some_text,
    "started": _number,
    "updated": _number,
    "elapsed_s": _number,
    "progress": _counts("done", "begun", "total"),
    **_SUMS,
    "throughput": dict.fromkeys(("window_s", "units_per_s", "rows_per_s", "tokens_per_s"), _number),
    "eta_s": _some_number,
    "eta_at_least": _truth,
    "eta_unknown": _count,
    "models": [_MODEL],
    "steps": [{"step": _text, "model": _some_text, "state": _text, **_SUMS}],
    "workers": {**_counts("now", "without_gpu", "places", "nodes"), "gpus": _number, "list": [_WORKER]},
    "lost": _counts("lost", "hung", "retried"),
    "failures": [{"model": _some_text, "step": _some_text, "unit": _some_text, "error": _text}],
}
