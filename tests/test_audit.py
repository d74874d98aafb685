"""The audit: a log that keeps every rule passes, and each rule that is broken is found, with its figures."""

from __future__ import annotations

import heapq
import json
import random
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from clifflab.cli.status import command
from clifflab.runtime.audit import Audit, audit
from clifflab.runtime.audit.view import render_audit

DRIVER = 100
Events = list[dict[str, Any]]


class Log:
    """Writes the log of a made-up run, second by second."""

    def __init__(self, **start: Any) -> None:
        self.events: Events = []
        self.where: dict[str, dict[str, Any]] = {}
        self.add(0, "run_start", **{"driver_pid": DRIVER, "runtime": "ray", "code": "c1", "steps": 2, **start})

    def add(self, time: float, event: str, **fields: Any) -> Log:
        self.events.append({"time": time, "event": event, **fields})
        return self

    def worker(self, time: float, name: str, ids: list[str], seconds: float = 1.0, **fields: Any) -> Log:
        about = {"node": fields.pop("node", "n1"), "pid": 200 + len(self.where), "gpu_ids": ids}
        self.where[name] = about
        kind = "model" if ids or fields.pop("core", False) else "cpu"
        return self.add(time, "worker_start", worker=name, kind=kind, seconds=seconds, **about, **fields)

    def load(self, began: float, worker: str, model: str, seconds: float = 1.0) -> Log:
        about = {"worker": worker, "model": model, "began": began, "seconds": seconds}
        return self.add(began + seconds, "model_load", **about, **self.where[worker])

    def unit(self, began: float, stop: float, worker: str, unit: str, model: str = "m", **fields: Any) -> Log:
        about = {"worker": worker, "step": "traces", "model": model, "unit": unit, "attempt": 1}
        timed = {"began": began, "seconds": stop - began, **self.where[worker]}
        return self.add(stop, "unit", **{**about, **timed, **fields})

    def ready(self, time: float, units: int, model: str = "m", **fields: Any) -> Log:
        self.add(time, "step_start", step="traces", model=model, units=units, missing=units)
        return self.add(time, "ready", step="traces", model=model, units=units, **{"key": model, **fields})

    def lost(self, time: float, worker: str, unit: str | None, attempt: int = 1, **fields: Any) -> Log:
        about = {"worker": worker, "step": "traces", "model": "m", "unit": unit, "attempt": attempt}
        return self.add(time, "worker_lost", **about, reason="the actor died", **fields)

    def audit(self, end: float | None = None) -> Audit:
        if end is not None:
            self.add(end, "run_done", state="done")
        self.events.sort(key=lambda event: event["time"])
        return audit(self.events)


def clean() -> Log:
    """Two GPUs, one model, four units, not a second idle while units wait."""
    log = Log().add(0, "workers", gpus=2, places=3).ready(1, 4)
    log.worker(2, "a", ["0"]).worker(2, "b", ["1"]).worker(2, "c", [])
    log.load(2, "a", "m").load(2, "b", "m")
    log.unit(3, 5, "a", "u0").unit(3, 6, "b", "u1").unit(5, 8, "a", "u2").unit(6, 9, "b", "u3")
    merge = {"step": "traces", "model": "m", "unit": "merge", "attempt": 1, "began": 9, "seconds": 1.0}
    log.add(10, "merge", worker="c", **merge, **log.where["c"])
    return log.add(10, "step_done", step="traces", model="m")


def test_a_clean_run_passes_and_its_time_is_told() -> None:
    found = clean().audit(12)
    assert found.problems(idle_bound=0) == []
    assert [(slot.gpu, slot.busy_s, slot.idle_s) for slot in found.slots] == [("0", 7.0, 0.0), ("1", 8.0, 0.0)]
    assert found.steps == [
        {"step": "traces", "units": 4, "busy_s": 12.0, "longest_s": 3.0, "mean_s": 2.75, "wait_s": 3.25}
    ]
    assert found.loads == [{"model": "m", "loads": 2, "seconds": 2.0}]
    assert [unit["unit"] for unit in found.slowest] == ["u1", "u2", "u3", "u0", "merge"]
    assert found.runs[0]["state"] == "done"


def test_work_in_the_driver() -> None:
    log = clean()
    for event in log.events:
        if event["event"] == "merge":
            event["pid"] = DRIVER
    assert log.audit(12).problems() == ["traces merge of m was done in the driver's process"]
    log.events[0]["driver_node"] = "n9"  # another machine's process of that number
    assert log.audit().problems() == []
    log.events[0]["driver_node"] = "n1"
    assert len(log.audit().in_driver) == 1
    log.events[0]["runtime"] = "inline"
    assert log.audit().problems() == []


@pytest.mark.parametrize("event", ["unit", "model_load"])
def test_a_worker_that_sees_other_gpus(event: str) -> None:
    log = clean()
    next(e for e in log.events if e["event"] == event)["gpu_ids"] = ["0", "1"]
    assert log.audit(12).problems() == ["worker a was given GPUs ['0'] and saw ['0', '1']"]


def test_gpus_that_a_process_shows_are_compared_too() -> None:
    assert Log().worker(2, "a", ["3"], visible=["3"]).audit(5).problems() == []
    assert len(Log().worker(2, "a", ["3"], visible=["0", "3"]).audit(5).wrong_gpus) == 1
    assert Log().worker(2, "a", ["0", "3"], gpus=2).worker(2, "b", ["1"], gpus=0.5).audit(5).problems() == []
    assert Log().worker(2, "a", ["3"], gpus=2).audit(5).problems() == ["worker a was given 2 GPUs and saw ['3']"]
    cpu = Log().worker(2, "a", ["3"])
    cpu.events[-1]["kind"] = "cpu"
    assert cpu.audit(5).wrong_gpus == [{"worker": "a", "given": [], "saw": ["3"]}]


def test_two_workers_on_one_gpu() -> None:
    log = clean().worker(7, "d", ["1"])
    assert log.audit(12).problems() == ["workers b and d shared GPU 1 of node n1"]
    assert clean().worker(7, "d", ["1"], node="n2").audit(12).problems() == []  # each node numbers its own
    assert clean().add(9.5, "worker_stop", worker="b", reason="moved").worker(11, "d", ["1"]).audit(12).problems() == []
    halves = Log().worker(1, "a", ["0"], gpus=0.5).worker(1, "b", ["0"], gpus=0.5)
    assert halves.audit().problems() == []
    assert len(halves.worker(2, "c", ["0"], gpus=0.5).audit().shared_gpus) == 1


def test_a_model_loaded_twice_by_one_worker() -> None:
    assert clean().load(9, "a", "m").audit(12).problems() == ["worker a loaded m 2 times"]
    assert clean().load(9, "a", "other").audit(12).problems() == []


def test_a_unit_done_twice() -> None:
    assert clean().unit(10, 11, "a", "u0").audit(12).problems() == [
        "traces u0 of m was done 2 times: the log does not say why"
    ]
    found = clean().lost(9.5, "a", "u0").unit(10, 11, "b", "u0", attempt=2).audit(12)
    assert found.problems() == []
    assert [(twice["unit"], twice["why"]) for twice in found.twice] == [("u0", "a worker was lost: the actor died")]


def idle(log: Log, end: float = 30) -> list[tuple[str, float, float]]:
    """Gaps as GPU, from, seconds."""
    found = [(gap.gpu, gap.began, gap.seconds) for gap in log.audit(end).gaps]
    return sorted(found)


def one_gpu(units: int = 2, **ready: Any) -> Log:
    return Log().ready(1, units, **ready).worker(2, "a", ["0"]).load(2, "a", "m")


def test_a_gap_is_found_with_its_circumstances() -> None:
    log = one_gpu().unit(3, 5, "a", "u0").unit(15, 16, "a", "u1")
    found = log.audit(30)
    assert found.longest_idle == 10
    assert found.problems(idle_bound=9.9) == ["GPU 0 of node n1 stood idle for 10.0 s while units waited"]
    assert found.problems(idle_bound=10.1) == found.problems() == []
    gap = found.gaps[0]
    assert (gap.began, gap.waiting) == (5, {"traces m": 1})
    assert (gap.before, gap.after) == ("traces u0 of m", "traces u1 of m")


def test_nothing_waits_no_gap() -> None:
    assert idle(one_gpu(1).unit(3, 5, "a", "u0")) == []
    later = one_gpu(1).unit(3, 5, "a", "u0").add(14, "ready", step="cliff", model="m", units=1, key="m")
    assert idle(later.unit(15, 16, "a", "v0", step="cliff")) == [("0", 14, 1)]
    no_model = one_gpu(1).unit(3, 5, "a", "u0").add(6, "ready", step="judge", model="m", units=9, key=None)
    assert idle(no_model) == []


def test_starting_and_loading_are_no_gaps() -> None:
    log = one_gpu().unit(3, 5, "a", "u0").add(5, "worker_stop", worker="a", reason="moved")
    log.worker(9, "b", ["0"], seconds=4.0).load(9, "b", "m", seconds=6).unit(15, 16, "b", "u1")
    assert idle(log) == []


def test_a_gpu_that_never_joins_its_node_is_idle_from_the_first_worker_on() -> None:
    log = one_gpu(3).unit(3, 5, "a", "u0").unit(5, 20, "a", "u1")
    assert idle(log.worker(18, "b", ["1"]).unit(18, 19, "b", "u2")) == [("1", 1, 16)]


def test_a_unit_waits_again_only_after_its_backoff() -> None:
    def retried(began: float, **loss: Any) -> Log:
        log = one_gpu(1).lost(10, "a", "u0", began=3.0, **loss).worker(11, "b", ["0"])
        return log.load(11, "b", "m").unit(began, began + 1, "b", "u0", attempt=2)

    assert idle(retried(12.0)) == []
    assert idle(retried(16.0)) == [("0", 12, 4)]
    assert idle(retried(16.0, backoff=6)) == []
    later = retried(16.0)
    later.events[0]["backoff_seconds"] = 4.5
    assert idle(later) == [("0", 14.5, 1.5)]


def test_a_unit_for_two_gpus_waits_for_two() -> None:
    def pair(stop: float, gpus: int) -> Log:
        log = Log().ready(1, 2).ready(1, 1, model="big", gpus=gpus).worker(2, "a", ["0"]).worker(2, "b", ["1"])
        log.unit(2, stop, "a", "u0").unit(2, 6, "b", "u1").add(12, "worker_stop", worker="b", reason="moved")
        log.add(12, "worker_stop", worker="a", reason="moved").worker(13, "c", ["0", "1"])
        return log.unit(13, 14, "c", "v0", model="big")

    assert idle(pair(12, 2)) == []
    assert idle(pair(12, 1)) == [("1", 6, 6)]
    assert idle(pair(8, 2)) == [("0", 8, 4), ("1", 8, 4)]


def test_a_model_held_by_as_many_workers_as_it_may_asks_for_no_more() -> None:
    def capped(**ready: Any) -> Log:
        log = Log().ready(1, 2, **ready).worker(2, "a", ["0"]).worker(2, "b", ["1"]).load(2, "a", "m")
        return log.unit(3, 8, "a", "u0").unit(9, 12, "a", "u1")

    assert idle(capped()) == [("0", 8, 1), ("1", 2, 7)]
    assert idle(capped(replicas=1)) == [("0", 8, 1)]  # the one worker that holds it still stood idle


def test_a_node_that_is_gone_is_no_gap_and_a_forgotten_slot_is() -> None:
    def two_nodes() -> Log:
        log = Log().ready(1, 9).worker(2, "a", ["0"]).worker(2, "b", ["0"], node="n2").worker(2, "c", ["1"], node="n2")
        log.unit(2, 20, "a", "u0").unit(2, 6, "b", "u1").unit(2, 6, "c", "u2").unit(20, 30, "a", "u3")
        return log

    gone = two_nodes().lost(10, "b", "u4", began=6.0).lost(11, "c", "u5", began=6.0)
    assert idle(gone) == []
    forgotten = two_nodes().lost(10, "b", "u4", began=6.0).unit(6, 30, "c", "u5")
    assert idle(forgotten) == [("0", 10, 20)]


def test_a_node_that_is_said_to_be_gone_is_gone_from_then_on() -> None:
    log = Log().ready(1, 9).worker(2, "a", ["0"]).worker(2, "b", ["0"], node="n2")
    log.unit(2, 30, "a", "u0").unit(2, 6, "b", "u1").add(8, "node_lost", node="n2")
    log.add(8, "worker_stop", worker="b", reason="lost").lost(8, "b", "u2")
    assert idle(log) == []
    assert idle(log.unit(9, 10, "b", "u3")) == []  # a late word changes nothing


def test_a_unit_that_fails_is_tried_again_after_a_pause() -> None:
    def retried(began: float) -> Log:
        log = one_gpu(1).add(10, "worker_stop", worker="a", reason="failed")
        about = {"step": "traces", "model": "m", "unit": "u0"}
        log.add(10, "retry", **about, attempt=2, pause=3.0, error="a bug").worker(11, "b", ["0"])
        return log.load(11, "b", "m").unit(began, began + 1, "b", "u0", attempt=2)

    assert idle(retried(13)) == []
    assert idle(retried(17)) == [("0", 13, 4)]
    poison = one_gpu(1).add(10, "worker_stop", worker="a", reason="failed")
    assert idle(poison.add(10, "unit_failed", step="traces", model="m", unit="u0", attempts=1, error="a bug")) == []


def test_places_that_a_group_took_are_not_idle() -> None:
    log = one_gpu(3).unit(3, 5, "a", "u0").worker(2, "b", ["1"]).unit(2, 4, "b", "u9")
    log.add(5, "worker_stop", worker="a", reason="idle")
    about = {"step": "tune", "model": "m", "unit": "tune", "began": 5.0, "seconds": 15.0, "worker": "group"}
    log.add(20, "unit", **about, attempt=1, node="n3", pid=9, gpu_ids=["0"])
    log.worker(21, "c", ["0"]).unit(21, 22, "c", "u1")
    assert idle(log) == [("1", 4, 17)]  # a worker sat there all the time, with nothing to do


def test_a_merge_that_is_ready_asks_for_no_gpu() -> None:
    log = one_gpu(1).unit(3, 5, "a", "u0").add(5, "ready", step="traces", model="m", units=1, merge=True)
    assert idle(log) == []


def test_what_a_killed_run_did_last_is_not_known() -> None:
    log = one_gpu(3).unit(3, 5, "a", "u0").add(9, "note")
    assert log.audit().gaps == []
    assert idle(log, 9.5) == [("0", 5, 4.5)]


def test_units_of_a_failed_model_wait_no_more() -> None:
    log = one_gpu(3).unit(3, 5, "a", "u0", error="not finite").add(7, "model_failed", model="m", error="not finite")
    assert idle(log) == [("0", 5, 2)]


def test_without_gpus_a_slot_is_a_core() -> None:
    log = Log().ready(1, 3).worker(2, "a", [], core=True).worker(2, "b", [], core=True)
    log.unit(2, 9, "a", "u0").unit(2, 4, "b", "u1").add(4, "worker_stop", worker="b", reason="moved")
    log.worker(7, "c", [], core=True).unit(7, 8, "c", "u2")
    assert idle(log) == [("core 1", 4, 2)]


def test_logs_without_keys_tell_by_where_units_ran() -> None:
    log = one_gpu().unit(3, 5, "a", "u0").unit(8, 9, "a", "u1").worker(2, "c", [])
    log.add(9, "ready", step="judge", model="m", units=4)
    for n in range(4):
        log.unit(15 + n, 16 + n, "c", f"j{n}", step="judge")
    for event in log.events:
        event.pop("key", None)
    assert idle(log) == [("0", 5, 3)]


def greedy(seed: int, nap: float = 0.0) -> Log:
    """A made-up scheduler on two nodes of two GPUs that gives every free slot work at once, while workers die.

    Args:
        seed: Of units, times and deaths.
        nap: Seconds for which one slot is passed over once, at a time when units wait all along.
    """
    rng, log = random.Random(seed), Log()
    waiting: dict[str, list[tuple[str, int]]] = {}
    held: dict[tuple[str, str], tuple[str, str]] = {}  # slot: worker, model
    agenda: list[Any] = [(rng.uniform(0, 20), "ready", f"m{n}") for n in range(4)]
    for number in range(4):
        heapq.heappush(agenda, (0.0, "free", ("n1" if number < 2 else "n2", str(number % 2))))
    heapq.heapify(agenda)
    idle: set[tuple[str, str]] = set()
    count, napped = 0, not nap
    while agenda:
        now, kind, what = heapq.heappop(agenda)
        if kind == "ready":
            waiting[what] = [(f"u{n}", 1) for n in range(rng.randint(5, 40))]
            log.ready(now, len(waiting[what]), model=what)
        elif kind == "again":
            waiting[what[0]].append(what[1])
        elif not napped and sum(map(len, waiting.values())) > 60 and what in held:
            napped = True
            heapq.heappush(agenda, (now + nap, "free", what))
            continue
        else:
            idle.add(what)
        for slot in sorted(idle):
            model = next((m for m in [held.get(slot, ("", ""))[1], *sorted(waiting)] if waiting.get(m)), None)
            if model is None:
                break
            idle.discard(slot)
            unit, attempt = waiting[model].pop(0)
            start = now
            if slot not in held or held[slot][1] != model:
                if slot in held:
                    log.add(now, "worker_stop", worker=held[slot][0], reason="moved")
                count += 1
                held[slot] = (f"w{count}", model)
                log.worker(now + 1.5, f"w{count}", [slot[1]], seconds=1.5, node=slot[0])
                log.load(now + 1.5, f"w{count}", model, seconds=0.5)
                start = now + 2.0
            stop, worker = start + rng.uniform(0.2, 3), held[slot][0]
            if rng.random() < 0.15 and attempt < 4:
                log.lost(stop, worker, unit, attempt, began=start)
                log.events[-1]["model"] = model
                del held[slot]
                heapq.heappush(agenda, (stop + 2 ** (attempt - 1), "again", (model, (unit, attempt + 1))))
            else:
                log.unit(start, stop, worker, unit, model, attempt=attempt)
            heapq.heappush(agenda, (stop, "free", slot))
    return log


@pytest.mark.parametrize("seed", range(8))
def test_a_scheduler_that_leaves_nothing_idle_is_not_accused(seed: int) -> None:
    found = greedy(seed).audit(200)
    assert found.problems(idle_bound=0.01) == []
    assert found.lost
    napping = greedy(seed, nap=5.0).audit(200)
    assert [gap.seconds for gap in napping.gaps] == [pytest.approx(5, abs=0.01)]


def test_runs_are_read_one_by_one() -> None:
    first, second = clean(), clean()
    second.events[0]["code"] = "c2"
    for event in second.events:
        event["time"] += 100
        if "began" in event:
            event["began"] += 100
    found = audit([*first.events, *second.add(112, "run_done", state="partial").events])
    assert [run["state"] for run in found.runs] == ["unfinished", "partial"]
    assert found.problems(idle_bound=0) == []
    assert len(found.again) == 4
    assert {unit["why"] for unit in found.again} == {"other code"}


def test_losses_and_failures_are_listed_once() -> None:
    log = clean().lost(9.5, "a", "u9").add(9.6, "worker_stop", worker="a", reason="lost")
    log.add(9.7, "worker_stop", worker="b", reason="hung")
    log.add(9.8, "unit_failed", step="traces", model="m", unit="u9", attempts=4, error="died\n4 times")
    found = log.audit(12)
    assert [(loss["worker"], loss["reason"]) for loss in found.lost] == [("a", "the actor died"), ("b", "hung")]
    assert [failure["error"] for failure in found.failures] == ["died 4 times"]


def test_events_that_are_not_known_change_nothing() -> None:
    log = clean()
    log.events += [{"event": "x"}, {"time": 3}, {"time": "soon", "event": "unit"}, {"time": 4.0, "event": "sung"}]
    assert audit([*log.events]).problems() == []


def test_the_command_prints_it(tmp_path: Path) -> None:
    def result(log: Log, *options: str) -> Any:
        log.audit(12)
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log.events))
        return CliRunner().invoke(command, [str(tmp_path), "--audit", *options])

    whole = result(clean())
    assert whole.exit_code == 0, whole.output
    assert "every rule that the log can show" in whole.output
    assert max(map(len, whole.output.splitlines())) <= 100
    broken = result(clean().load(9, "a", "[red]m[/nonsense]\x1b[2J").load(9, "a", "[red]m[/nonsense]\x1b[2J"))
    assert broken.exit_code == 1
    assert "loaded [red]m[/nonsense]\\x1b[2J 2 times" in " ".join(broken.output.split())
    told = json.loads(result(clean().load(9, "a", "m"), "--json").output)
    assert told["problems"] == ["worker a loaded m 2 times"]


def test_nodes_are_shown_by_the_first_characters_of_their_ids() -> None:
    one, other = "0123456789abcdef" * 3, "fedcba9876543210" * 3
    log = Log().ready(1, 2).worker(1, "a", ["0"], node=one).worker(1, "b", ["0"], node=one)
    log.worker(1, "c", ["0"], node=other).unit(2, 9, "a", "u0").unit(8, 9, "c", "u1")
    found = log.audit(10)
    out = StringIO()
    Console(file=out, width=100).print(render_audit(found))
    shown = out.getvalue() + " ".join(found.problems(idle_bound=1))
    assert "shared GPU 0 of node 01234567" in shown
    assert {word for word in shown.split() if word.startswith(("0123", "fedc"))} == {"01234567", "fedcba98"}
