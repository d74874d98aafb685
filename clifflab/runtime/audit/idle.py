"""Places that stood idle while work for them waited, from a run's events."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clifflab.runtime.audit.slots import (
    FAILED,
    GROUP,
    WORK,
    Event,
    Seated,
    Slot,
    Span,
    Task,
    lost_start,
    seated,
    there,
    told,
    union,
    when,
    without,
)

Group = tuple[str, str | None]  # step, model
_BACKOFF = 1.0
_SHORTEST = 1e-3  # seconds; times are logged in thousandths


@dataclass(frozen=True)
class Gap:
    """A stretch in which a slot stood idle although units that it could do were waiting.

    Attributes:
        node: The slot's node.
        gpu: Its GPU there.
        began: Seconds since the epoch.
        seconds: Its length.
        waiting: Units waiting when it began, by ``step model``.
        before: What the slot did last.
        after: What ended the gap.
    """

    node: str
    gpu: str
    began: float
    seconds: float
    waiting: dict[str, int]
    before: str
    after: str


@dataclass(frozen=True)
class SlotUse:
    """What one slot did over a run.

    Attributes:
        node: The slot's node.
        gpu: Its GPU there.
        there_s: How long it was there.
        busy_s: How long a unit ran, a model was loaded or an actor started in it.
        work_s: How long units ran in it; what they loaded is in it.
        idle_s: How long it stood idle while units waited: the sum of its gaps.
        gaps: The longest gaps first.
    """

    node: str
    gpu: str
    there_s: float
    busy_s: float
    work_s: float
    idle_s: float
    gaps: tuple[Gap, ...]


def slot_uses(run: Sequence[Event]) -> list[SlotUse]:
    """What every slot of a run did, and its gaps.

    A gap of a slot is a stretch of time in which no unit runs, no model is loaded and no actor starts in it, while at
    least one ready unit that needs a model, and that this slot could do, has not been started. In detail:

    * A slot is a GPU of a node, seen in the workers that sat on it; where no worker has a GPU, one core.
    * It is there from when the first worker of its node began to start to the end of the run. It is gone from a node
      that is lost, or of which nothing is heard after its workers were lost. Where the run was killed, what a worker
      did after its last event is not known, and is no gap.
    * A unit waits from the ``ready`` event that queued it to the start of its first try. After a lost worker it waits
      from the end of its backoff (``backoff`` seconds of the ``worker_lost`` event, else ``backoff_seconds`` of
      ``run_start`` or 1, doubled with each try) to the start of its next try; after an error that may pass, from the
      end of the ``pause`` of its ``retry`` event. Units of a model that failed wait no more.
    * A unit needs a model if its ``ready`` event names a ``key``; where the log has no keys, if units of its step ran
      in workers that sit in slots.
    * Of a model's waiting units, as many are spoken for as workers start or load that model: they are no work for
      others.
    * A slot could do a unit that needs several GPUs only while so many slots of its node are idle; and none of a model
      that as many workers hold as its ``replicas`` in the ``ready`` event allow.
    * While a group of workers does a unit, slots in which no worker of the pool sits are taken for the group's.
    * A unit whose worker was lost ran from ``began`` of the ``worker_lost`` event, else from when the worker had last
      finished something, until the loss was seen.

    Starts are read off the workers' clocks, the rest off the driver's: gaps are as exact as these agree.
    """
    workers = seated(run)
    if not workers:
        return []
    end = float(run[-1]["time"])
    gone = {str(event.get("node")): float(event["time"]) for event in run if event["event"] == "node_lost"}
    spans = there(workers, end, ended=any(event["event"] == "run_done" for event in run), gone=gone)
    groups = [event for event in run if event["event"] == "unit" and event.get("worker") == GROUP and "began" in event]
    busy: dict[Slot, list[Task]] = {slot: _beside(groups, workers, slot, end) for slot in spans}
    for worker in workers.values():
        for slot in worker.slots:
            busy[slot] += [*worker.done, *worker.cut]
    work = {slot: _length(tasks) for slot, tasks in busy.items()}
    for name, worker in workers.items():
        for slot in worker.slots:
            busy[slot].append((worker.start, worker.up, f"start of worker {name}"))
    gaps = _gaps(spans, busy, _waits(run, workers, end), workers)
    uses = []
    for slot, (start, stop) in sorted(spans.items()):
        mine = tuple(sorted(gaps.get(slot, ()), key=lambda gap: -gap.seconds))
        spent = [stop - start, _length(busy[slot]), work[slot], sum(gap.seconds for gap in mine)]
        there_s, busy_s, work_s, idle_s = (round(seconds, 3) for seconds in spent)
        uses.append(SlotUse(*slot, there_s, busy_s, work_s, idle_s, mine))
    return uses


def _length(tasks: Sequence[Task]) -> float:
    """Seconds in which at least one of them went on."""
    return sum(b - a for a, b in union([(a, b) for a, b, _ in tasks]))


def _beside(groups: Sequence[Event], workers: Mapping[str, Seated], slot: Slot, end: float) -> list[Task]:
    """What groups of workers did while no worker of the pool sat in a slot: it is taken for theirs."""
    sat = union([(w.start, end if w.end is None else w.end) for w in workers.values() if slot in w.slots])
    return [(start, stop, told(event)) for event in groups for start, stop in without(when(event), sat)]


@dataclass
class _Wait:
    """Units of one group that wait: when, how many, and what they ask of a slot."""

    name: str
    spans: list[Span]
    gpus: int
    model: str | None
    replicas: int | None


@dataclass
class _Units:
    """What the log says of one group's units.

    ``tries`` and ``again`` are by unit and try: when it was started; and when a lost one might be tried again.
    """

    ready: list[float]
    asked: Event
    missing: int | None = None
    done: float | None = None
    tries: dict[tuple[str, int], float] = field(default_factory=dict)
    again: dict[tuple[str, int], float] = field(default_factory=dict)


def _waits(run: Sequence[Event], workers: Mapping[str, Seated], end: float) -> list[_Wait]:
    groups = _units(run, workers)
    failed: dict[str, float] = {}
    for event in run:
        if event["event"] == "model_failed":
            failed.setdefault(str(event.get("model")), float(event["time"]))
    keys = any("key" in units.asked for units in groups.values())
    modelled = {event.get("step") for event in run if event["event"] == "unit" and str(event.get("worker")) in workers}
    found = []
    for group, units in groups.items():
        if not units.ready or (units.asked.get("key") is None if keys else group[0] not in modelled):
            continue
        stop = min(end, failed.get(str(group[1]), end), end if units.done is None else units.done)
        begun = sorted(start for (_, attempt), start in units.tries.items() if attempt == 1)
        queued = sorted(units.ready)[: units.missing]
        spans = list(zip(queued, [*begun, *[stop] * len(queued)], strict=False))
        for (unit, attempt), again in units.again.items():
            if (unit, attempt + 1) in units.tries:
                spans.append((again, units.tries[unit, attempt + 1]))
        spans = [(a, min(b, stop)) for a, b in spans if min(b, stop) > a]
        found.append(_Wait(" ".join(str(part) for part in group if part), spans, *_needs(units.asked, group, workers)))
    return found


def _units(run: Sequence[Event], workers: Mapping[str, Seated]) -> dict[Group, _Units]:
    found: dict[Group, _Units] = defaultdict(lambda: _Units([], {}))
    pause = next((float(event["backoff_seconds"]) for event in run if "backoff_seconds" in event), _BACKOFF)
    last = {name: worker.up for name, worker in workers.items()}
    broke: float | None = None  # when a unit was begun that broke its worker
    for event in run:
        kind, units, time = event["event"], found[str(event.get("step")), event.get("model")], float(event["time"])
        name, attempt, worker = str(event.get("unit")), int(event.get("attempt") or 1), str(event.get("worker"))
        if kind == "ready":
            if event.get("merge") or ("key" in event and event["key"] is None):
                units.asked = units.asked or event
                continue
            units.ready += [time] * int(event.get("units") or 0)
            units.asked = event
        elif kind == "step_start":
            units.missing = int(event.get("missing") or 0)
        elif kind == "unit" and "began" in event:
            units.tries.setdefault((name, attempt), float(event["began"]))
        elif kind == "worker_lost" and event.get("unit") is not None and name != "merge":
            units.tries.setdefault((name, attempt), lost_start(event, last.get(worker, time)))
            backoff = event.get("backoff")
            units.again[name, attempt] = time + (pause * 2 ** (attempt - 1) if backoff is None else float(backoff))
        elif kind == "worker_stop" and event.get("reason") == FAILED:
            broke = last.get(worker)
        elif kind == "retry" and name != "merge":  # the event has the number of the next try
            units.tries.setdefault((name, attempt - 1), time if broke is None else broke)
            units.again[name, attempt - 1] = time + float(event.get("pause") or 0.0)
            broke = None
        elif kind == "unit_failed" and name != "merge":
            units.tries.setdefault((name, int(event.get("attempts") or 1)), time if broke is None else broke)
            broke = None
        elif kind == "step_done" or (kind == "merge" and "began" in event):
            stop = float(event.get("began", time))
            units.done = stop if units.done is None else min(units.done, stop)
        if kind in WORK and "began" in event and worker in last:
            last[worker] = max(last[worker], when(event)[1])
    return found


def _needs(asked: Event, group: Group, workers: Mapping[str, Seated]) -> tuple[int, str | None, int | None]:
    """GPUs of one worker, the key, and how many workers may hold it."""
    key, replicas = asked.get("key", group[1]), asked.get("replicas")
    gpus = asked.get("gpus")
    if not isinstance(gpus, int | float):
        gpus = max((len(worker.slots) for worker in workers.values() if str(key) in worker.loads), default=1)
    if not any(slot[1].isdigit() for worker in workers.values() for slot in worker.slots):
        gpus = 1  # no worker has a GPU
    return max(1, int(gpus)), None if key is None else str(key), replicas if isinstance(replicas, int) else None


def _gaps(
    spans: Mapping[Slot, Span],
    busy: Mapping[Slot, Sequence[Task]],
    waits: Sequence[_Wait],
    workers: Mapping[str, Seated],
) -> dict[Slot, list[Gap]]:
    """Sweep over time: between two changes the idle slots and the waiting units stay the same."""
    changes: dict[float, list[tuple[str, Any, int]]] = defaultdict(list)

    def during(start: float, stop: float | None, what: str, name: Any) -> None:
        changes[start].append((what, name, 1))
        if stop is not None:
            changes[max(start, stop)].append((what, name, -1))

    for slot, span in spans.items():
        for start, stop in without(span, union([(a, b) for a, b, _ in busy[slot]])):
            during(start, stop, "idle", slot)
    for number, wait in enumerate(waits):
        for start, stop in wait.spans:
            during(start, stop, "wait", number)
    for worker in workers.values():
        for model, start in worker.loads.items():
            during(start, worker.end, "hold", model)
            for slot in worker.slots:
                during(start, worker.end, "here", (slot, model))
        if worker.first is not None:
            during(worker.start, worker.ready, "prepare", worker.first)
    state: dict[str, Counter[Any]] = {what: Counter() for what in ("idle", "wait", "hold", "here", "prepare")}
    opened: dict[Slot, tuple[float, dict[str, int]]] = {}
    gaps = []
    for time in sorted(changes):
        for what, name, step in changes[time]:
            state[what][name] += step
            if not state[what][name]:
                del state[what][name]
        could = _could(state, waits)
        for slot in [slot for slot in opened if slot not in could]:
            gaps.append((slot, time, *opened.pop(slot)))
        for slot, names in could.items():
            opened.setdefault(slot, (time, names))
    around = {slot: _Around(tasks) for slot, tasks in busy.items()}
    found: dict[Slot, list[Gap]] = defaultdict(list)
    for slot, stop, began, waiting in gaps:
        if stop - began >= _SHORTEST:
            found[slot].append(around[slot].gap(slot, stop, began, waiting))
    return found


def _could(state: Mapping[str, Counter[Any]], waits: Sequence[_Wait]) -> dict[Slot, dict[str, int]]:
    """Idle slots for which units wait, with how many of which."""
    waiting = [(waits[number], count) for number, count in state["wait"].items()]
    queued = Counter[str | None]()
    for wait, count in waiting:
        queued[wait.model] += count
    waiting = [(wait, count) for wait, count in waiting if queued[wait.model] > state["prepare"][wait.model]]
    slots = list(state["idle"]) if waiting else []
    idle = Counter(node for node, _ in slots)
    found: dict[Slot, dict[str, int]] = {}
    for slot in slots:
        for wait, count in waiting:
            allowed = wait.replicas is None or state["hold"][wait.model] < wait.replicas
            if wait.gpus <= idle[slot[0]] and (allowed or state["here"][slot, wait.model] > 0):
                found.setdefault(slot, {})[wait.name] = count
    return found


class _Around:
    """What a slot did before and after a moment.

    Args:
        busy: All that it did.
    """

    def __init__(self, busy: Sequence[Task]) -> None:
        self._ends = sorted((stop, what) for _, stop, what in busy)
        self._starts = sorted((start, what) for start, _, what in busy)

    def gap(self, slot: Slot, stop: float, began: float, waiting: dict[str, int]) -> Gap:
        """A gap with its circumstances."""
        last = bisect_right(self._ends, began + _SHORTEST, key=lambda entry: entry[0])
        before = self._ends[last - 1][1] if last else "nothing yet"
        first = bisect_left(self._starts, stop - _SHORTEST, key=lambda entry: entry[0])
        start, after = self._starts[first] if first < len(self._starts) else (float("inf"), "")
        if start > stop + _SHORTEST:
            after = "no unit that it could do waited any more"
        return Gap(*slot, round(began, 3), round(stop - began, 3), waiting, before, after)
