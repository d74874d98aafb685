"""One run at a time in a remote output: a lease that its holder renews, and that ends by itself when the holder dies.

Stores offer no locks. The taker writes the lease and reads it back after a moment, so that of two takers at once the
later one holds it and the other yields; where a store can refuse to write over an object, that decides before. Ages are
told by the store's clock, where it has one: the clocks of two machines may differ.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clifflab.errors import ClifflabError, OutputError
from clifflab.runtime.storage_objects import Objects
from clifflab.scoring.filesystems import OUTPUT

LEASE = ".lock.json"
SPAN = 120.0  # seconds after the last renewal when a lease may be taken over
RENEWAL = 30.0
MOMENT = 1.0  # until it is read back


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
        found = self._read()
        if found is not None and (left := self._left(found)) > 0:
            raise self._taken(found, left)
        self._since = time.time()
        first = self._objects.again(lambda client: client.write(LEASE, self._text(), new=found is None))
        if first:
            time.sleep(MOMENT)
        back = self._read() or {}
        if back.get("owner") != self._owner:
            raise self._taken(back, SPAN)
        self._renewed, self._held, self._lost = time.monotonic(), True, ""

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
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    def _left(self, found: dict[str, Any]) -> float:
        """Seconds until a lease ends; none where its holder is a process of this machine that has ended."""
        if found.get("machine") == _machine() and not _runs(found.get("pid"), found.get("began")):
            return 0.0
        stamp = self._objects.again(lambda client: client.stamp(LEASE))
        if stamp is None:
            return 0.0
        renewed, now = stamp[0].when, None
        if renewed is not None:
            now = self._objects.now(f".clifflab-now-{self._owner}")
        if renewed is None or now is None:
            renewed, now = float(found.get("time", 0.0)), time.time()
        return SPAN - (now - renewed)

    def _taken(self, found: dict[str, Any], left: float) -> OutputError:
        since = found.get("since")
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since)) if isinstance(since, int | float) else "?"
        problem = f"another run is writing there (since {when}, from host {found.get('host', '?')})"
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


def _runs(pid: object, began: object) -> bool:
    """Whether a process of this machine still runs; ``True`` where that cannot be told."""
    if not isinstance(pid, int) or not _machine():
        return True
    return _began(pid) == began and _began(pid) != ""
