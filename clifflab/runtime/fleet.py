"""A study's work over Ray actors: who does what, what is done again when a worker dies or hangs.

The driver owns the queue. An actor holds one model at a time and keeps it; it never loads the same model twice (a new
actor does). What a dead one was at is done again by another; results are files under names that follow from the job, so
doing one twice is harmless.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from clifflab.artifacts import code_version
from clifflab.config import Study
from clifflab.errors import ClifflabError, ClusterError, InputError, WorkerError, shorten
from clifflab.models.fit import gpus_needed
from clifflab.runtime.actor import WATCH, Place, StudyActor
from clifflab.runtime.events import EventLog
from clifflab.runtime.gangs import Gangs
from clifflab.runtime.local import start_ray
from clifflab.runtime.nodes import gpu_memory_mb as gpu_memory
from clifflab.runtime.progress import Reporter
from clifflab.runtime.schedule import Schedule, Task
from clifflab.runtime.seats import NODE_LABEL, Nodes, Seat
from clifflab.stages import Identities

_TICK = 0.25
_START_SECONDS = 180.0  # for a worker to come up where there is a free place
_STACK_SECONDS = 2.0
_CPU_SEATS = 4


class Fleet:
    """The workers of a study; they outlive its steps.

    Args:
        study: The study, resolved.
        place: Where its files are.
        root: Its folder on the driver's machine.
        identities: Its fingerprints.
        log: Told of every worker that comes and goes.
        reporter: Told what a user should know.
        gpu_memory_mb: Memory of the smallest GPU, if it is known.
    """

    def __init__(
        self,
        study: Study,
        place: Place,
        root: Path,
        identities: Identities,
        log: EventLog,
        reporter: Reporter,
        gpu_memory_mb: int | None = None,
    ) -> None:
        self._started = start_ray(study.runtime)
        import ray

        self._ray, self._place, self._root, self._log, self._reporter = ray, place, root, log, reporter
        errors = ray.exceptions
        self._dead = (errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError, errors.WorkerCrashedError)
        self._nodes = Nodes()
        self._nodes.look(time.monotonic())
        self._gpu_memory_mb = gpu_memory_mb or (gpu_memory() if self._nodes.gpus else None)
        self._seats: list[Seat] = []
        self._load_seconds: dict[str, float] = {}
        self._start_seconds = 0.0
        self._failed_starts = 0
        self._stuck_since: float | None = None
        self._kept_for: tuple[str, str] | None = (
            None  # a machine that is emptied, and the large model that waits for it
        )
        self._told_of_stuck = False
        self.adopt(study, identities)

    def adopt(self, study: Study, identities: Identities) -> None:
        """Work for this study from now on."""
        for seat in list(self._seats):
            self._retire(seat, "done")
        self._study, self._settings = study, study.runtime
        self._specs = {spec.name: spec for spec in study.models}
        self._identities = self._ray.put(identities)
        self._gangs = Gangs(study, self._root, identities)
        self._with_gpus = self._nodes.gpus > 0
        self._needs: dict[str, float] = {}

    @property
    def places(self) -> int:
        """How many workers there are places for."""
        places = int(self._nodes.gpus) or max(1, int(self._nodes.cpus))
        return places if self._settings.workers == "auto" else min(self._settings.workers, places)

    @property
    def gpus(self) -> float:
        """GPUs of the cluster."""
        return self._nodes.gpus

    def run(self, schedule: Schedule) -> None:
        """Carry a schedule out.

        Raises:
            ClifflabError: What ends the study, and not a model alone.
        """
        self._schedule = schedule
        if self._with_gpus:
            self._settle_needs()
        schedule.open()
        while True:
            now = time.monotonic()
            self._drop_lost_nodes(now)
            self._together(now)
            self._assign(now)
            self._grow(now)
            busy = any(seat.task for seat in self._seats) or self._gangs.running
            if schedule.over and not busy:
                return
            self._check_stuck(now, busy=bool(busy))
            if self._wait(now):
                schedule.open()

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for seat in list(self._seats):
            self._retire(seat, "done")
        if self._started:
            self._ray.shutdown()

    # -- who does what ---------------------------------------------------------------------------------------------

    def _assign(self, now: float) -> None:
        """Give every idle worker the task that suits it best."""
        for seat in sorted((seat for seat in self._seats if seat.idle), key=lambda seat: seat.since):
            if seat.leaving:
                self._retire(seat, "idle")
                continue
            tasks = self._schedule.waiting(now)
            task = self._own(seat, tasks) or self._others(seat, tasks, now)
            if task:
                self._begin(seat, task, now)

    def _own(self, seat: Seat, tasks: list[Task]) -> Task | None:
        """Work without a model, which others mostly wait for; then work with the model that is loaded."""
        keys: list[str | None] = [None] if seat.kind == "cpu" or not self._cpu_seats() else []
        keys += [seat.key] if seat.kind == "model" and seat.key else []
        return next((task for key in keys for task in tasks if task.key == key), None)

    def _others(self, seat: Seat, tasks: list[Task], now: float) -> Task | None:
        """Work from the longest queue of another model, where that is better than to wait."""
        if seat.kind == "cpu":
            return None
        found = [task for task in tasks if task.key not in (None, seat.key) and self._fits(seat, task.key)]
        key = self._longest(found, seat)
        if key is None:
            return None
        if seat.key is not None and self._schedule.expects(seat.key):
            # It waits for its own model's next step at most as long as the change would cost.
            cost = self._cost(key, seat) or self._load_seconds.get(seat.key, 0.0)
            if now - seat.since < min(self._settings.patience_seconds, cost):
                return None
        if key in seat.seen:
            node = seat.node
            self._retire(seat, "moved")
            self._open(key, node, self._need(key), "model")
            return None
        return next(task for task in found if task.key == key)

    def _fits(self, seat: Seat, key: str | None) -> bool:
        assert key is not None
        return abs(self._need(key) - seat.gpus) < 1e-6 and self._workers(key) < self._most(key)

    def _cost(self, key: str, seat: Seat | None = None) -> float:
        """Seconds until a model could be in memory at a place, or at a new one: of a worker's start, and the load."""
        fresh = seat is None or key in seat.seen
        return self._load_seconds.get(key, 0.0) + (self._start_seconds if fresh else 0.0)

    def _longest(self, tasks: list[Task], seat: Seat | None = None) -> str | None:
        """The model with most waiting tasks a worker, of those where one more worker helps."""
        queues: dict[str, list[Task]] = {}
        for task in tasks:
            if task.key is not None:
                queues.setdefault(task.key, []).append(task)
        best = {
            key: len(queue) / (self._workers(key) + 1)
            for key, queue in queues.items()
            if self._helps(key, queue, self._cost(key, seat))
        }
        return max(best, key=lambda key: best[key]) if best else None

    def _helps(self, key: str, queue: list[Task], cost: float) -> bool:
        """Whether another worker would be there before those that are at it are done."""
        workers = self._workers(key)
        if not workers:
            return True
        each = [self._schedule.mean_seconds(task.pair) for task in queue]
        if any(seconds is None for seconds in each):
            return len(queue) > self._coming(key)
        return sum(seconds for seconds in each if seconds) / workers > cost

    def _begin(self, seat: Seat, task: Task, now: float) -> None:
        self._schedule.take(task)
        if task.key is not None:
            seat.key = task.key
            seat.seen.add(task.key)
        seat.task, seat.since, seat.moved, seat.beats, seat.pulse, seat.asked = task, now, now, -1, None, now
        seat.ref = seat.actor.do.remote(task.job)

    # -- places ----------------------------------------------------------------------------------------------------

    def _grow(self, now: float) -> None:
        """Open places for what waits, the models without a worker first."""
        if self._gangs.waiting:
            return
        tasks = self._schedule.waiting(now)
        if self._kept_for and not any(task.key == self._kept_for[1] for task in tasks):
            self._kept_for = None
        loose = [task for task in tasks if task.key is None]
        if loose and self._cpu_seats():
            mine = [seat for seat in self._seats if seat.kind == "cpu"]
            if len(mine) < self._cpu_seats() and len(loose) > sum(not seat.task for seat in mine):
                self._open_somewhere(None, "cpu", now)
        elif loose and len(loose) > sum(not seat.task and not seat.leaving for seat in self._seats):
            self._open_somewhere(None, "model", now)
        while (key := self._longest([t for t in tasks if self._wants(t.key, tasks)])) is not None:
            if not self._open_somewhere(key, "model", now):
                self._make_room(key, now)
                return

    def _wants(self, key: str | None, tasks: list[Task]) -> bool:
        """Whether more tasks wait for a model than workers are idle with it, or on their way."""
        if key is None or self._workers(key) >= self._most(key):
            return False
        return sum(task.key == key for task in tasks) > self._coming(key)

    def _open_somewhere(self, key: str | None, kind: str, now: float) -> bool:
        limit = self._settings.workers
        if kind == "model" and limit != "auto" and sum(s.kind == "model" for s in self._seats) >= limit:
            return False
        need = 0.0 if kind == "cpu" else self._need(key)
        kept = set() if self._kept_for is None or key == self._kept_for[1] else {self._kept_for[0]}
        node = self._nodes.spot(need, self._cpus(need), self._held(), now, kept if need else set())
        if node is None:
            return False
        if self._kept_for and key == self._kept_for[1]:
            self._kept_for = None
        self._open(key, node, need, kind)
        return True

    def _open(self, key: str | None, node: str, gpus: float, kind: Any) -> None:
        """Ask for a place on a machine, and for a worker in it."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cpus = self._cpus(gpus)
        bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        group = placement_group([bundle], bundle_label_selector=[{NODE_LABEL: node}])
        pinned: Any = self._ray.remote  # Ray's stubs know no concurrency groups
        actor_class = pinned(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_concurrency=1,
            concurrency_groups={WATCH: 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )(StudyActor)
        actor: Any = actor_class.remote(self._study, self._place, self._identities, blind=kind == "cpu")
        self._seats.append(Seat(node, kind, gpus, cpus, key, group, actor, actor.hello.remote()))

    def _make_room(self, key: str, now: float) -> None:
        """Close idle places that are in the way of a model that has none; for a large one, of a whole machine."""
        need = self._need(key)
        idle = [
            seat
            for seat in self._seats
            if seat.idle and seat.kind == "model" and (seat.key is None or not self._schedule.expects(seat.key))
        ]
        for seat in idle:
            if abs(seat.gpus - need) > 1e-6:
                self._retire(seat, "moved")
        if need <= 1 or self._workers(key) or self._kept_for:
            return
        fitting = [node for node in self._nodes.alive if node.gpus >= need]
        if fitting:
            busy = {n.id: sum(s.task is not None for s in self._seats if s.node == n.id) for n in fitting}
            chosen = min(fitting, key=lambda node: busy[node.id])
            self._kept_for = (chosen.id, key)  # no one else takes what becomes free there
            for seat in self._seats:
                seat.leaving |= seat.node == chosen.id and seat.kind == "model"

    def _together(self, now: float) -> None:
        """Start what groups of workers do, once there are places for all of them; others make way."""
        self._gangs.waiting = False
        for task in self._schedule.waiting(now, together=True):
            workers = self._gangs.workers(max((node.gpus for node in self._nodes.alive), default=0))
            nodes, held = list[str](), self._held()
            gpus = 1.0 if self._with_gpus else 0.0
            while len(nodes) < workers and (node := self._nodes.spot(gpus, 1.0, held, now)) is not None:
                nodes.append(node)
                held.append((node, gpus, 1.0))
            enough = (self._nodes.gpus if self._with_gpus else self._nodes.cpus) >= workers
            if len(nodes) == workers or not enough:  # too few of them is an error of the user's that it reports
                self._schedule.take(task)
                self._gangs.start(task, nodes, gpus)
                continue
            self._gangs.waiting = True
            leaving = sum(seat.leaving for seat in self._seats)
            mine = [seat for seat in self._seats if seat.kind == "model" and not seat.leaving]
            for seat in sorted(mine, key=lambda seat: seat.task is not None)[: max(0, workers - len(nodes) - leaving)]:
                seat.leaving = True
            for seat in [seat for seat in self._seats if seat.leaving and seat.idle]:
                self._retire(seat, "idle")
            return

    def _held(self) -> list[tuple[str, float, float]]:
        return [*((seat.node, seat.gpus, seat.cpus) for seat in self._seats), *self._gangs.held]

    def _cpus(self, gpus: float) -> float:
        """Cores of a place: one, or less where a machine has more GPUs than cores."""
        if not gpus:
            return 1.0
        share = min((node.cpus / node.gpus for node in self._nodes.alive if node.gpus), default=1.0)
        return 1.0 if share >= 1 else max(0.01, round(share, 2))

    def _cpu_seats(self) -> int:
        """Places without a GPU beside those with one."""
        if not self._with_gpus:
            return 0
        return min(_CPU_SEATS, int(self._nodes.cpus - self._nodes.gpus))

    def _need(self, key: str | None) -> float:
        """GPUs that a model needs; the guard one, as do workers that hold nothing."""
        if not self._with_gpus:
            return 0.0
        if key is None or key not in self._specs:
            return 1.0
        return self._needs[key]

    def _settle_needs(self) -> None:
        """How many GPUs each model needs; those that fit no machine are left out."""
        largest = int(max((node.gpus for node in self._nodes.alive), default=0))
        for name, spec in self._specs.items():
            try:
                self._needs[name] = gpus_needed(spec, self._gpu_memory_mb, largest)
            except ClifflabError as error:
                self._needs[name] = 1.0
                self._schedule.give_up(name, error)

    def _most(self, key: str) -> float:
        replicas = self._specs[key].replicas if key in self._specs else "auto"
        return float("inf") if replicas == "auto" else replicas

    def _workers(self, key: str) -> int:
        return sum(seat.kind == "model" and seat.key == key for seat in self._seats)

    def _coming(self, key: str) -> int:
        """Workers of a model that can take a task now or soon."""
        return sum(seat.kind == "model" and seat.key == key and seat.task is None for seat in self._seats)

    # -- what comes back -------------------------------------------------------------------------------------------

    def _wait(self, now: float) -> bool:
        """Wait for an answer, or a moment; whether something was finished."""
        refs = {seat.ref: seat for seat in self._seats if seat.ref is not None}
        if refs:
            done, _ = self._ray.wait(list(refs), num_returns=1, timeout=_TICK)
            if done:
                done, _ = self._ray.wait(list(refs), num_returns=len(refs), timeout=0)
        else:
            time.sleep(_TICK / 5)
            done = []
        for ref in done:
            self._answer(refs[ref])
        self._watch()
        finished = self._gangs.finished()
        for task, result, losses in finished:
            for loss in losses:
                self._log.write("worker_lost", step=task.job.step, model=task.job.model, unit=task.job.name, **loss)
            self._schedule.done(task, result)
        return bool(done or finished)

    def _answer(self, seat: Seat) -> None:
        ref, seat.ref = seat.ref, None
        task, now = seat.task, time.monotonic()
        try:
            found = self._ray.get(ref)
        except self._dead as error:
            self._lose(seat, (str(error).strip() or type(error).__name__).splitlines()[-1])
            return
        except self._ray.exceptions.RayTaskError as error:
            if task is None:
                raise
            self._retire(seat, "failed")  # whatever it left in that process
            self._schedule.again(task, error.as_instanceof_cause())  # type: ignore[no-untyped-call]
            return
        if task is None:
            self._welcome(seat, found, now - seat.since)
            seat.since = now
            return
        seat.since, seat.task = now, None
        found.where = {"worker": seat.id, **found.where}
        found.attempt = task.attempt
        for load in found.loads:
            self._load_seconds[load["model"]] = load["seconds"]
        self._schedule.done(task, found)

    def _welcome(self, seat: Seat, where: dict[str, Any], seconds: float) -> None:
        """A worker is up."""
        seat.started, self._failed_starts = True, 0
        if (code := where.pop("code")) != code_version():
            problem = f"machine {where['node'][:8]} runs it, and the driver {code_version()}"
            raise ClusterError("code", code, problem, "install the same clifflab on every machine")
        self._start_seconds = seconds
        self._log.write(
            "worker_start", worker=seat.id, kind=seat.kind, gpus=seat.gpus, **where, seconds=round(seconds, 3)
        )

    def _lose(self, seat: Seat, reason: str, **about: Any) -> None:
        """A worker is gone, whatever the reason: its place is closed, and its task done again."""
        task, started = seat.task, seat.started
        seat.task = None
        self._retire(seat, "hung" if reason.startswith("hung") else "lost")
        if task:
            began = round(time.time() - (time.monotonic() - seat.since), 3)
            self._schedule.lost(task, reason, worker=seat.id, began=began, **about)
        if started:
            return
        self._failed_starts += 1
        self._log.write("worker_lost", worker=seat.id, step=None, model=None, unit=None, attempt=0, reason=reason)
        if self._failed_starts > self._settings.max_attempts:
            raise WorkerError(f"workers cannot be started ({shorten(reason, 200)}); look at Ray's logs, and run again")

    def _retire(self, seat: Seat, reason: str) -> None:
        """Close a place: its worker ends."""
        from ray.util.placement_group import remove_placement_group

        if seat not in self._seats:
            return
        self._seats.remove(seat)
        self._ray.kill(seat.actor)
        remove_placement_group(seat.group)
        if seat.started:
            self._log.write("worker_stop", worker=seat.id, reason=reason)

    def _watch(self) -> None:
        """End workers that make no progress, and those that never came up."""
        now, limit = time.monotonic(), self._settings.hang_seconds
        every = max(0.2, min(30.0, limit / 4))
        for seat in list(self._seats):
            if not seat.started and now - seat.since > _START_SECONDS:
                self._nodes.block(seat.node, now)
                self._retire(seat, "lost")
            if seat.task is None:
                continue
            if seat.pulse is not None:
                done, _ = self._ray.wait([seat.pulse], timeout=0)
                if done:
                    self._hear(seat, now)
            if seat.task and seat.pulse is None and now - seat.asked > every:
                seat.pulse, seat.asked = seat.actor.progress.options(concurrency_group=WATCH).remote(), now
            if now - seat.moved > limit:
                stack = self._stack(seat)
                self._lose(seat, f"hung: no progress for {now - seat.moved:.0f} s", stack=stack)

    def _hear(self, seat: Seat, now: float) -> None:
        try:
            beats = self._ray.get(seat.pulse)
        except self._ray.exceptions.RayError:
            return  # it is dead: the answer to its task says so
        seat.pulse = None
        if beats != seat.beats:
            seat.beats, seat.moved = beats, now

    def _stack(self, seat: Seat) -> str | None:
        """Where a hung worker stands, if it still answers."""
        try:
            asked = seat.actor.stack.options(concurrency_group=WATCH).remote()
            return str(self._ray.get(asked, timeout=_STACK_SECONDS))
        except self._ray.exceptions.RayError:
            return None

    def _drop_lost_nodes(self, now: float) -> None:
        for node in self._nodes.look(now):
            self._log.write("node_lost", node=node)
            self._reporter.note(f"machine {node[:8]} is gone: its work is done again elsewhere")
            for seat in [seat for seat in self._seats if seat.node == node]:
                self._lose(seat, "its machine is gone")
                self._failed_starts = 0

    def _check_stuck(self, now: float, *, busy: bool) -> None:
        """Say so when there is work and no place for it; give up when that lasts."""
        if busy or any(not seat.started for seat in self._seats) or self._schedule.next_pause(now) is not None:
            self._stuck_since = None
            return
        if self._stuck_since is None:
            self._stuck_since = now
        waited = now - self._stuck_since
        if waited > 10 and not self._told_of_stuck:
            self._told_of_stuck = True
            self._reporter.note("work waits, and Ray has no free place for it: waiting for one")
        if waited > self._settings.hang_seconds:
            keys = sorted({str(task.key) for task in self._schedule.waiting(now)})
            problem = f"no machine had a free place for {waited:.0f} s"
            remedy = "free some, or lower gpus; run again: it continues"
            raise InputError("models.gpus", ", ".join(keys), problem, remedy)
