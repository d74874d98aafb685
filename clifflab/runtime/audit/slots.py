"""The places that a run's workers sat in, and what they are known to have done there, from its events."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]
Span = tuple[float, float]
Slot = tuple[str, str]  # node, and the GPU's number there (or "core N" on machines without GPUs)
Task = tuple[float, float, str]  # from, to, and what it was
FAILED, GROUP = "failed", "group"  # why a worker stopped; who did what several workers do together
WORK = ("unit", "merge", "model_load")


@dataclass
class Seated:
    """A worker that sat in one slot, or in several.

    Attributes:
        slots: Where.
        node: Its node.
        start: When its actor began to start, in seconds since the epoch.
        up: When it had started.
        end: When it stopped or its loss was seen; ``None`` where it was there to the end.
        lost: Whether it was lost.
        done: What it finished.
        cut: What it was at when it was lost.
        loads: When it began to load which model.
        loaded: When the first of them was loaded.
    """

    slots: list[Slot]
    node: str
    start: float
    up: float
    end: float | None = None
    lost: bool = False
    done: list[Task] = field(default_factory=list)
    cut: list[Task] = field(default_factory=list)
    loads: dict[str, float] = field(default_factory=dict)
    loaded: float = 0.0

    @property
    def last(self) -> float:
        """When it was last heard of: the end of what it finished last."""
        return max([self.up, *(stop for _, stop, _ in self.done)])

    @property
    def first(self) -> str | None:
        """The model that it was started for: the one that it loaded first."""
        return min(self.loads, key=lambda model: self.loads[model], default=None)

    @property
    def ready(self) -> float:
        """When it had started and loaded that model, or began a unit that loaded it."""
        return max(self.up, min([self.loaded, *(start for start, stop, _ in self.done if stop > self.loaded)]))


def seated(run: Sequence[Event]) -> dict[str, Seated]:
    """A run's workers that sat on GPUs, by name; where none had a GPU, all, each on a core of its node."""
    starts = [event for event in run if event["event"] == "worker_start"]
    on_gpus = any(event.get("gpu_ids") for event in starts)
    if on_gpus:
        starts = [event for event in starts if event.get("gpu_ids")]
    workers: dict[str, Seated] = {}
    for event in starts:
        up, node = float(event["time"]), str(event.get("node"))
        slots = [(node, str(gpu)) for gpu in event.get("gpu_ids") or ()]
        workers[str(event.get("worker"))] = Seated(slots, node, up - float(event.get("seconds") or 0.0), up)
    for event in run:
        if worker := workers.get(str(event.get("worker"))):
            _note(worker, event)
    if not on_gpus:
        _seat(workers)
    return workers


def _note(worker: Seated, event: Event) -> None:
    kind, time = event["event"], float(event["time"])
    if kind in WORK and "began" in event:
        start, stop = when(event)
        worker.done.append((start, stop, told(event)))
        if kind == "model_load":
            worker.loaded = stop if not worker.loads else worker.loaded
            worker.loads.setdefault(str(event.get("model")), start)
    elif kind in ("worker_stop", "worker_lost"):
        if kind == "worker_lost" and event.get("unit") is not None:
            worker.cut.append((lost_start(event, worker.last), time, f"{told(event)}, lost"))
        elif event.get("reason") == FAILED:
            worker.cut.append((worker.last, time, "a unit that failed"))
        worker.lost |= kind == "worker_lost" or event.get("reason") in ("lost", "hung")
        worker.end = time if worker.end is None else worker.end


def when(event: Event) -> Span:
    """From when to when a unit ran or a model was loaded."""
    start = float(event["began"])
    return start, start + float(event.get("seconds") or 0.0)


def lost_start(event: Event, last: float) -> float:
    """When a lost unit was started: as the event says, else when its worker was last heard of."""
    began = event.get("began")
    return float(began) if isinstance(began, int | float) else min(last, float(event["time"]))


def told(event: Event) -> str:
    """What an event is about, for a reader."""
    about = [str(event[key]) for key in ("step", "unit") if event.get(key)]
    kind = "load" if event["event"] == "model_load" else " ".join(about)
    return f"{kind} of {event['model']}" if event.get("model") else kind


def _seat(workers: Mapping[str, Seated]) -> None:
    """Give workers without GPUs the cores of their node, in order: the one that was left first."""
    free: dict[str, list[tuple[float, int]]] = defaultdict(list)
    count: Counter[str] = Counter()
    for worker in sorted(workers.values(), key=lambda worker: worker.up):
        seats = sorted(seat for seat in free[worker.node] if seat[0] <= worker.up)
        if seats:
            free[worker.node].remove(seats[0])
            number = seats[0][1]
        else:
            number = count[worker.node]
            count[worker.node] += 1
        worker.slots = [(worker.node, f"core {number}")]
        free[worker.node].append((float("inf") if worker.end is None else worker.end, number))


def there(workers: Mapping[str, Seated], end: float, *, ended: bool, gone: Mapping[str, float]) -> dict[Slot, Span]:
    """When each slot was there, and known about (see :func:`~clifflab.runtime.audit.idle.slot_uses`).

    Args:
        workers: From :func:`seated`.
        end: When the run's last event was written.
        ended: Whether that was its end; a run that was killed leaves unknown what its workers did last.
        gone: When which node was seen to be gone.
    """
    first: dict[str, float] = defaultdict(lambda: float("inf"))
    heard: dict[str, float] = defaultdict(lambda: float("-inf"))
    for worker in workers.values():
        first[worker.node] = min(first[worker.node], worker.start)
        alive = worker.last if worker.lost else (end if worker.end is None else worker.end)
        heard[worker.node] = max(heard[worker.node], alive)
    found: dict[Slot, Span] = {}
    for slot in {slot for worker in workers.values() for slot in worker.slots}:
        last = max((worker for worker in workers.values() if slot in worker.slots), key=lambda worker: worker.up)
        stop = min(end, gone.get(slot[0], end))
        if last.lost and last.end is not None and heard[slot[0]] <= last.end:
            stop = min(stop, last.end)
        elif not ended and last.end is None:
            stop = last.last
        found[slot] = (first[slot[0]], max(stop, first[slot[0]]))
    return found


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlaps, in order."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif stop > start:
            found.append((start, stop))
    return found


def without(span: Span, taken: Sequence[Span]) -> list[Span]:
    """What is left of a span without others, which are in order and do not overlap."""
    start, stop = span
    found: list[Span] = []
    for a, b in taken[bisect_right([b for _, b in taken], start) :]:
        if a >= stop:
            break
        if a > start:
            found.append((start, a))
        start = max(start, b)
    if start < stop:
        found.append((start, stop))
    return found
