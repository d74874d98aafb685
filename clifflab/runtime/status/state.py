"""Where a run stands, read from its events alone.

Events come in any mixture of steps and models. A resumed run appends to the same log: what its ``run_start`` begins
replaces what was known, and units that an earlier run did count as done through ``step_start``.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from clifflab.errors import shorten
from clifflab.runtime.status.steps import (
    DONE,
    FAILED,
    PARTIAL,
    RUNNING,
    STOPPED,
    UNFINISHED,
    WAITING,
    Event,
    Pair,
    StepState,
    as_study,
    count_of,
    is_hang,
    pair_of,
    rounded,
    seconds_of,
    sums,
    time_left,
)

_WINDOW, _LONG_WINDOW, _ENOUGH = 120.0, 900.0, 5  # seconds that speeds are taken over; the long one for rare units
_MOST_FAILURES = 50


class RunState:
    """Takes events one by one; :meth:`snapshot` says where the run stands.

    Args:
        study: Name of what runs.
    """

    def __init__(self, study: str) -> None:
        self._study = study
        self._runs = 0
        self._updated = 0.0
        self._begin({})

    def add(self, event: Event) -> None:
        """Take one event in; one that is unknown, or lacks what it should have, changes nothing but the time."""
        for part in as_study(event):
            take = getattr(self, f"_on_{part.get('event')}", None)
            if isinstance(time := part.get("time"), int | float):
                self._updated = max(self._updated, float(time))
            if take is not None:
                take(part)

    def snapshot(self, now: float, *, alive: bool = True) -> dict[str, Any]:
        """Plain data.

        Args:
            now: Seconds since the epoch.
            alive: Whether the driver still runs; a run that ended without saying so is ``stopped``.

        Returns:
            ``study``; ``state`` (running, done, partial, failed, stopped), and the ``error`` of a failed run; ``run``
            (1 for the first, more for resumes); ``runtime``; ``address``; ``started`` and ``updated`` (seconds since
            the epoch); ``elapsed_s``; ``progress`` (steps ``done``, ``begun`` and ``total``); of the steps that have
            begun the ``units`` (``total``, ``done``, ``failed``, and ``queued``: ready and not finished), ``rows``,
            ``tokens`` and ``busy_s``; ``throughput``; ``eta_s``, null where nothing was timed yet, with
            ``eta_at_least`` (some steps are not in it) and ``eta_unknown`` (how many); ``models``, ``steps``,
            ``workers``, ``lost``, ``failures``.
        """
        state = self._ended or (RUNNING if alive else STOPPED)
        end = now if state == RUNNING else self._updated
        steps = [self._step_entry(pair, step, state) for pair, step in self._steps.items()]
        eta, unknown = self._eta() if state == RUNNING else (None, 0)
        whole = sum(step["state"] == DONE for step in steps)
        return {
            "study": self._study,
            "state": state,
            "error": self._error or None,
            "run": max(1, self._runs),
            "runtime": self._runtime,
            "address": self._address,
            "started": self._started,
            "updated": self._updated,
            "elapsed_s": rounded(max(0.0, end - self._started) if self._started else 0.0),
            "progress": {"done": whole, "begun": len(steps), "total": max(self._total or 0, len(steps))},
            **sums(steps),
            "throughput": self._throughput(state, end),
            "eta_s": None if eta is None else rounded(eta),
            "eta_at_least": bool(unknown) and eta is not None,
            "eta_unknown": unknown,
            "models": self._models(steps, state),
            "steps": steps,
            "workers": self._worker_entry(state),
            "lost": dict(self._lost),
            "failures": list(self._failures),
        }

    # What each event changes.

    def _on_run_start(self, event: Event) -> None:
        self._begin(event)
        self._runs += 1

    def _on_workers(self, event: Event) -> None:
        self._places = count_of(event, "places") or count_of(event, "count")
        self._gpus = count_of(event, "gpus")

    def _on_worker_start(self, event: Event) -> None:
        keep = ("kind", "node", "pid", "gpu_ids")
        self._workers[str(event.get("worker"))] = {**{key: event.get(key) for key in keep}, "model": None}

    def _on_worker_stop(self, event: Event) -> None:
        self._gone(event, hung=event.get("reason") == "hung", lost=event.get("reason") == "lost")

    def _on_worker_lost(self, event: Event) -> None:
        self._gone(event, hung=is_hang(event.get("reason")), lost=True)
        self._lost["retried"] += event.get("unit") is not None

    def _on_model_load(self, event: Event) -> None:
        if worker := self._workers.get(str(event.get("worker"))):
            worker["model"] = event.get("model")
        if isinstance(event.get("model"), str):
            self._busy_models.add(event["model"])

    def _on_step_start(self, event: Event) -> None:
        units, missing = count_of(event, "units"), count_of(event, "missing")
        self._steps[pair_of(event)] = StepState(
            units, max(0, units - missing), missing if "ready" not in self._seen else 0
        )

    def _on_ready(self, event: Event) -> None:
        if "ready" not in self._seen:  # logs without it queue all of a step's units when it begins
            self._seen.add("ready")
            for known in self._steps.values():
                known.ready = len(known.done) + len(known.failed)
        if (step := self._steps.get(pair_of(event))) and not event.get("merge"):
            step.ready += count_of(event, "units")

    def _on_unit(self, event: Event) -> None:
        step = self._steps.setdefault(pair_of(event), StepState())
        name, seconds = str(event.get("unit")), seconds_of(event)
        step.busy += seconds
        if event.get("error") or name in step.done:
            return
        step.done.add(name)
        step.failed.discard(name)
        step.total = max(step.total, step.before + len(step.done))
        step.seconds, step.timed = step.seconds + seconds, step.timed + 1
        rows, tokens = count_of(event, "rows"), count_of(event, "tokens")
        step.rows, step.tokens = step.rows + rows, step.tokens + tokens
        if scorer := event.get("scorer"):
            self._scorers[str(scorer)] = self._updated
        self._recent.append((self._updated, rows, tokens))
        while self._recent and self._updated - self._recent[0][0] > _LONG_WINDOW:
            self._recent.popleft()
        if event.get("model"):
            self._busy_models.add(str(event["model"]))

    def _on_merge(self, event: Event) -> None:
        self._steps.setdefault(pair_of(event), StepState()).busy += seconds_of(event)

    def _on_unit_failed(self, event: Event) -> None:
        step = self._steps.setdefault(pair_of(event), StepState())
        if (name := str(event.get("unit"))) not in step.done and name != "merge":
            step.failed.add(name)
            step.total = max(step.total, step.before + len(step.done) + len(step.failed))
        self._fail(event)

    def _on_model_failed(self, event: Event) -> None:
        model = str(event.get("model"))
        self._failed.setdefault(model, {"step": event.get("step"), "error": shorten(event.get("error", ""), 300)})
        self._dropped |= {model, *map(str, event.get("models") or ())}
        for (_, owner), step in self._steps.items():
            if owner in self._dropped and step.state == RUNNING:
                step.state = FAILED
        self._fail(event)

    def _on_step_done(self, event: Event) -> None:
        self._steps.setdefault(pair_of(event), StepState()).state = DONE

    def _on_run_done(self, event: Event) -> None:
        self._ended, self._error = str(event.get("state", DONE)), shorten(event.get("error") or "", 300)
        self._workers.clear()
        for entry in event.get("failed") or ():
            if entry.get("model") not in self._failed:
                self._on_model_failed(entry)

    # What a snapshot is made of.

    def _begin(self, event: Event) -> None:
        """Forget the run before."""
        time, plan, steps = event.get("time"), event.get("plan"), event.get("steps")
        self._runtime, self._address = event.get("runtime"), event.get("address")
        self._started = self._updated = float(time) if isinstance(time, int | float) else 0.0
        self._plan: list[Pair] = [(step, model) for step, model in plan] if isinstance(plan, list) else []
        self._total: int | None = len(self._plan) or (steps if isinstance(steps, int) else None)
        self._names = [str(name) for name in event.get("models") or ()]
        self._ended = self._error = ""
        self._steps: dict[Pair, StepState] = {}
        self._failed: dict[str, dict[str, Any]] = {}
        self._dropped: set[str] = set()  # failed models, and those that follow from them
        self._failures: list[dict[str, Any]] = []
        self._workers: dict[str, dict[str, Any]] = {}
        self._ended_workers: set[str] = set()
        self._busy_models: set[str] = set()
        self._scorers: dict[str, float] = {}  # of a scoring job: when each was last heard of
        self._recent: deque[tuple[float, int, int]] = deque()
        self._lost = {"lost": 0, "hung": 0, "retried": 0}
        self._places = self._gpus = 0
        self._seen: set[str] = set()

    def _gone(self, event: Event, *, hung: bool, lost: bool) -> None:
        """A worker is there no more; told twice (it was lost, and it stopped), it counts once."""
        worker = event.get("worker")
        self._workers.pop(str(worker), None)
        if worker is not None and str(worker) in self._ended_workers:
            return
        if hung or lost:
            self._lost["hung" if hung else "lost"] += 1
            self._ended_workers.add(str(worker))

    def _fail(self, event: Event) -> None:
        entry = {key: event.get(key) for key in ("model", "step", "unit")}
        entry["error"] = shorten(event.get("error", ""), 300)
        if entry not in self._failures and len(self._failures) < _MOST_FAILURES:
            self._failures.append(entry)

    def _step_entry(self, pair: Pair, step: StepState, state: str) -> dict[str, Any]:
        own = UNFINISHED if step.state == RUNNING and state != RUNNING else step.state
        counts = {"rows": step.rows, "tokens": step.tokens, "busy_s": rounded(step.busy)}
        return {"step": pair[0], "model": pair[1], "state": own, "units": step.units(), **counts}

    def _models(self, steps: list[dict[str, Any]], state: str) -> list[dict[str, Any]]:
        owners = [*self._names, *(model for _, model in self._plan), *(s["model"] for s in steps), *self._failed]
        names = [name for name in dict.fromkeys(owners) if name is not None]
        return [self._model(name, [step for step in steps if step["model"] == name], state) for name in names]

    def _model(self, name: str, steps: list[dict[str, Any]], state: str) -> dict[str, Any]:
        failure = self._failed.get(name)
        planned = {step for step, model in self._plan if model == name}
        whole = {step["step"] for step in steps if step["state"] == DONE}
        if failure or name in self._dropped:
            own = FAILED
        elif state in (DONE, PARTIAL) or (self._plan and planned <= whole):
            own = DONE
        elif state != RUNNING:
            own = UNFINISHED
        else:
            own = RUNNING if steps or name in self._busy_models else WAITING
        at = [step["step"] for step in steps if step["state"] == RUNNING]
        about = {"model": name, "state": own, "step": failure["step"] if failure else ", ".join(at) or None}
        progress = {"steps": {"done": len(whole), "total": len(planned) or None}}
        return {**about, "error": failure["error"] if failure else None, **progress, **sums(steps)}

    def _throughput(self, state: str, end: float) -> dict[str, float]:
        """Units, rows and tokens a second: lately while it runs, over the whole run when it has ended."""
        window = max(end - self._started, 1e-3)
        if state == RUNNING:
            short = sum(end - time <= _WINDOW for time, _, _ in self._recent) >= _ENOUGH
            window = min(window, _WINDOW if short else _LONG_WINDOW)
            recent = [entry for entry in self._recent if end - entry[0] <= window]
            totals = (len(recent), sum(entry[1] for entry in recent), sum(entry[2] for entry in recent))
        else:
            every = self._steps.values()
            totals = (sum(len(s.done) for s in every), sum(s.rows for s in every), sum(s.tokens for s in every))
        units, rows, tokens = (round(value / window, 3) for value in totals)
        return {"window_s": rounded(window), "units_per_s": units, "rows_per_s": rows, "tokens_per_s": tokens}

    def _eta(self) -> tuple[float | None, int]:
        """Seconds that the begun steps still take, and how many steps that leaves out."""
        to_come = max(0, (self._total or 0) - len(self._steps))
        if self._plan:  # steps of failed models will not come
            to_come = sum(pair not in self._steps and pair[1] not in self._dropped for pair in self._plan)
        scorers = sum(self._updated - heard <= _LONG_WINDOW for heard in self._scorers.values())
        seconds, untimed = time_left(self._steps, len(self._workers) or self._places or scorers)
        return seconds, to_come + untimed

    def _worker_entry(self, state: str) -> dict[str, Any]:
        workers = self._workers if state == RUNNING else {}
        entries = [{"worker": name, **about} for name, about in workers.items()]
        nodes = {entry["node"] for entry in entries}
        without = sum(entry["kind"] == "cpu" for entry in entries)
        places = {"places": self._places, "gpus": self._gpus, "nodes": len(nodes)}
        return {"now": len(entries), "without_gpu": without, **places, "list": entries}
