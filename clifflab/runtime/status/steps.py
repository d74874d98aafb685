"""What is known of one step of a run, and how long the steps that have begun still take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clifflab.errors import one_line

RUNNING, DONE, PARTIAL, FAILED, STOPPED = "running", "done", "partial", "failed", "stopped"
WAITING, UNFINISHED = "waiting", "unfinished"

Event = Mapping[str, Any]
Pair = tuple[str, str | None]  # step, model


@dataclass
class StepState:
    """One step of one model, in this run.

    ``seconds`` and ``timed`` are of this run's units alone, and leave merges out: they give the mean of a unit.
    """

    total: int = 0
    before: int = 0
    ready: int = 0
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    rows: int = 0
    tokens: int = 0
    busy: float = 0.0
    seconds: float = 0.0
    timed: int = 0
    state: str = RUNNING

    @property
    def left(self) -> int:
        """Units that are neither done nor given up."""
        return max(0, self.total - self.before - len(self.done) - len(self.failed))

    def units(self) -> dict[str, int]:
        """How many there are, are done, have failed, and are ready but not finished."""
        done, failed = min(self.total, self.before + len(self.done)), len(self.failed)
        queued = max(0, min(self.left, self.ready - len(self.done) - failed))
        return {"total": self.total, "done": done, "failed": failed, "queued": queued}


def time_left(steps: Mapping[Pair, StepState], workers: int) -> tuple[float | None, int]:
    """Seconds that the steps still take, and how many of them are left out.

    The work left is the units left times the mean seconds of a unit of that step: the model's own, else over all
    models. Steps of which no unit was timed yet are left out and counted. The time is never less than one unit's.

    Args:
        steps: Steps that have begun.
        workers: How many there are now.

    Returns:
        The seconds, ``None`` where no unit of any step was timed; and the number of steps left out.
    """
    timed: dict[str, tuple[float, int]] = {}
    for (name, _), step in steps.items():
        seconds, count = timed.get(name, (0.0, 0))
        timed[name] = (seconds + step.seconds, count + step.timed)
    work, longest, untimed = 0.0, 0.0, 0
    for (name, _), step in steps.items():
        if step.state != RUNNING or not step.left:
            continue
        seconds, count = (step.seconds, step.timed) if step.timed else timed[name]
        if count:
            work, longest = work + step.left * seconds / count, max(longest, seconds / count)
        else:
            untimed += 1
    if not any(count for _, count in timed.values()):
        return None, untimed
    return max(work / max(1, workers), longest), untimed


def is_hang(reason: object) -> bool:
    """Whether a worker was ended because it showed no progress."""
    return "hung" in str(reason) or "no progress" in str(reason)


def pair_of(event: Event) -> Pair:
    """The step of an event, and its model."""
    model = event.get("model")
    return str(event.get("step")), None if model is None else str(model)


def count_of(event: Event, name: str) -> int:
    """A whole number of an event; 0 where it has none."""
    value = event.get(name)
    return int(value) if isinstance(value, int | float) else 0


def seconds_of(event: Event) -> float:
    """How long it took."""
    value = event.get("seconds")
    return float(value) if isinstance(value, int | float) else 0.0


def short_node(node: object) -> str:
    """The first characters of a node's id, which tell the nodes of one cluster apart."""
    return one_line(str(node))[:8]


def sums(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Units, rows, tokens and busy seconds of several entries of a snapshot."""
    units = {key: sum(entry["units"][key] for entry in entries) for key in ("total", "done", "failed", "queued")}
    added = {key: sum(entry[key] for entry in entries) for key in ("rows", "tokens")}
    return {"units": units, **added, "busy_s": rounded(sum(entry["busy_s"] for entry in entries))}


def rounded(value: float) -> float:
    """Seconds to the tenth."""
    return round(value, 1)


def as_study(event: Event) -> list[Event]:
    """Events of a scoring job as those of a study with one step."""
    time, kind = event.get("time"), event.get("event")
    about = {"time": time, "step": "score", "model": None}
    if kind == "start":
        units, done = count_of(event, "blocks"), count_of(event, "done")
        begun = {**about, "event": "step_start", "units": units, "missing": units - done}
        return [{"time": time, "event": "run_start", "steps": 1}, begun]
    if kind == "block":
        scorer = f"{event.get('node')} {event.get('pid')}"
        unit = {"event": "unit", "unit": str(event.get("block")), "rows": event.get("read"), "scorer": scorer}
        return [{**event, **about, **unit}]
    if kind == "end":
        return [{**about, "event": "step_done"}, {"time": time, "event": "run_done"}]
    if kind == "failed":
        return [{**event, "event": "run_done", "state": FAILED}]
    return [event]
