"""Who gets the next task, and which model the next place: decided without Ray, over pretended machines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from clifflab.config import Study
from clifflab.runtime.queues import Queues, Task
from clifflab.runtime.seats import Node, Nodes, Seat
from clifflab.runtime.staffing import Opening, Staffing
from clifflab.runtime.work import Job
from clifflab.stages.base import Unit


class Machines(Nodes):
    """Machines that are there, with cores and GPUs each."""

    def __init__(self, *sizes: tuple[float, float]) -> None:
        super().__init__()
        self._nodes = {f"n{i}": Node(f"n{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)}


class Plan:
    """A schedule's face: queues, mean times, and which models may still come."""

    def __init__(self, counts: dict[str | None, int], seconds: float | None = None, expected: str = "") -> None:
        self.queues, self._seconds, self._expected = Queues(), seconds, expected
        for key, count in counts.items():
            jobs = [Job("traces", key, Unit("traces", key, str(number))) for number in range(count)]
            self.queues.add(Task(job, key, 0) for job in jobs)

    def mean_seconds(self, pair: Any) -> float | None:
        return self._seconds

    def expects(self, key: str) -> bool:
        return key in self._expected


def staff(machines: Nodes, seats: list[Seat], models: dict[str, Any], **runtime: Any) -> Staffing:
    study = Study.model_validate(
        {
            "name": "s",
            "models": [{"name": name, "path": "x/y", **settings} for name, settings in models.items()],
            "prompts": [{"name": "p", "path": "organism:benign", "label": "benign", "limit": 4}],
            "runtime": runtime,
        }
    )
    needs = {spec.name: 1.0 if spec.gpus == "auto" else float(spec.gpus) for spec in study.models}
    return Staffing(study, machines, seats, needs)


def seat(node: str, key: str | None, gpus: float = 1.0, *, busy: bool = False, since: float = 0.0) -> Seat:
    made = Seat(node, "model", gpus, 1.0, key, None, None, None, started=True, since=since)
    made.seen = {key} if key else set()
    made.task = SimpleNamespace() if busy else None  # type: ignore[assignment]
    return made


def fill(staffing: Staffing, seats: list[Seat], plan: Any) -> list[Opening]:
    """Open places until no more are wanted."""
    opened = []
    while True:
        held = [(s.node, s.gpus, s.cpus) for s in seats]
        found, _ = staffing.opening(plan, held, 0.0)
        if found is None:
            return opened
        opened.append(found)
        seats.append(Seat(found.node, found.kind, found.gpus, 1.0, found.key, None, None, None))


def test_models_without_a_worker_come_first() -> None:
    seats: list[Seat] = []
    found = fill(
        staff(Machines((8, 2), (8, 2)), seats, {"a": {}, "b": {}, "c": {}}), seats, Plan({"a": 9, "b": 2, "c": 1})
    )
    assert sorted(str(opening.key) for opening in found) == ["a", "a", "b", "c"]
    assert sorted(opening.node for opening in found) == ["n0", "n0", "n1", "n1"]


def test_replicas_and_workers_are_limits() -> None:
    seats: list[Seat] = []
    found = fill(staff(Machines((8, 4)), seats, {"a": {"replicas": 2}}), seats, Plan({"a": 9}))
    assert len(found) == 2
    seats = []
    assert len(fill(staff(Machines((8, 4)), seats, {"a": {}}, workers=3), seats, Plan({"a": 9}))) == 3
    seats = []
    assert len(fill(staff(Machines((8, 4)), seats, {"a": {}}), seats, Plan({"a": 2}))) == 2, "no more than units"


def test_models_share_a_gpu_by_fractions() -> None:
    seats: list[Seat] = []
    found = fill(
        staff(Machines((8, 1)), seats, {"a": {"gpus": 0.5}, "b": {"gpus": 0.5}}), seats, Plan({"a": 5, "b": 5})
    )
    assert [opening.gpus for opening in found] == [0.5, 0.5]
    assert {opening.key for opening in found} == {"a", "b"}


def test_a_large_model_gets_a_whole_machine() -> None:
    seats: list[Seat] = []
    models = {"big": {"gpus": 2}, "small": {}}
    found = fill(staff(Machines((8, 2), (8, 2)), seats, models), seats, Plan({"big": 1, "small": 9}))
    assert ("big", 2.0) in {(opening.key, opening.gpus) for opening in found}
    assert sum(opening.gpus for opening in found) == 4


def held(seats: list[Seat]) -> list[tuple[str, float, float]]:
    return [(s.node, s.gpus, s.cpus) for s in seats]


def test_a_machine_is_kept_for_a_large_model() -> None:
    """Its workers finish what waits for their model, take nothing else, and make way."""
    seats = [seat(node, "small", busy=True) for node in ("n0", "n0", "n1")]
    staffing = staff(Machines((8, 2), (8, 2)), seats, {"big": {"gpus": 2}, "small": {}, "more": {}})
    plan: Any = Plan({"big": 1, "small": 50, "more": 9}, expected="small")
    seats.append(seat("n1", "more", busy=True))
    assert staffing.opening(plan, held(seats), 0.0) == (None, "big")
    assert staffing.in_the_way("big", plan, held(seats), 0.0) == []
    assert staffing.kept_for is not None
    kept = staffing.kept_for[0]
    mine = next(s for s in seats if s.node == kept and s.key == "small")
    mine.task = None
    assert staffing.own(mine, plan.queues, 0.0).job.model == "small"  # type: ignore[union-attr]
    empty: Any = Plan({"big": 1, "more": 9})
    assert staffing.others(mine, empty, 100.0) is None, "the machine is kept"
    for s in [s for s in seats if s.node == kept]:
        s.task = None
    closed = staffing.in_the_way("big", empty, held(seats), 0.0)
    assert {s.node for s in closed} == {kept}
    seats[:] = [s for s in seats if s not in closed]
    assert staffing.opening(empty, held(seats), 0.0)[0] == Opening("big", kept, 2.0)
    assert staffing.kept_for is None


def test_two_large_models_on_one_machine_take_turns() -> None:
    """Neither drives the other out: the second comes when the first has nothing to do."""
    first = seat("n0", "one", 2.0, busy=True)
    staffing = staff(Machines((8, 2)), [first], {"one": {"gpus": 2}, "two": {"gpus": 2}}, patience_seconds=5)
    plan: Any = Plan({"one": 9, "two": 9}, expected="one two")
    for now in (0.0, 1000.0):
        assert staffing.opening(plan, held([first]), now) == (None, "two")
        assert staffing.in_the_way("two", plan, held([first]), now) == []
        assert staffing.kept_for is None
        assert not first.leaving
    first.task = None
    assert staffing.others(first, Plan({"two": 9}, expected="two"), 0.0) == "two"  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [0.5, 2.0])
def test_an_idle_worker_makes_way_for_a_model_of_another_size(gpus: float) -> None:
    """A guard needs one GPU, and the studied model's next step waits for it."""
    mine = seat("n0", "a", gpus)
    staffing = staff(Machines((8, max(1.0, gpus))), [mine], {"a": {"gpus": gpus}}, patience_seconds=5)
    plan: Any = Plan({"(guard)": 3}, expected="a")
    assert staffing.in_the_way("(guard)", plan, held([mine]), 4.0) == []
    assert staffing.in_the_way("(guard)", plan, held([mine]), 6.0) == [mine]


def test_shares_are_counted_by_gpu() -> None:
    """Two workers of 0.6 leave 0.4 of each of two GPUs, and no room for a third."""
    seats: list[Seat] = []
    staffing = staff(Machines((8, 2)), seats, {"a": {"gpus": 0.6}})
    assert len(fill(staffing, seats, Plan({"a": 9}))) == 2


def test_a_task_is_tried_elsewhere_first() -> None:
    mine = seat("n0", "a")
    mine.spot = "n0:0"
    staffing = staff(Machines((4, 2)), [mine], {"a": {}}, patience_seconds=5)
    plan: Any = Plan({"a": 2})
    first, second = plan.queues
    first.avoid = {"n0:0"}
    assert staffing.own(mine, plan.queues, 0.0) is second
    plan.queues.take(second)
    assert staffing.own(mine, plan.queues, 0.0) is None
    assert staffing.own(mine, plan.queues, 6.0) is first, "where nobody else takes it, here"


def test_idle_workers_beside_gpus_do_loose_work_where_no_one_else_can() -> None:
    mine = seat("n0", "a", 0.5)
    staffing = staff(Machines((1, 1)), [mine], {"a": {"gpus": 0.5}}, patience_seconds=5)
    plan: Any = Plan({None: 1}, expected="a")
    assert staffing.own(mine, plan.queues, 2.0) is not None


def test_work_behind_a_long_unit_gets_another_worker() -> None:
    busy = seat("n0", "a", busy=True)
    staffing = staff(Machines((4, 2)), [busy], {"a": {}}, patience_seconds=5)
    staffing.load_seconds = {"a": 30.0}
    plan: Any = Plan({"a": 1}, 1.0)
    assert staffing.opening(plan, held([busy]), 10.0)[0] is None
    assert staffing.opening(plan, held([busy]), 40.0)[0] is not None


def test_work_without_a_model_has_places_of_its_own_beside_gpus() -> None:
    seats: list[Seat] = []
    found = fill(staff(Machines((6, 2)), seats, {"a": {}}), seats, Plan({None: 9, "a": 1}))
    assert [opening.kind for opening in found].count("cpu") == 4, "the cores that GPUs leave"
    assert all(opening.gpus == 0 for opening in found if opening.kind == "cpu")
    seats = []
    found = fill(staff(Machines((2, 0)), seats, {"a": {}}), seats, Plan({None: 9}))
    assert [(opening.kind, opening.gpus) for opening in found] == [("model", 0.0)] * 2


def test_an_idle_worker_waits_for_its_own_model_at_most_as_long_as_a_change_costs() -> None:
    mine = seat("n0", "a")
    seats = [mine]
    staffing = staff(Machines((4, 1)), seats, {"a": {}, "b": {}}, patience_seconds=5)
    staffing.load_seconds = {"a": 3.0, "b": 3.0}
    plan: Any = Plan({"b": 4}, expected="a")
    assert staffing.others(mine, plan, 2.0) is None
    assert staffing.others(mine, plan, 3.5) == "b"
    staffing.load_seconds["b"] = 60.0
    assert staffing.others(mine, plan, 4.5) is None
    assert staffing.others(mine, plan, 5.5) == "b", "and never longer than runtime.patience_seconds"
    assert staffing.others(mine, Plan({"b": 4}), 0.0) == "b", "its own model is done"  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "joins"), [(0.1, False), (10.0, True)])
def test_a_worker_joins_a_queue_only_if_it_will_not_be_over_first(seconds: float, joins: bool) -> None:
    mine = seat("n0", "a")
    staffing = staff(Machines((4, 2)), [mine, seat("n0", "b", busy=True, since=99.0)], {"a": {}, "b": {}})
    staffing.load_seconds = {"b": 5.0}
    plan: Any = Plan({"b": 4}, seconds)
    assert (staffing.others(mine, plan, 100.0) == "b") is joins


def test_the_longest_queue_is_the_one_with_most_work_a_worker() -> None:
    mine = seat("n0", None)
    seats = [mine, seat("n0", "short", busy=True), *(seat("n0", "long", busy=True) for _ in range(3))]
    staffing = staff(Machines((9, 5)), seats, {"long": {}, "short": {}})
    assert staffing.others(mine, Plan({"long": 12, "short": 8}), 0.0) == "short"  # type: ignore[arg-type]
    assert staffing.others(mine, Plan({"long": 40, "short": 8}), 0.0) == "long"  # type: ignore[arg-type]


def test_queues_are_quick_for_many_units() -> None:
    """A hundred thousand units are taken in time that grows with their number, not with its square."""
    plan = Plan({"a": 50_000, "b": 50_000})
    taken = 0
    while (task := plan.queues.first("a") or plan.queues.first("b")) is not None:
        plan.queues.take(task)
        taken += 1
    assert taken == 100_000
    assert not plan.queues
