"""What waits to be done: by the model that it needs, by step, in order; cheap for hundreds of thousands of units."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from clifflab.runtime.work import Job
from clifflab.stages import STEPS
from clifflab.stages.base import GangStep, Pair

_STUBBORN = 3  # times as many tries, at most, where all failures were in few places


@dataclass(eq=False)
class Task:
    """A job that waits, or is being done.

    Attributes:
        job: The job.
        key: The model that must be in memory for it (see :meth:`clifflab.stages.base.Step.needs`).
        order: Place of its step among all.
        attempt: Which try this is.
        after: Not to be begun before; of ``time.monotonic``.
        groups: Whether workers may form groups.
        avoid: Places where it failed: it is tried elsewhere, as long as there are others.
        tried: All places where it failed.
        places: How many places there are for it.
    """

    job: Job
    key: str | None
    order: int
    attempt: int = 1
    after: float = 0.0
    groups: bool = True
    avoid: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    places: int = 0

    @property
    def pair(self) -> Pair:
        """Its step and model."""
        return self.job.step, self.job.model

    def used_up(self, most: int) -> bool:
        """Whether it was tried often enough, and in enough places: one that fails in a single one is not to blame.

        Args:
            most: Tries of a task that fails wherever it is tried.
        """
        elsewhere = len(self.tried) >= min(most, self.places)
        return self.attempt >= most and (elsewhere or self.attempt >= _STUBBORN * most)

    @property
    def together(self) -> bool:
        """Whether a group of workers does it."""
        return self.groups and self.job.unit is not None and isinstance(STEPS[self.job.step], GangStep)


class Queues:
    """Tasks that may begin, by key and step; tasks for groups; and tasks that wait for their next try."""

    def __init__(self) -> None:
        self._ready: dict[str | None, dict[Pair, deque[Task]]] = {}
        self._groups: list[Task] = []
        self._later: list[tuple[float, int, Task]] = []
        self._number = count()

    def add(self, tasks: Iterable[Task], *, first: bool = False) -> None:
        """Append tasks; with ``first`` before those of their step that wait already."""
        for task in tasks:
            if task.together:
                self._groups.append(task)
                continue
            queue = self._ready.setdefault(task.key, {}).setdefault(task.pair, deque())
            if first:
                queue.appendleft(task)
            else:
                queue.append(task)

    def postpone(self, task: Task) -> None:
        """Let a task wait until it may begin again."""
        heapq.heappush(self._later, (task.after, next(self._number), task))

    def settle(self, now: float) -> None:
        """Queue what has waited long enough."""
        while self._later and self._later[0][0] <= now:
            self.add([heapq.heappop(self._later)[2]], first=True)

    def next_pause(self, now: float) -> float | None:
        """Seconds until a postponed task may begin; ``None`` where there is none."""
        return max(0.0, self._later[0][0] - now) if self._later else None

    def take(self, task: Task) -> None:
        """Remove a task that is begun."""
        if task.together:
            self._groups.remove(task)
            return
        steps = self._ready[task.key]
        queue = steps[task.pair]
        if queue[0] is task:
            queue.popleft()
        else:
            queue.remove(task)
        if not queue:
            del steps[task.pair]
        if not steps:
            del self._ready[task.key]

    def drop(self, models: set[str]) -> None:
        """Forget all work of some models."""
        self._groups = [task for task in self._groups if task.job.model not in models]
        self._later = [entry for entry in self._later if entry[2].job.model not in models]
        heapq.heapify(self._later)
        for key, steps in list(self._ready.items()):
            self._ready[key] = {pair: queue for pair, queue in steps.items() if pair[1] not in models}
            if not self._ready[key]:
                del self._ready[key]

    @property
    def groups(self) -> list[Task]:
        """Tasks for groups of workers."""
        return list(self._groups)

    @property
    def keys(self) -> list[str]:
        """Models that tasks wait for."""
        return [key for key in self._ready if key is not None]

    def first(self, key: str | None, place: str = "") -> Task | None:
        """The task of the earliest step that needs a model, or none; none that failed at this place before."""
        fitting = (
            next((task for task in queue if not place or place not in task.avoid), None)
            for queue in self._ready.get(key, {}).values()
        )
        return min((task for task in fitting if task), key=lambda task: task.order, default=None)

    def counts(self, key: str | None) -> dict[Pair, int]:
        """How many tasks wait for a model, by step."""
        return {pair: len(queue) for pair, queue in self._ready.get(key, {}).items()}

    def size(self, key: str | None) -> int:
        """How many tasks wait for a model."""
        return sum(self.counts(key).values())

    def __iter__(self) -> Iterator[Task]:
        """All tasks that may begin, groups' too, the earliest step first."""
        ready = [task for steps in self._ready.values() for queue in steps.values() for task in queue]
        return iter(sorted([*ready, *self._groups], key=lambda task: task.order))

    def __bool__(self) -> bool:
        """Whether anything waits, now or later."""
        return bool(self._ready or self._groups or self._later)
