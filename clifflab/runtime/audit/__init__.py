"""A post-mortem of a study from its event log alone: who did what where, and whether it kept the rules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from clifflab.errors import shorten
from clifflab.runtime.audit.idle import Gap, SlotUse, slot_uses
from clifflab.runtime.audit.slots import WORK, Event
from clifflab.runtime.audit.times import load_times, times_by_step
from clifflab.runtime.status.steps import short_node

INLINE = "inline"
_SLOWEST = 10
_GAPS = 10
_DONE_AGAIN = "the log does not say why"
_Where = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What a log tells of one run, or of several that continue each other.

    Attributes:
        runs: Each run: ``run`` (from 1), ``runtime``, ``code``, ``began``, ``seconds``, ``state`` (``unfinished``
            where the log stops), ``gpus``.
        in_driver: Work that the driver's process did although there were workers: must be none.
        wrong_gpus: Where what a worker saw was not what it was given: must be none.
        shared_gpus: Two workers of one moment on one GPU, without each asking for a part of it: must be none.
        loaded_again: Models that a worker loaded more than once: must be none.
        twice: Units done more than once within a run, with the reason, which must be a lost worker.
        again: Units that an earlier run had done too: its result was not kept, or asked for with other settings.
        slots: What each slot did, and when it stood idle while units waited (:func:`slot_uses`).
        gaps: The longest of those stretches.
        steps: Time by step: units, ``busy_s``, ``mean_s``, ``longest_s``, ``wait_s`` (mean time in the queue).
        slowest: The units that took longest.
        loads: Seconds of all model loads by model, and how many.
        lost: Workers that were lost or hung, and what they were at.
        failures: Units and models that failed.
    """

    runs: list[_Where]
    in_driver: list[_Where]
    wrong_gpus: list[_Where]
    shared_gpus: list[_Where]
    loaded_again: list[_Where]
    twice: list[_Where]
    again: list[_Where]
    slots: list[SlotUse]
    gaps: list[Gap]
    steps: list[_Where]
    slowest: list[_Where]
    loads: list[_Where]
    lost: list[_Where]
    failures: list[_Where]

    @property
    def longest_idle(self) -> float:
        """Seconds of the longest gap of any slot."""
        return self.gaps[0].seconds if self.gaps else 0.0

    def problems(self, idle_bound: float | None = None) -> list[str]:
        """The rules that were broken, a line each; empty where all were kept.

        Args:
            idle_bound: Longest time in seconds that a slot may stand idle while units wait; not judged by default.
        """
        found = [f"{_name(w)} was done in the driver's process" for w in self.in_driver]
        found += [f"worker {w['worker']} was given {_ids(w['given'])} and saw {w['saw']}" for w in self.wrong_gpus]
        found += [
            f"workers {' and '.join(w['workers'])} shared GPU {w['gpu']} of node {short_node(w['node'])}"
            for w in self.shared_gpus
        ]
        found += [f"worker {w['worker']} loaded {w['model']} {w['times']} times" for w in self.loaded_again]
        found += [f"{_name(w)} was done {w['times']} times: {w['why']}" for w in self.twice if w["why"] == _DONE_AGAIN]
        if idle_bound is not None:
            found += [
                f"{place(gap.gpu)} of node {short_node(gap.node)} stood idle for {gap.seconds:.1f} s while units waited"
                for gap in self.gaps
                if gap.seconds > idle_bound
            ]
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the rules that were broken as ``problems``; of each slot its longest gaps."""
        short = replace(self, slots=[replace(slot, gaps=slot.gaps[:_GAPS]) for slot in self.slots])
        return {"problems": self.problems(), "longest_idle_s": self.longest_idle, **asdict(short)}


def place(gpu: str) -> str:
    """A slot's name within its node, for a reader."""
    return f"GPU {gpu}" if gpu.isdigit() else gpu


def audit(events: Iterable[Event]) -> Audit:
    """Read a study's events, of all its runs.

    Args:
        events: In the order of the log; what is unknown is passed over.
    """
    runs = list(split(events))
    uses = [use for run in runs for use in slot_uses(run)]
    work = [event for run in runs for event in run if event["event"] in ("unit", "merge")]
    gaps = sorted((gap for use in uses for gap in use.gaps), key=lambda gap: -gap.seconds)
    return Audit(
        runs=[_run(run, number) for number, run in enumerate(runs, 1)],
        in_driver=[_about(event) for run in runs for event in _in_driver(run)],
        wrong_gpus=[wrong for run in runs for wrong in _wrong_gpus(run)],
        shared_gpus=[shared for run in runs for shared in _shared_gpus(run)],
        loaded_again=[again for run in runs for again in _loaded_again(run)],
        twice=[twice for run in runs for twice in _twice(run)],
        again=_again(runs),
        slots=uses,
        gaps=gaps[:_GAPS],
        steps=times_by_step(runs),
        slowest=[
            {**_about(event), "seconds": event["seconds"]}
            for event in sorted(work, key=lambda event: -float(event.get("seconds") or 0.0))[:_SLOWEST]
        ],
        loads=load_times(runs),
        lost=_lost(runs),
        failures=[
            {**_about(event), "event": event["event"], "error": shorten(event.get("error", ""), 300)}
            for run in runs
            for event in run
            if event["event"] in ("unit_failed", "model_failed")
        ],
    )


def split(events: Iterable[Event]) -> Iterator[list[Event]]:
    """The events of each run; those that have no time or name are left out."""
    run: list[Event] = []
    for event in events:
        if not isinstance(event.get("time"), int | float) or not isinstance(event.get("event"), str):
            continue
        if event["event"] == "run_start" and run:
            yield run
            run = []
        run.append(event)
    if run:
        yield run


def worker_of(event: Event) -> str:
    """The worker's name; in logs that do not name workers, its process."""
    return str(event["worker"]) if "worker" in event else f"{event.get('node')}:{event.get('pid')}"


def _run(run: Sequence[Event], number: int) -> _Where:
    start = next((event for event in run if event["event"] == "run_start"), {})
    end = next((event for event in run if event["event"] == "run_done"), None)
    places = next((event for event in run if event["event"] == "workers"), {})
    return {
        "run": number,
        "runtime": start.get("runtime"),
        "code": start.get("code"),
        "began": run[0]["time"],
        "seconds": round(run[-1]["time"] - run[0]["time"], 3),
        "state": "unfinished" if end is None else end.get("state", "done"),
        "gpus": places.get("gpus"),
    }


def _in_driver(run: Sequence[Event]) -> list[Event]:
    """Work in the driver's process; its node is compared too where the log has it."""
    start = run[0]
    if start.get("runtime") == INLINE or start.get("driver_pid") is None:
        return []
    node = start.get("driver_node")
    return [
        event
        for event in run
        if event["event"] in WORK
        and event.get("pid") == start["driver_pid"]
        and (node is None or event.get("node") == node)
    ]


def _wrong_gpus(run: Sequence[Event]) -> Iterator[_Where]:
    """Workers whose process showed other GPUs, or other numbers of them, than they were given; each is told once."""
    given: dict[str, list[str]] = {}
    told = set()
    for event in run:
        worker = worker_of(event)
        if event["event"] == "worker_start":
            given[worker] = [] if event.get("kind") == "cpu" else _gpus(event)
            asked, saw = event.get("gpus"), [_gpus(event)]
            saw += [sorted(map(str, event["visible"]))] if event.get("visible") is not None else []
            if isinstance(asked, int | float) and math.ceil(asked) != len(given[worker]):
                told.add(worker)
                yield {"worker": worker, "given": f"{asked:g} GPUs", "saw": _gpus(event)}
        elif event["event"] in WORK and worker in given and "gpu_ids" in event:
            saw = [_gpus(event)]
        else:
            continue
        for wrong in [ids for ids in saw if ids != given[worker] and worker not in told]:
            told.add(worker)
            yield {"worker": worker, "given": given[worker], "saw": wrong}


def _shared_gpus(run: Sequence[Event]) -> Iterator[_Where]:
    """Pairs of workers that were up on one GPU at once, in the order in which the driver saw it."""
    sitting: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for event in run:
        if event["event"] == "worker_start":
            share = event.get("gpus")
            part = float(share) if isinstance(share, int | float) and share < 1 else 1.0
            for gpu in _gpus(event):
                others = sitting[str(event.get("node")), gpu]
                if others and sum(others.values()) + part > 1 + 1e-6:
                    names = [*others, worker_of(event)]
                    yield {"node": event.get("node"), "gpu": gpu, "workers": names, "time": event["time"]}
                others[worker_of(event)] = part
        elif event["event"] in ("worker_stop", "worker_lost"):
            for others in sitting.values():
                others.pop(worker_of(event), None)


def _loaded_again(run: Sequence[Event]) -> Iterator[_Where]:
    times: dict[tuple[str, str], int] = defaultdict(int)
    for event in run:
        if event["event"] == "model_load" and worker_of(event) != INLINE and run[0].get("runtime") != INLINE:
            times[worker_of(event), str(event.get("model"))] += 1
    for (worker, model), count in times.items():
        if count > 1:
            yield {"worker": worker, "model": model, "times": count}


def _twice(run: Sequence[Event]) -> Iterator[_Where]:
    done: dict[tuple[Any, ...], list[Event]] = defaultdict(list)
    lost: dict[tuple[Any, ...], Event] = {}
    for event in run:
        if event["event"] == "unit" and not event.get("error"):
            done[_unit(event)].append(event)
        elif event["event"] == "worker_lost":
            lost[_unit(event)] = event
    for unit, times in done.items():
        if len(times) > 1:
            loss = lost.get(unit)
            why = f"a worker was lost: {shorten(loss.get('reason', ''))}" if loss else _DONE_AGAIN
            yield {**_about(times[-1]), "times": len(times), "why": why}


def _again(runs: Sequence[Sequence[Event]]) -> list[_Where]:
    """Units that more than one run did."""
    first: dict[tuple[Any, ...], int] = {}
    found = []
    for number, run in enumerate(runs):
        here = {_unit(event): event for event in run if event["event"] == "unit" and not event.get("error")}
        for unit, event in here.items():
            if unit in first:
                before = first[unit]
                same = runs[before][0].get("code") == run[0].get("code")
                why = "other settings or inputs, or its file was gone" if same else "other code"
                found.append({**_about(event), "runs": [before + 1, number + 1], "why": why})
            first[unit] = number
    return found


def _lost(runs: Sequence[Sequence[Event]]) -> list[_Where]:
    """Losses with what the worker was at; a stop with the same reason as a loss that is told already is left out."""
    found = []
    for run in runs:
        told = {worker_of(event) for event in run if event["event"] == "worker_lost"}
        for event in run:
            stopped = event["event"] == "worker_stop" and event.get("reason") in ("lost", "hung")
            if event["event"] == "worker_lost" or (stopped and worker_of(event) not in told):
                reason = shorten(event.get("reason", ""), 300)
                found.append({**_about(event), "attempt": event.get("attempt"), "reason": reason})
    return found


def _unit(event: Event) -> tuple[Any, ...]:
    return event.get("step"), event.get("model"), event.get("unit")


def _gpus(event: Event) -> list[str]:
    return sorted(str(gpu) for gpu in event.get("gpu_ids") or ())


def _ids(given: object) -> str:
    return given if isinstance(given, str) else f"GPUs {given}"


def _about(event: Event) -> _Where:
    about = {key: event.get(key) for key in ("time", "step", "model", "unit")}
    return {**about, "worker": worker_of(event)}


def _name(entry: Mapping[str, Any]) -> str:
    of = f" of {entry['model']}" if entry.get("model") else ""
    return f"{entry.get('step') or 'a load'} {entry.get('unit') or ''}".strip() + of
