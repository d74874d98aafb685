"""A remote output and its mirror: a local folder that stages read and write as they would the output itself.

``pull`` brings files here, ``push`` sends what was written since. Both go by what was last seen of each file on either
side, kept in an index beside the folder: sizes and times here, sizes and versions there.
"""

from __future__ import annotations

import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from clifflab.artifacts import output_error, read_json, remove, write_json
from clifflab.errors import OutputError
from clifflab.runtime.storage_lease import LEASE, Lease
from clifflab.runtime.storage_objects import Client, Objects, Stamp
from clifflab.runtime.storage_scratch import Scratch

T = TypeVar("T")
R = TypeVar("R")
THREADS = 8
WORK = ".work"
_TICK = 2.0  # seconds after which a time of change, told in whole seconds, is another one
_OLD = 3600.0  # seconds; more than clocks may differ
_INDEX_EVERY = 5.0  # seconds
_OF_DRIVER = ("events.jsonl", "status.json", "study.yaml")  # written beside jobs
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


class MirrorStore:
    """A remote output, mirrored. Methods may be called from several threads.

    Args:
        address: Of the output's folder (``OUT/name``), without a credential.
        scratch: Where the mirror is.
    """

    remote = True

    def __init__(self, address: str, scratch: Scratch) -> None:
        self.address, self.root = address, scratch.root
        self._scratch = scratch  # held as long as the store is
        self._objects = Objects(address)
        self._lease = Lease(self._objects)
        self._guard = threading.RLock()
        self._seen: dict[str, Seen] = {}
        self._saved = 0.0
        self._open()

    def lock(self) -> AbstractContextManager[None]:
        """Hold the output for one run.

        Raises:
            OutputError: Another run is writing there.
        """
        return self._lease.hold()

    def pull(self, places: Sequence[Path] | None = None) -> None:
        """Bring files and folders up to date; what is gone there goes here, but never what was not sent yet.

        Args:
            places: Paths below the root, each a file or a folder with all that is in it; by default everything but
                ``.work``. A place that does not exist is none.

        Raises:
            OutputError: The store cannot be read, or the local disk is full.
        """
        with self._guard:
            wanted, there = self._listed(places)
            fetch, verify = list[str](), list[str]()
            for name, stamp in there.items():
                here, seen = self._stat(name), self._seen.get(name)
                if here is not None and (seen is None or seen.local != here):
                    continue  # written here and not sent yet
                if here is None or seen is None or not _same(seen.remote, stamp):
                    fetch.append(name)
                elif not seen.settled:
                    verify.append(name)
            fetch += [name for name, same in zip(verify, self._each(self._verify, verify), strict=True) if not same]
            self._each(self._fetch, fetch)
            for name in [name for name in self._seen if name not in there and wanted(name)]:
                if self._stat(name) == self._seen[name].local:
                    (self.root / name).unlink(missing_ok=True)
                del self._seen[name]
            self._save()

    def push(self) -> None:
        """Send what was written since the last pull or push.

        Unit files go after results, then metrics, steps' manifests, and the study's manifest: each vouches for what
        goes before it.

        Raises:
            OutputError: The store cannot be written, or another run took the output over; what is there is whole.
        """
        with self._guard:
            self._lease.check()
            changed = list[tuple[int, str]]()
            for name, here in self._files():
                seen = self._seen.get(name)
                if seen is None or seen.local != here:
                    changed.append((_rank(name), name))
            for rank in sorted({rank for rank, _ in changed}):
                self._each(self._send, [name for own, name in changed if own == rank])
            if changed:
                self._save()

    def drop(self, before: Mapping[Path, Local]) -> None:
        """Delete here what was written since and not sent: by a job that failed, and that others may do again.

        Args:
            before: What :meth:`files` said then.
        """
        with self._guard:
            for name, here in list(self._files()):
                seen = self._seen.get(name)
                unsent = seen is None or seen.local != here
                if unsent and before.get(self.root / name) != here and name not in _OF_DRIVER:
                    (self.root / name).unlink(missing_ok=True)

    def remove(self, place: Path) -> None:
        """Delete a file or a folder, here and there.

        Raises:
            OutputError: The store refuses.
        """
        with self._guard:
            self._lease.check()
            name = place.relative_to(self.root).as_posix()
            if not _mirrored(name):  # a temporary file was never sent
                remove(place)
                return
            known = [seen for seen in self._seen if seen == name or seen.startswith(f"{name}/")]
            files, folders = self._objects.again(lambda client: client.folder(_parent(name)))
            last = PurePosixPath(name).name
            if last in files:
                self._objects.again(lambda client: client.delete(name))
            if last in folders:
                self._objects.again(lambda client: client.delete_tree(name))
            remove(self.root / name)
            for old in known:
                del self._seen[old]
            self._save()

    def present(self, place: Path) -> set[Path]:
        """The files below a folder there, as paths here, whether they were pulled or not."""
        name = "" if place == self.root else self._name(place)
        return {place / rest for rest in self._tree(name) if _mirrored(f"{name}/{rest}".lstrip("/"))}

    def files(self) -> dict[Path, Local]:
        """The files here, with what changes when one is written."""
        return {self.root / name: here for name, here in self._files()}

    def close(self) -> None:
        """Let the mirror go; one in a temporary folder is deleted."""
        with self._guard:
            self._save(now=True)
            self._scratch.close()

    def _open(self) -> None:
        """Take over what an ended process left here, without what it had not sent: that may be out of date."""
        found = read_json(self._scratch.index)
        entries = found if isinstance(found, dict) else {}
        for left in list(self.root.rglob(".*.tmp")):
            remove(left)
        for name, here in list(self._files()):
            seen = _parse(entries.get(name))
            if seen is not None and seen.local == here:
                self._seen[name] = seen
            else:
                (self.root / name).unlink(missing_ok=True)

    def _save(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._saved > _INDEX_EVERY:
            write_json(self._scratch.index, {name: asdict(seen) for name, seen in self._seen.items()})
            self._saved = time.monotonic()

    def _name(self, place: Path) -> str:
        """A path below the root, with ``/``."""
        name = place.relative_to(self.root).as_posix()
        if not _mirrored(name):
            raise ValueError(f"{place} is no place of the output's own")
        return name

    def _listed(self, places: Sequence[Path] | None) -> tuple[Callable[[str], bool], dict[str, Stamp]]:
        """Whether a file was asked for, and what there is of it there."""
        there = dict[str, Stamp]()
        if places is None:
            files, folders = self._objects.again(lambda client: client.folder(""))
            there |= files
            trees = sorted(folders - {WORK})
        else:
            names = {self._name(place) for place in places}
            names = {name for name in names if not any(parent.as_posix() in names for parent in _above(name))}
            parents = sorted({_parent(name) for name in names})
            trees = []
            for parent, (files, folders) in zip(parents, self._each(self._folder, parents), strict=True):
                for name in names:
                    if _parent(name) == parent:
                        last = PurePosixPath(name).name
                        there |= {name: files[last]} if last in files else {}
                        trees += [name] if last in folders else []
        for tree, found in zip(trees, self._each(self._tree, trees), strict=True):
            there |= {f"{tree}/{rest}": stamp for rest, stamp in found.items()}

        def wanted(name: str) -> bool:
            if places is None:
                return not name.startswith(f"{WORK}/")
            return name in names or any(parent.as_posix() in names for parent in _above(name))

        return wanted, {name: stamp for name, stamp in there.items() if _mirrored(name)}

    def _folder(self, place: str) -> tuple[dict[str, Stamp], set[str]]:
        return self._objects.again(lambda client: client.folder(place))

    def _tree(self, place: str) -> dict[str, Stamp]:
        return self._objects.again(lambda client: client.tree(place))

    def _verify(self, name: str) -> bool:
        """Whether an object whose stamp is as it was has the same content; it may have changed in the same second."""
        found, seen = self._objects.again(lambda client: client.stamp(name)), self._seen[name]
        if found is None or not _same(found[0], seen.remote) or not found[1] or found[1] != seen.etag:
            return False
        self._seen[name] = replace(seen, settled=time.time() - seen.at > _TICK)
        return True

    def _note(self, name: str, here: Local, stamp: Stamp, etag: str) -> None:
        """Both sides are the same now."""
        now, before = time.time(), self._seen.get(name)
        at = before.at if before and _same(before.remote, stamp) else now
        settled = stamp.exact or now - at > _TICK or (stamp.when is not None and now - stamp.when > _OLD)
        self._seen[name] = Seen(here, stamp, etag, at, settled)

    def _fetch(self, name: str) -> None:
        """Bring one file here, under a temporary name until it is whole."""
        place = self.root / name
        scratch = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

        def copy(client: Client) -> tuple[Stamp, str] | None:
            try:
                with self._disk(scratch, lambda: scratch.open("wb", buffering=0)) as handle:
                    etag = client.fetch(name, _Guarded(handle, self._disk, scratch))
                found = client.stamp(name)
            except FileNotFoundError:
                return None
            if found is None:
                return None
            if found[0].size != scratch.stat().st_size or found[1] != (etag or found[1]):
                raise OSError(f"{name} changed while it was read")  # read again
            return found

        try:
            self._disk(place, lambda: place.parent.mkdir(parents=True, exist_ok=True))
            found = self._objects.again(copy)
            if found is None:  # deleted since it was listed
                return
            self._disk(place, lambda: os.replace(scratch, place))
        finally:
            scratch.unlink(missing_ok=True)
        here = self._stat(name)
        assert here is not None
        self._note(name, here, *found)

    def _send(self, name: str) -> None:
        """Send one file; what is appended meanwhile goes with the next push."""
        here = self._stat(name)
        if here is None:
            return  # deleted since it was looked for

        def copy(client: Client) -> tuple[Stamp, str] | None:
            with self._disk(self.root / name, lambda: (self.root / name).open("rb")) as source:
                client.send(name, source, here[0])
            return client.stamp(name)

        found = self._objects.again(copy)
        if found is None or found[0].size != here[0]:
            size = "nothing" if found is None else f"{found[0].size} of {here[0]} bytes"
            raise OutputError("output", self.address, f"{name}: {size} arrived", "is another run writing there?")
        self._note(name, here, *found)

    def _disk(self, place: Path, act: Callable[[], T]) -> T:
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

    def _each(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results in order. In threads, one too: an interrupt of the main one must not end a write half-way."""
        if not items:
            return []
        with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="clifflab-store") as pool:
            return list(pool.map(act, items))

    def _files(self) -> Iterator[tuple[str, Local]]:
        """Every file here that is mirrored; links are not followed."""
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
                    if _mirrored(name):
                        todo.append(name)
                elif _mirrored(name) and (here := self._stat(name)) is not None:
                    yield name, here

    def _stat(self, name: str) -> Local | None:
        try:
            found = os.stat(self.root / name, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return (found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


class _Guarded:
    """A local file whose refusals are told from the store's."""

    def __init__(self, handle: Any, disk: Callable[[Path, Callable[[], object]], object], place: Path) -> None:
        self._handle, self._disk, self._place = handle, disk, place

    def write(self, data: bytes, /) -> object:
        def whole() -> None:
            view = memoryview(data)
            while view:
                view = view[self._handle.write(view) :]

        return self._disk(self._place, whole)


def _mirrored(name: str) -> bool:
    """Whether a path is part of the output: temporaries and locks are not, nor what would lead out of the folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        return False
    if any(part.startswith(".") and part.endswith(".tmp") for part in parts):
        return False
    return parts[-1] not in (LEASE, ".lock") and not parts[0].startswith(".clifflab-")


def _rank(name: str) -> int:
    """When a file is sent, of all that are sent together."""
    if name == "manifest.json":
        return 4
    if name.startswith(".steps/"):
        return 3
    if name == "metrics.json":
        return 2
    return 1 if name.startswith(f"{WORK}/") else 0


def _above(name: str) -> Iterable[PurePosixPath]:
    return PurePosixPath(name).parents


def _parent(name: str) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else parent


def _same(one: Stamp, other: Stamp) -> bool:
    return bool(one.version) and (one.size, one.version) == (other.size, other.version)


def _parse(entry: Any) -> Seen | None:
    """An entry of the index; ``None`` where it is none of ours."""
    try:
        size, changed, inode = (int(number) for number in entry["local"])
        seen = Seen((size, changed, inode), Stamp(**entry["remote"]), entry["etag"], entry["at"], entry["settled"])
    except (TypeError, KeyError, ValueError):
        return None
    return seen
