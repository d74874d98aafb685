"""Places on a cluster's machines, and the actors that sit in them: one placement group each, pinned to its machine.

The driver keeps the account of what it holds of every machine; what others hold shows as a place that does not come.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from clifflab.runtime.queues import Task

_LOOK = 2.0  # seconds between two looks at the machines
_HELD = 30.0  # seconds until a machine that others hold is asked again
_BLOCKED, _LONGEST_BLOCK = 10.0, 600.0  # seconds for which a machine is left alone where a worker did not come up
NODE_LABEL = "ray.io/node-id"
SAME = 1e-6  # shares of a GPU are sums of fractions


@dataclass
class Node:
    """A machine of the cluster, or one that is gone.

    Attributes:
        id: Ray's name of it.
        cpus: Its cores.
        gpus: Its GPUs.
        alive: Whether it is there.
        blocked: Not to be asked for places before.
        failed: Workers that did not come up there, since the last that did.
    """

    id: str
    cpus: float
    gpus: float
    alive: bool = True
    blocked: float = 0.0
    failed: int = 0


@dataclass
class Seat:
    """A place that the driver holds, and the worker in it.

    Attributes:
        node: The machine.
        kind: ``model`` for work with a model, ``cpu`` for work without one beside GPUs.
        gpus: GPUs of it, or a share of one.
        cpus: Cores of it.
        key: The model that it holds, or is meant for.
        id: Name in the event log.
        seen: Models that its worker was given work for.
        loaded: Those of them that it loaded.
        task: What it is at.
        ref: The answer that is waited for: of the start, or of the task.
        since: When it began to wait for a task; or for the answer.
        moved: When it was last seen to make progress.
        beats: Its count of progress then.
        pulse: A question about it that is not answered.
        asked: When it was asked.
        leaving: It gets no more tasks.
        spot: Its machine and GPUs, once they are known: what a task that failed there avoids.
    """

    node: str
    kind: Literal["model", "cpu"]
    gpus: float
    cpus: float
    key: str | None
    group: Any
    actor: Any
    ref: Any
    id: str = field(default_factory=lambda: secrets.token_hex(3))
    started: bool = False
    seen: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)
    task: Task | None = None
    since: float = field(default_factory=time.monotonic)
    moved: float = 0.0
    beats: int = -1
    pulse: Any = None
    asked: float = 0.0
    leaving: bool = False
    spot: str = ""

    @property
    def idle(self) -> bool:
        """Whether it waits for a task."""
        return self.started and self.task is None


class Nodes:
    """The machines, and what is free on them by the driver's own account."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._next = 0.0

    def look(self, now: float) -> list[str]:
        """Ask Ray again, at most every two seconds; ids of machines that are gone since the last look."""
        import ray

        if now < self._next:
            return []
        self._next = now + _LOOK
        gone = []
        there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        for name, node in there.items():
            resources = node["Resources"]
            if name not in self._nodes:
                self._nodes[name] = Node(name, resources.get("CPU", 0.0), resources.get("GPU", 0.0))
        for name, known in self._nodes.items():
            if known.alive and name not in there:
                known.alive = False
                gone.append(name)
        return gone

    @property
    def alive(self) -> list[Node]:
        """Those that are there."""
        return [node for node in self._nodes.values() if node.alive]

    @property
    def gpus(self) -> float:
        """GPUs of all."""
        return sum(node.gpus for node in self.alive)

    @property
    def cpus(self) -> float:
        """Cores of all."""
        return sum(node.cpus for node in self.alive)

    def block(self, name: str, now: float) -> None:
        """A worker did not come up on it: it is left alone for a while, each time for longer."""
        node = self._nodes[name]
        node.failed += 1
        node.blocked = now + min(_LONGEST_BLOCK, _BLOCKED * 2 ** (node.failed - 1))

    def wait(self, name: str, now: float) -> None:
        """A place on it did not come: others hold it."""
        self._nodes[name].blocked = now + _HELD

    def well(self, name: str) -> None:
        """A worker came up on it."""
        self._nodes[name].failed = 0

    @property
    def failures(self) -> int:
        """How often in a row workers did not come up, on the machine where that was least."""
        return min((node.failed for node in self.alive), default=0)

    def free(self, node: Node, held: Iterable[tuple[str, float, float]]) -> tuple[list[float], float]:
        """What the driver does not hold of each GPU of a machine, and cores.

        Args:
            node: The machine.
            held: Node, GPUs and cores of everything that it holds.
        """
        mine = [(gpus, cpus) for name, gpus, cpus in held if name == node.id]
        left = [1.0] * int(node.gpus)
        for gpus in sorted((gpus for gpus, _ in mine), reverse=True):  # whole ones, then shares
            take(left, gpus)
        return left, node.cpus - sum(cpus for _, cpus in mine)

    def spot(
        self, gpus: float, cpus: float, held: list[tuple[str, float, float]], now: float, kept: Collection[str] = ()
    ) -> str | None:
        """The machine for a new place: where it leaves least over, so that large places stay whole.

        Args:
            gpus: GPUs that it takes.
            cpus: Cores that it takes.
            held: Node, GPUs and cores of everything that the driver holds.
            now: The time.
            kept: Machines that are not asked.
        """
        fitting = []
        for node in (node for node in self.alive if node.id not in kept):
            free, free_cpus = self.free(node, held)
            if node.blocked <= now and take(free, gpus) and free_cpus >= cpus - SAME:
                left = (sum(free), free_cpus - cpus) if gpus else (sum(free), -free_cpus)
                fitting.append((*left, node.id))
        return min(fitting)[2] if fitting else None


def take(left: list[float], gpus: float) -> bool:
    """Take GPUs from what is left of each, whole ones or a share of the fullest one; whether there was room."""
    if gpus <= 0:
        return True
    if gpus >= 1:
        whole = [place for place, free in enumerate(left) if free > 1 - SAME][: round(gpus)]
        for place in whole:
            left[place] = 0.0
        return len(whole) == round(gpus)
    fitting = [place for place, free in enumerate(left) if free >= gpus - SAME]
    if fitting:
        left[min(fitting, key=lambda place: left[place])] -= gpus
    return bool(fitting)
