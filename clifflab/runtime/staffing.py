"""Who does what: the task that suits an idle worker, which model deserves another one, and where it finds room.

Decides alone; :mod:`clifflab.runtime.fleet` starts and ends the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clifflab.config import Study
from clifflab.runtime.queues import Queues, Task
from clifflab.runtime.schedule import Schedule
from clifflab.runtime.seats import SAME, Nodes, Seat, take

_CPU_SEATS = 32
_LOOSE_AFTER = 1.0  # seconds after which an idle worker beside GPUs does work that needs none
Held = list[tuple[str, float, float]]


@dataclass(frozen=True)
class Opening:
    """A place to be opened.

    Attributes:
        key: The model that it is for; ``None`` for work without one.
        node: The machine.
        gpus: GPUs of it.
        kind: See :class:`~clifflab.runtime.seats.Seat`.
    """

    key: str | None
    node: str
    gpus: float
    kind: Literal["model", "cpu"] = "model"


class Staffing:
    """The decisions of a fleet.

    Args:
        study: The study.
        nodes: The machines.
        seats: The fleet's places, kept up to date by it.
        needs: GPUs of one worker of each model.

    Attributes:
        load_seconds: How long each model took to load last.
        start_seconds: How long a worker took to start last.
        kept_for: A machine whose workers take no other model's work, and the large model that waits for it.
    """

    def __init__(self, study: Study, nodes: Nodes, seats: list[Seat], needs: dict[str, float]) -> None:
        self._settings, self._nodes, self._seats, self._needs = study.runtime, nodes, seats, needs
        self._replicas = {spec.name: spec.replicas for spec in study.models}
        self._with_gpus = nodes.gpus > 0
        self.load_seconds: dict[str, float] = {}
        self.start_seconds = 0.0
        self.kept_for: tuple[str, str] | None = None

    # -- tasks -----------------------------------------------------------------------------------------------------

    def own(self, seat: Seat, queues: Queues, now: float) -> Task | None:
        """Work with the model that is loaded, and work without one; what failed in this place before comes last."""
        waited = now - seat.since
        place = seat.spot if waited < self._settings.patience_seconds else ""
        loose = queues.first(None, place)
        if seat.kind == "cpu":
            return loose
        mine = queues.first(seat.key, place) if seat.key is not None else None
        if not self._with_gpus:
            return loose or mine  # which others mostly wait for
        others = any(other.kind == "cpu" and other.task is None for other in self._seats)
        return mine or (loose if not others and waited >= min(_LOOSE_AFTER, self._settings.patience_seconds) else None)

    def others(self, seat: Seat, schedule: Schedule, now: float) -> str | None:
        """The model with the longest queue whose work an idle worker takes, where that is better than to wait."""
        if seat.kind == "cpu":
            return None
        kept = self.kept_for[1] if self.kept_for and self.kept_for[0] == seat.node else None
        queues = schedule.queues
        fitting = [key for key in queues.keys if key != seat.key and self._fits(seat, key) and kept in (None, key)]
        key = next(iter(self._by_length(fitting, schedule, now, seat)), None)
        if key is None or seat.key is None or not schedule.expects(seat.key):
            return key
        # It waits for its own model's next step at most as long as the change would cost.
        cost = self._cost(key, seat) or self.load_seconds.get(seat.key, 0.0)
        return None if now - seat.since < min(self._settings.patience_seconds, cost) else key

    def _fits(self, seat: Seat, key: str) -> bool:
        return abs(self.need(key) - seat.gpus) < SAME and self.workers(key) < self._most(key)

    def _cost(self, key: str, seat: Seat | None = None) -> float:
        """Seconds until a model could be in memory at a place, or at a new one: of a worker's start, and the load."""
        fresh = seat is None or key in seat.seen
        return self.load_seconds.get(key, 0.0) + (self.start_seconds if fresh else 0.0)

    def _by_length(self, keys: Sequence[str], schedule: Schedule, now: float, seat: Seat | None = None) -> list[str]:
        """The models that another worker helps: those without one first, then by waiting tasks a worker."""
        helped = [key for key in keys if self._helps(key, schedule, now, self._cost(key, seat))]
        workers = {key: self.workers(key) for key in helped}
        return sorted(helped, key=lambda key: (workers[key] > 0, -schedule.queues.size(key) / (workers[key] + 1)))

    def _helps(self, key: str, schedule: Schedule, now: float, cost: float) -> bool:
        """Whether another worker would be there before those that are at it are done."""
        mine = [seat for seat in self._seats if seat.kind == "model" and seat.key == key]
        if not mine:
            return True
        counts = schedule.queues.counts(key)
        if all(seat.task and now - seat.since > cost + self._settings.patience_seconds for seat in mine):
            return True  # what waits behind long units is not to wait for them
        each = {pair: schedule.mean_seconds(pair) for pair in counts}
        if any(seconds is None for seconds in each.values()):
            return sum(counts.values()) > self.coming(key)
        return sum(counts[pair] * (seconds or 0.0) for pair, seconds in each.items()) / len(mine) > cost

    # -- places ----------------------------------------------------------------------------------------------------

    def opening(self, schedule: Schedule, held: Held, now: float) -> tuple[Opening | None, str | None]:
        """The next place to open; where there is none, a model that has no worker and finds no room."""
        queues = schedule.queues
        if self.kept_for and not queues.size(self.kept_for[1]):
            self.kept_for = None
        kind: Literal["model", "cpu"] = "cpu" if self.cpu_seats else "model"
        mine = [seat for seat in self._seats if seat.kind == kind and not seat.leaving]
        room = kind == "model" or len(mine) < self.cpu_seats
        if room and queues.size(None) > sum(not seat.task for seat in mine):
            found = self._somewhere(None, kind, held, now)
            if found:
                return found, None
        without = None
        for key in self._by_length([key for key in queues.keys if self._wants(key, queues)], schedule, now):
            if found := self._somewhere(key, "model", held, now):
                return found, None
            without = without or (None if self.workers(key) else key)
        return None, without

    def _wants(self, key: str, queues: Queues) -> bool:
        """Whether more tasks wait for a model than workers are idle with it, or on their way."""
        return self.workers(key) < self._most(key) and queues.size(key) > self.coming(key)

    def _somewhere(self, key: str | None, kind: Literal["model", "cpu"], held: Held, now: float) -> Opening | None:
        limit = self._settings.workers
        if kind == "model" and limit != "auto" and sum(seat.kind == "model" for seat in self._seats) >= limit:
            return None
        need = 0.0 if kind == "cpu" else self.need(key)
        others = set() if self.kept_for is None or key == self.kept_for[1] or not need else {self.kept_for[0]}
        node = self._nodes.spot(need, self.cpus(need), held, now, others)
        if node is None:
            return None
        if self.kept_for and key == self.kept_for[1]:
            self.kept_for = None
        return Opening(key, node, need, kind)

    def in_the_way(self, key: str, schedule: Schedule, held: Held, now: float) -> list[Seat]:
        """Idle places to be closed for a model that has no worker and finds no room.

        What is idle never stands before what waits: a worker that has nothing to do makes way, at once if nothing is
        to come for its model, else after ``runtime.patience_seconds``. Where that is not enough for a large model, a
        machine is kept for it: workers there finish what waits for their own models, and take nothing else.
        """
        need, cpus = self.need(key), self.cpus(self.need(key))
        best: tuple[float, str] | None = None
        for node in self._nodes.alive:
            left, cores = self._nodes.free(node, held)
            closed, room = list[Seat](), take(list(left), need) and cores >= cpus - SAME
            for seat in [seat for seat in self._seats if seat.node == node.id and self._makes_way(seat, schedule, now)]:
                if room:
                    break
                closed.append(seat)
                left, cores = self._nodes.free(node, _without(held, closed))
                room = take(list(left), need) and cores >= cpus - SAME
            if room and closed:
                return closed
            other = any(seat.node == node.id and abs(seat.gpus - need) > SAME for seat in self._seats)
            if node.gpus >= need > 1 and other and (best is None or sum(left) > best[0]):
                best = (sum(left), node.id)
        if best and not self.kept_for:
            self.kept_for = (best[1], key)
        return []

    def _makes_way(self, seat: Seat, schedule: Schedule, now: float) -> bool:
        if not seat.idle or seat.kind != "model":
            return False
        if seat.key is None or not schedule.expects(seat.key):
            return True
        return not schedule.queues.size(seat.key) and now - seat.since >= self._settings.patience_seconds

    # -- counts ----------------------------------------------------------------------------------------------------

    def cpus(self, gpus: float) -> float:
        """Cores of a place: one, or less where a machine has more GPUs than cores."""
        if not gpus:
            return 1.0
        if gpus < 1:
            return max(0.01, round(gpus * self.cpus(1.0), 2))
        share = min((node.cpus / node.gpus for node in self._nodes.alive if node.gpus), default=1.0)
        return 1.0 if share >= 1 else max(0.01, round(share, 2))

    @property
    def cpu_seats(self) -> int:
        """Places without a GPU beside those with one."""
        return min(_CPU_SEATS, max(0, int(self._nodes.cpus - self._nodes.gpus))) if self._with_gpus else 0

    def need(self, key: str | None) -> float:
        """GPUs that a model needs; a guard one, as do workers that hold nothing."""
        return self._needs.get(key or "", 1.0) if self._with_gpus else 0.0

    def _most(self, key: str) -> float:
        replicas = self._replicas.get(key, "auto")
        return float("inf") if replicas == "auto" else replicas

    def workers(self, key: str) -> int:
        """Workers that hold a model, or are meant for it."""
        return sum(seat.kind == "model" and seat.key == key for seat in self._seats)

    def coming(self, key: str) -> int:
        """Workers of a model that can take a task now or soon."""
        return sum(s.kind == "model" and s.key == key and s.task is None and not s.leaving for s in self._seats)


def _without(held: Held, closed: Sequence[Seat]) -> Held:
    """What is held once some places are closed."""
    left = list(held)
    for seat in closed:
        left.remove((seat.node, seat.gpus, seat.cpus))
    return left
