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
from clifflab.runtime.local import start_ray, stop_ray
from clifflab.runtime.nodes import gpu_memory_mb as gpu_memory
from clifflab.runtime.progress import Reporter
from clifflab.runtime.queues import Task
from clifflab.runtime.schedule import Schedule
from clifflab.runtime.seats import NODE_LABEL, Nodes, Seat
from clifflab.runtime.staffing import Held, Opening, Staffing
from clifflab.stages import Identities

_TICK = 0.25
_START_SECONDS = 180.0  # for a worker to come up where there is a free place
_STACK_SECONDS = 2.0
_PARK, _LONGEST_PARK = 10.0, 3600.0  # seconds for which a GPU is left alone after a failure; doubled each time in a row


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
        self._bugs = errors.RayTaskError
        self._nodes = Nodes()
        self._nodes.look(time.monotonic())
        self._gpu_memory_mb = gpu_memory_mb or (gpu_memory() if self._nodes.gpus else None)
        self._seats: list[Seat] = []
        self._strikes: dict[str, int] = {}  # failures in a row, by place
        self._load_losses: dict[str, list[str]] = {}  # places where workers died while they loaded a model
        self._parked: list[tuple[float, Seat]] = []
        self._stuck_since: float | None = None
        self._told_of_stuck = False
        self.adopt(study, identities)

    def adopt(self, study: Study, identities: Identities) -> None:
        """Work for this study from now on."""
        for seat in list(self._seats):
            self._retire(seat, "done")
        self._study, self._settings = study, study.runtime
        self._identities = self._ray.put(identities)
        self._gangs = Gangs(study, self._root, identities)
        self._needs: dict[str, float] = {}
        self._models = {spec.name for spec in study.models}
        self._staff = Staffing(study, self._nodes, self._seats, self._needs)

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
        if self._nodes.gpus:
            self._settle_needs()
        schedule.open()
        while True:
            now = time.monotonic()
            self._drop_lost_nodes(now)
            self._unpark(now)
            self._together(now)
            self._assign(now)
            self._grow(now)
            busy = any(seat.task for seat in self._seats) or self._gangs.running
            if schedule.over and not busy:
                return
            self._check_stuck(now, busy=bool(busy))
            if self._wait():
                schedule.open()

    def close(self) -> None:
        """End the workers, and Ray if it was started here, whatever goes wrong."""
        from ray.util.placement_group import remove_placement_group

        try:
            for seat in list(self._seats):
                self._retire(seat, "done")
            for _, seat in self._parked:
                remove_placement_group(seat.group)
        finally:
            if self._started:
                stop_ray()

    # -- who does what ---------------------------------------------------------------------------------------------

    def _assign(self, now: float) -> None:
        """Give every idle worker the task that suits it best."""
        queues = self._schedule.queues
        queues.settle(now)
        for seat in sorted((seat for seat in self._seats if seat.idle), key=lambda seat: seat.since):
            if seat.leaving:
                self._retire(seat, "idle")
                continue
            task = self._staff.own(seat, queues, now)
            if task is None and (key := self._staff.others(seat, self._schedule, now)) is not None:
                if key in seat.seen:  # no worker loads a model twice
                    self._retire(seat, "moved")
                    self._open(Opening(key, seat.node, seat.gpus))
                    continue
                task = queues.first(key, seat.spot) or queues.first(key)
            if task is not None:
                self._begin(seat, task, now)

    def _begin(self, seat: Seat, task: Task, now: float) -> None:
        self._schedule.take(task)
        if task.key is not None:
            seat.key = task.key
            seat.seen.add(task.key)
        seat.task, seat.since, seat.moved, seat.beats, seat.pulse, seat.asked = task, now, now, -1, None, now
        seat.ref = seat.actor.do.remote(task.job)

    def _grow(self, now: float) -> None:
        """Open places for what waits, the models without a worker first."""
        while not self._gangs.waiting:
            found, without = self._staff.opening(self._schedule, self._held(), now)
            if found is None:
                closed = self._staff.in_the_way(without, self._schedule, self._held(), now) if without else []
                for seat in closed:
                    self._retire(seat, "moved")
                if closed:
                    continue
                return
            self._open(found)

    def _open(self, opening: Opening) -> None:
        """Ask for a place on a machine, and for a worker in it."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus, cpus = opening.gpus, self._staff.cpus(opening.gpus)
        bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        group = placement_group([bundle], bundle_label_selector=[{NODE_LABEL: opening.node}])
        pinned: Any = self._ray.remote  # Ray's stubs know no concurrency groups
        actor_class = pinned(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_concurrency=1,
            concurrency_groups={WATCH: 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )(StudyActor)
        blind = opening.kind == "cpu"
        actor: Any = actor_class.remote(self._study, self._place, self._identities, blind=blind)
        hello = actor.hello.remote()
        self._seats.append(Seat(opening.node, opening.kind, gpus, cpus, opening.key, group, actor, hello))

    def _together(self, now: float) -> None:
        """Start what groups of workers do, once there are places for all of them; others make way."""
        self._gangs.waiting = False
        gpus = 1.0 if self._nodes.gpus else 0.0
        cpus = self._staff.cpus(gpus)
        for task in self._schedule.queues.groups:
            workers = self._gangs.workers(max((node.gpus for node in self._nodes.alive), default=0))
            places, held = Held(), self._held()
            while len(places) < workers and (node := self._nodes.spot(gpus, cpus, held, now)) is not None:
                places.append((node, gpus, cpus))
                held.append(places[-1])
            enough = (self._nodes.gpus or self._nodes.cpus) >= workers
            if len(places) == workers or not enough:  # too few of them is an error of the user's that it reports
                self._schedule.take(task)
                self._gangs.start(task, workers, places)
                continue
            self._gangs.waiting = True
            self._dismiss(workers - len(places))
            return

    def _dismiss(self, count: int) -> None:
        """Let workers end after the task that they are at, the idle ones first."""
        mine = [seat for seat in self._seats if seat.kind == "model"]
        staying = sorted((seat for seat in mine if not seat.leaving), key=lambda seat: seat.task is not None)
        for seat in staying[: max(0, count - (len(mine) - len(staying)))]:
            seat.leaving = True

    def _held(self) -> Held:
        seats = [*self._seats, *(seat for _, seat in self._parked)]
        return [*((seat.node, seat.gpus, seat.cpus) for seat in seats), *self._gangs.held]

    def _settle_needs(self) -> None:
        """How many GPUs each model needs; those that fit no machine are left out."""
        largest = int(max((node.gpus for node in self._nodes.alive), default=0))
        for spec in self._study.models:
            try:
                self._needs[spec.name] = gpus_needed(spec, self._gpu_memory_mb, largest)
            except ClifflabError as error:
                self._schedule.give_up(spec.name, error)

    # -- what comes back -------------------------------------------------------------------------------------------

    def _wait(self) -> bool:
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
            if isinstance(result, BaseException):
                self._schedule.again(task, result)
            else:
                result.attempt = task.attempt
                self._schedule.done(task, result)
        return bool(done or finished)

    def _answer(self, seat: Seat) -> None:
        ref, seat.ref = seat.ref, None
        task, now = seat.task, time.monotonic()
        try:
            found = self._ray.get(ref)
        except self._bugs as error:
            cause: BaseException = error.as_instanceof_cause()  # type: ignore[no-untyped-call]
            if task is None:
                self._lose(seat, f"it cannot start ({shorten(str(error).strip().splitlines()[-1])})")
                return
            self._punish(seat, task)
            self._retire(seat, "failed")  # whatever it left in that process
            self._schedule.again(task, cause)
            return
        except self._ray.exceptions.RayError as error:  # it died, or its machine, or what it answered is gone
            self._lose(seat, (str(error).strip() or type(error).__name__).splitlines()[-1])
            return
        if task is None:
            self._welcome(seat, found, now - seat.since)
            seat.since = now
            return
        seat.since, seat.task = now, None
        self._strikes.pop(seat.spot, None)
        if found.error is None:
            self._load_losses.pop(task.key or "", None)
        found.where = {"worker": seat.id, **found.where}
        found.attempt = task.attempt
        seat.loaded |= {load["model"] for load in found.loads}
        for load in found.loads:
            self._staff.load_seconds[load["model"]] = load["seconds"]
        self._schedule.done(task, found)

    def _welcome(self, seat: Seat, where: dict[str, Any], seconds: float) -> None:
        """A worker is up."""
        seat.started = True
        seat.spot = f"{where['node']}:{','.join(where['gpu_ids']) or seat.id}"
        self._nodes.well(seat.node)
        if (code := where.pop("code")) != code_version():
            problem = f"machine {where['node'][:8]} runs it, and the driver {code_version()}"
            raise ClusterError("code", code, problem, "install the same clifflab on every machine")
        self._staff.start_seconds = seconds
        self._log.write(
            "worker_start", worker=seat.id, kind=seat.kind, gpus=seat.gpus, **where, seconds=round(seconds, 3)
        )

    def _lose(self, seat: Seat, reason: str, *, node_gone: bool = False, **about: Any) -> None:
        """A worker is gone, whatever the reason: its place is closed, and its task done again."""
        task, seat.task = seat.task, None
        if task and not node_gone:
            self._punish(seat, task)
        self._retire(seat, "hung" if reason.startswith("hung") else "lost")
        if task:
            began = round(time.time() - (time.monotonic() - seat.since), 3)
            self._schedule.lost(task, reason, worker=seat.id, began=began, **about)
            if task.key and task.key not in seat.loaded:
                losses = self._load_losses.setdefault(task.key, [])
                losses.append(seat.spot)
                wide = len(set(losses)) >= min(2, self.places)
                if wide and len(losses) >= self._settings.max_attempts and task.key in self._models:
                    self._schedule.lost_in_load(task.key, reason)
        elif not seat.started and not node_gone:
            self._log.write("worker_lost", worker=seat.id, step=None, model=None, unit=None, attempt=0, reason=reason)
            self._blame(seat.node, reason)

    def _blame(self, node: str, reason: str) -> None:
        """A worker did not come up on a machine: it is left alone for a while.

        Raises:
            WorkerError: That is so on every machine.
        """
        self._nodes.block(node, time.monotonic())
        if self._nodes.failures > self._settings.max_attempts:
            raise WorkerError(f"workers cannot be started ({shorten(reason, 200)}); look at Ray's logs, and run again")

    def _punish(self, seat: Seat, task: Task) -> None:
        """A task failed in a place: it is tried elsewhere, and the place rests, each time in a row for longer."""
        task.avoid.add(seat.spot)
        task.tried.add(seat.spot)
        task.places = self.places
        if len(task.avoid) >= self.places:
            task.avoid = {seat.spot} if self.places > 1 else set()
        strikes = self._strikes[seat.spot] = self._strikes.get(seat.spot, 0) + 1
        if seat.gpus and len(self._parked) < self.places - 1:
            seconds = min(_LONGEST_PARK, _PARK * 2 ** (strikes - 1))
            self._parked.append((time.monotonic() + seconds, seat))
            self._log.write("place_parked", worker=seat.id, node=seat.node, spot=seat.spot, seconds=seconds)

    def _unpark(self, now: float) -> None:
        """Use places again that were left alone."""
        from ray.util.placement_group import remove_placement_group

        for until, seat in list(self._parked):
            if until <= now:
                self._parked.remove((until, seat))
                remove_placement_group(seat.group)

    def _retire(self, seat: Seat, reason: str) -> None:
        """Close a place: its worker ends."""
        from ray.util.placement_group import remove_placement_group

        if seat not in self._seats:
            return
        self._seats.remove(seat)
        self._ray.kill(seat.actor)
        if all(parked is not seat for _, parked in self._parked):  # else its GPU stays taken
            remove_placement_group(seat.group)
        if seat.started:
            self._log.write("worker_stop", worker=seat.id, reason=reason)

    def _watch(self) -> None:
        """End workers that make no progress, and those that never came up."""
        from ray.util.placement_group import placement_group_table

        now, limit = time.monotonic(), self._settings.hang_seconds
        every = max(0.2, min(30.0, limit / 4))
        for seat in list(self._seats):
            if not seat.started and now - seat.since > _START_SECONDS:
                there = placement_group_table(seat.group).get("state") == "CREATED"
                self._retire(seat, "lost")
                if there:
                    self._blame(seat.node, f"none came up within {_START_SECONDS:.0f} s")
                else:  # others hold it
                    self._nodes.wait(seat.node, now)
                continue
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
        pulse, seat.pulse = seat.pulse, None
        try:
            beats = self._ray.get(pulse)
        except self._ray.exceptions.RayError:
            return  # if it is dead, the answer to its task says so
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
            self._dismiss(self._gangs.moved(node))  # a group's workers come up again elsewhere
            for seat in [seat for seat in self._seats if seat.node == node]:
                self._lose(seat, "its machine is gone", node_gone=True)

    def _check_stuck(self, now: float, *, busy: bool) -> None:
        """Say so when there is work and no place for it; give up when that lasts."""
        if busy or any(not seat.started for seat in self._seats) or self._schedule.queues.next_pause(now) is not None:
            self._stuck_since = None
            return
        if self._stuck_since is None:
            self._stuck_since = now
        waited = now - self._stuck_since
        if waited > 10 and not self._told_of_stuck:
            self._told_of_stuck = True
            self._reporter.note("work waits, and Ray has no free place for it: waiting for one")
        if waited > self._settings.hang_seconds:
            self._stuck_since = None
            for key in self._schedule.queues.keys:
                problem = f"no machine had a free place for it for {waited:.0f} s"
                remedy = "free some, or lower gpus; run again: it continues"
                self._schedule.give_up_key(key, InputError("models.gpus", key, problem, remedy))
            if self._schedule.queues.size(None):
                raise WorkerError(f"no machine had a free place for {waited:.0f} s; run again: it continues")
