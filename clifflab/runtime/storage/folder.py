"""The local side of a mirror: its files, and what was last seen of each on both sides."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from clifflab.artifacts import output_error, read_json, remove, write_json
from clifflab.errors import OutputError
from clifflab.runtime.storage.client import Stamp
from clifflab.runtime.storage.lease import LEASE

T = TypeVar("T")
WORK = ".work"
_TICK = 2.0  # seconds after which a time of change, told in whole seconds, is another one
_OLD = 3600.0  # seconds; more than clocks may differ
_INDEX_EVERY = 5.0  # seconds
Local = tuple[int, int, int]  # size, time of change in ns, inode


@dataclass(frozen=True)
class Seen:
    """A file as it was when both sides were the same.

    Attributes:
        local: Its stat here.
        remote: Its stamp there.
        etag: Of the content there; empty where the store has none.
        at: When this stamp was first seen, by this machine's clock.
        settled: Another content would have another stamp.
    """

    local: Local
    remote: Stamp
    etag: str
    at: float
    settled: bool


class MirrorFolder:
    """A mirror's folder and index. Names are paths below the root, with ``/``.

    Args:
        root: The folder.
        index: Where the index is kept.

    Attributes:
        seen: What was last seen of each file, by its name.
    """

    def __init__(self, root: Path, index: Path) -> None:
        self.root, self._index, self._saved = root, index, 0.0
        self.seen: dict[str, Seen] = {}
        self._take_over()

    def name(self, place: Path) -> str:
        """The name of a path.

        Raises:
            ValueError: It is none of the output's own.
        """
        name = place.relative_to(self.root).as_posix()
        if not mirrored(name):
            raise ValueError(f"{place} is no place of the output's own")
        return name

    def stat(self, name: str) -> Local | None:
        """What changes when a file is written; ``None`` where there is no file, or a link."""
        try:
            found = os.stat(self.root / name, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return (found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None

    def files(self) -> Iterator[tuple[str, Local]]:
        """Every file that is mirrored; links are not followed."""
        todo = [""]
        while todo:
            folder = todo.pop()
            try:
                entries = list(os.scandir(self.root / folder))
            except FileNotFoundError:
                continue  # deleted meanwhile
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if mirrored(name):
                        todo.append(name)
                elif mirrored(name) and (here := self.stat(name)) is not None:
                    yield name, here

    def unsent(self) -> list[tuple[str, Local]]:
        """The files that were written since both sides were the same."""
        return [(name, here) for name, here in self.files() if not self._known(name, here)]

    def is_unsent(self, name: str) -> bool:
        """Whether there is a file that was written since."""
        here = self.stat(name)
        return here is not None and not self._known(name, here)

    def delete(self, name: str) -> None:
        """Delete a file."""
        (self.root / name).unlink(missing_ok=True)

    def note(self, name: str, here: Local, stamp: Stamp, etag: str) -> None:
        """Both sides of a file are the same now."""
        now, before = time.time(), self.seen.get(name)
        at = before.at if before and same(before.remote, stamp) else now
        settled = stamp.exact or now - at > _TICK or (stamp.when is not None and now - stamp.when > _OLD)
        self.seen[name] = Seen(here, stamp, etag, at, settled)

    def confirm(self, name: str, stamp: Stamp, etag: str) -> bool:
        """Whether an object whose stamp is as it was has the same content; it may have changed in the same second."""
        seen = self.seen[name]
        if not same(stamp, seen.remote) or not etag or etag != seen.etag:
            return False
        self.seen[name] = replace(seen, settled=time.time() - seen.at > _TICK)
        return True

    def forget(self, name: str) -> None:
        """It is gone there; here too, unless it was written since."""
        if not self.is_unsent(name):
            self.delete(name)
        del self.seen[name]

    def save(self, *, now: bool = False) -> None:
        """Keep the index for the next process; not at every call."""
        if now or time.monotonic() - self._saved > _INDEX_EVERY:
            write_json(self._index, {name: asdict(seen) for name, seen in self.seen.items()})
            self._saved = time.monotonic()

    def on_disk(self, place: Path, act: Callable[[], T]) -> T:
        """Do something on the local disk.

        Raises:
            OutputError: It is full, or refuses.
        """
        try:
            return act()
        except OSError as error:
            problem = output_error(place, error).problem
            remedy = "make space there, or let CLIFFLAB_SCRATCH name a larger disk; run again: it continues"
            raise OutputError("scratch", self.root, problem, remedy) from None

    def _known(self, name: str, here: Local) -> bool:
        seen = self.seen.get(name)
        return seen is not None and seen.local == here

    def _take_over(self) -> None:
        """Keep what an ended process left here, but not what it had not sent: that may be out of date."""
        found = read_json(self._index)
        entries = found if isinstance(found, dict) else {}
        for left in list(self.root.rglob(".*.tmp")):
            remove(left)
        for name, here in list(self.files()):
            seen = _parse(entries.get(name))
            if seen is not None and seen.local == here:
                self.seen[name] = seen
            else:
                self.delete(name)


class Sinking:
    """A local file whose refusals are told from the store's.

    Args:
        folder: The mirror's.
        handle: The file, opened without a buffer.
        place: Its path.
    """

    def __init__(self, folder: MirrorFolder, handle: Any, place: Path) -> None:
        self._folder, self._handle, self._place = folder, handle, place

    def write(self, data: bytes, /) -> object:
        """Write all of it.

        Raises:
            OutputError: The disk is full, or refuses.
        """

        def whole() -> None:
            view = memoryview(data)
            while view:
                view = view[self._handle.write(view) :]

        return self._folder.on_disk(self._place, whole)


def mirrored(name: str) -> bool:
    """Whether a path is part of the output: temporaries and locks are not, nor what would lead out of the folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        return False
    if any(part.startswith(".") and part.endswith(".tmp") for part in parts):
        return False
    return parts[-1] not in (LEASE, ".lock") and not parts[0].startswith(".clifflab-")


def rank_of(name: str) -> int:
    """When a file is sent, of all that are sent together: each rank vouches for those before it."""
    if name == "manifest.json":
        return 4
    if name.startswith(".steps/"):
        return 3
    if name == "metrics.json":
        return 2
    return 1 if name.startswith(f"{WORK}/") else 0


def same(one: Stamp, other: Stamp) -> bool:
    """Whether two stamps are the same, as far as they tell."""
    return bool(one.version) and (one.size, one.version) == (other.size, other.version)


def _parse(entry: Any) -> Seen | None:
    """An entry of the index; ``None`` where it is none of ours."""
    try:
        size, changed, inode = (int(number) for number in entry["local"])
        seen = Seen((size, changed, inode), Stamp(**entry["remote"]), entry["etag"], entry["at"], entry["settled"])
    except (TypeError, KeyError, ValueError):
        return None
    return seen
