"""Where a run's time went, from its events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from clifflab.runtime.audit.slots import Event


def times_by_step(runs: Sequence[Sequence[Event]]) -> list[dict[str, Any]]:
    """Time by step, over all models and runs, in the order in which they began."""
    found: dict[str, dict[str, Any]] = {}
    waits: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        ready: dict[tuple[str, Any], list[float]] = defaultdict(list)
        begun: dict[tuple[str, Any], list[float]] = defaultdict(list)
        for event in run:
            group = (str(event.get("step")), event.get("model"))
            if event["event"] == "ready" and not event.get("merge"):
                ready[group] += [event["time"]] * int(event.get("units") or 0)
            if event["event"] not in ("unit", "merge"):
                continue
            seconds = float(event.get("seconds") or 0.0)
            entry = found.setdefault(group[0], {"step": group[0], "units": 0, "busy_s": 0.0, "longest_s": 0.0})
            entry["busy_s"] += seconds
            if event["event"] == "unit":
                entry["units"] += 1
                entry["longest_s"] = max(entry["longest_s"], seconds)
                entry["unit_s"] = entry.get("unit_s", 0.0) + seconds
                if "began" in event and (event.get("attempt") or 1) == 1:
                    begun[group].append(float(event["began"]))
        for group, starts in begun.items():
            pairs = zip(sorted(ready[group]), sorted(starts), strict=False)
            waits[group[0]] += [max(0.0, start - time) for time, start in pairs]
    steps = []
    for name, entry in found.items():
        mean = entry.pop("unit_s", 0.0) / entry["units"] if entry["units"] else None
        wait = sum(waits[name]) / len(waits[name]) if waits[name] else None
        steps.append(
            {
                **{key: round(value, 3) if isinstance(value, float) else value for key, value in entry.items()},
                "mean_s": None if mean is None else round(mean, 3),
                "wait_s": None if wait is None else round(wait, 3),
            }
        )
    return steps


def load_times(runs: Sequence[Sequence[Event]]) -> list[dict[str, Any]]:
    """How often each model was loaded, and how long that took."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in (event for run in runs for event in run if event["event"] == "model_load"):
        found[str(event.get("model"))].append(float(event.get("seconds") or 0.0))
    return [{"model": name, "loads": len(s), "seconds": round(sum(s), 3)} for name, s in found.items()]
