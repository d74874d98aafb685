"""The processes that a command started, and how much memory they take together, from ``/proc`` (Linux).

Memory is the proportional set size: a page that several processes map, as those of libraries and of Ray's object store,
counts once over all of them, whereas the sum of resident sizes would count it once for each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_WORKER = (b"ray::", b"default_worker.py")  # the title of a worker of Ray, and its command until it has one
_AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")  # services with a title like a worker's
_SUMMARY = "smaps_rollup"


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        pid: Its id.
        born: When it began, in ticks since the machine did: with the pid, whose it is.
        parent: Its parent's id.
    """

    pid: int
    born: int
    parent: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a family of processes at one moment.

    Attributes:
        driver: Of its first process.
        workers: Of Ray's workers: tasks and actors.
        total: Of all, Ray's own services with them.
        shared: The part of the total that is shared memory: mostly the object store's pages in use.
    """

    driver: int
    workers: int
    total: int
    shared: int


class Family:
    """A process, all that it started, and all that those started.

    A process stays in the family when its parent ends before it, if it was seen before that.

    Args:
        root: Id of the first process.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self._known: dict[int, int] = {}

    def members(self) -> list[Process]:
        """Those that live now."""
        living = {process.pid: process for process in _living()}
        children: dict[int, list[int]] = defaultdict(list)
        for process in living.values():
            children[process.parent].append(process.pid)
        todo = [pid for pid, born in self._known.items() if pid in living and living[pid].born == born]
        todo += [self.root] if self.root in living else []
        found: set[int] = set()
        while todo:
            pid = todo.pop()
            if pid not in found:
                found.add(pid)
                todo += children[pid]
        self._known = {pid: living[pid].born for pid in found}
        return [living[pid] for pid in sorted(found)]

    def workers(self) -> list[Process]:
        """Ray's workers among them."""
        return [process for process in self.members() if is_worker(process.pid)]

    def memory(self) -> Memory:
        """What they take now; a process that ends meanwhile counts nothing."""
        sums = dict.fromkeys(("driver", "workers", "total", "shared"), 0)
        for process in self.members():
            own, shared = _own_memory(process.pid)
            sums["total"] += own
            sums["shared"] += shared
            if process.pid == self.root:
                sums["driver"] += own
            elif is_worker(process.pid):
                sums["workers"] += own
        return Memory(**sums)


def can_measure() -> bool:
    """Whether this system tells proportional set sizes."""
    return (_PROC / "self" / _SUMMARY).is_file()


def is_worker(pid: int) -> bool:
    """Whether a process is a worker of Ray."""
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return any(mark in command for mark in _WORKER) and not command.startswith(_AGENTS)


def _living() -> list[Process]:
    """All processes but those that ended and wait for their parents."""
    found = []
    for place in _PROC.iterdir():
        if not place.name.isdecimal():
            continue
        try:
            text = (place / "stat").read_text(errors="replace")
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()  # behind the name, which may hold anything
        if fields[0] not in ("Z", "X"):
            found.append(Process(int(place.name), int(fields[19]), int(fields[1])))
    return found


def _own_memory(pid: int) -> tuple[int, int]:
    """Bytes of a process's proportional set, and of shared memory in it."""
    try:
        lines = (_PROC / str(pid) / _SUMMARY).read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines[1:]}
    return int(sizes.get("Pss", 0)) << 10, int(sizes.get("Pss_Shmem", 0)) << 10
