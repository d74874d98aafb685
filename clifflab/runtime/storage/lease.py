"""One run at a time in a remote output: a lease that its holder renews, and that ends by itself when the holder dies.

Stores offer no locks, and their clients here no conditional writes. So a taker first writes a claim under a name of its
own, and only then looks: of two takers at once the later one sees the other's claim, or its lease. Who sees a claim
yields, and tries again after a while. That needs no more than that a store lists what was written before. Ages are told
by the store's clock, where it has one: the clocks of two machines may differ.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clifflab.errors import ClifflabError, OutputError
from clifflab.runtime.storage.client import Stamp
from clifflab.runtime.storage.objects import Objects
from clifflab.scoring.filesystems import OUTPUT

LEASE, CLAIM = ".lock.json", ".clifflab-claim-"
SPAN = 120.0  # seconds after the last renewal when a lease may be taken over; a claim is none after as many
RENEWAL = 30.0
MOMENT = 0.5  # seconds until a taker that yielded tries again; doubled each time, and drawn from
_TRIES = 6


class Lease:
    """The lease of one output.

    Args:
        objects: The output's objects.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects, self._owner = objects, secrets.token_hex(8)
        self._renewed = 0.0
        self._held, self._lost = False, ""
        self._guard = threading.Lock()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold it.

        Raises:
            OutputError: Another run holds it, or the store refuses.
        """
        self._take()
        done = threading.Event()
        thread = threading.Thread(target=self._keep, args=(done,), name="clifflab-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._give_back()

    def check(self) -> None:
        """Fail where the lease was held and is no longer: what is written from now on would mix with another run's.

        Raises:
            OutputError: Another run took it, or it cannot be renewed.
        """
        if self._held and time.monotonic() - self._renewed > SPAN / 2:
            self._renew()
        if self._lost:
            remedy = "let that one finish; run again: it continues"
            raise OutputError(OUTPUT, self._objects.address, f"this run no longer holds it ({self._lost})", remedy)

    def _take(self) -> None:
        self._since = time.time()
        claim = f"{CLAIM}{self._owner}"
        for number in range(_TRIES):
            start = time.monotonic()
            self._objects.again(lambda client: client.write(claim, self._text()))
            try:
                files = self._objects.again(lambda client: client.folder(""))[0]
                found = self._read()
                left = 0.0 if found is None else self._left(found, files.get(LEASE), files.get(claim))
                if left > 0:
                    raise self._taken(found or {}, left)
                # Whoever looked so long ago that others take its claim for none must look again.
                alone = claim in files and not self._rivals(files, claim) and time.monotonic() - start < SPAN / 2
                if alone and self._objects.again(lambda client: client.write(LEASE, self._text(), new=found is None)):  # noqa: B023
                    self._renewed, self._held, self._lost = time.monotonic(), True, ""
                    return
            finally:
                self._objects.again(lambda client: client.delete(claim))
            time.sleep(random.uniform(0, MOMENT * 2**number))
        raise self._taken(self._read() or {}, SPAN)

    def _rivals(self, files: Mapping[str, Stamp], own: str) -> bool:
        """Whether others claim it; what a killed taker left is deleted."""
        found = False
        for name in [name for name in files if name.startswith(CLAIM) and name != own]:
            content = self._objects.read(name)
            # One that is gone by now may have become the lease since that was looked at.
            if content is not None and (self._age(files[name], files[own], content) > SPAN or _ended(_parsed(content))):
                self._objects.again(lambda client: client.delete(name))  # noqa: B023
            else:
                found = True
        return found

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(RENEWAL) and not self._lost:
            try:
                self._renew()
            except ClifflabError:
                continue  # the store stumbles: what is written next meets it too, and says so

    def _renew(self) -> None:
        with self._guard:
            found = self._read()
            if found is None or found.get("owner") != self._owner:
                who = f"another run took it, from host {found.get('host')}" if found else "its lease was deleted"
                self._lost = self._lost or who
                return
            self._objects.again(lambda client: client.write(LEASE, self._text()))
            self._renewed = time.monotonic()

    def _give_back(self) -> None:
        self._held = False
        try:
            if (self._read() or {}).get("owner") == self._owner:
                self._objects.again(lambda client: client.delete(LEASE))
        except ClifflabError:
            return  # it ends by itself

    def _read(self) -> dict[str, Any] | None:
        data = self._objects.read(LEASE)
        return None if data is None else _parsed(data)

    def _left(self, found: dict[str, Any], listed: Stamp | None, own: Stamp | None) -> float:
        """Seconds until a lease ends; none where its holder is a process of this machine that has ended."""
        if _ended(found):
            return 0.0
        if listed is None or own is None:  # written just now
            return SPAN
        return SPAN - self._age(listed, own, json.dumps(found).encode())

    def _age(self, listed: Stamp, now: Stamp, content: bytes) -> float:
        """Seconds since an object was written.

        Args:
            listed: What the store says of it.
            now: What it says of one that was written just now.
            content: What it holds.
        """
        if listed.when is not None and now.when is not None:
            return now.when - listed.when
        told = _parsed(content).get("time")
        return time.time() - told if isinstance(told, int | float) else 0.0

    def _taken(self, found: dict[str, Any], left: float) -> OutputError:
        since = found.get("since")
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since)) if isinstance(since, int | float) else "?"
        problem = f"another run is writing there (since {when}, from host {found.get('host', '?')})"
        if not found:
            problem = "another run is writing there, or about to"
        remedy = f"wait for it, or choose another --out; if it died, run again in {max(1, round(left))} s"
        return OutputError(OUTPUT, self._objects.address, problem, remedy)

    def _text(self) -> bytes:
        about = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": round(self._since, 3),
            "time": round(time.time(), 3),
            "machine": _machine(),
            "began": _began(os.getpid()),
        }
        return json.dumps(about).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """This boot of this machine and its numbering of processes; empty where neither can be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process started, in the kernel's own count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _ended(about: dict[str, Any]) -> bool:
    """Whether it was written by a process of this machine that has ended since."""
    pid, machine = about.get("pid"), _machine()
    if not machine or about.get("machine") != machine or not isinstance(pid, int):
        return False
    return _began(pid) != about.get("began") or not _began(pid)
