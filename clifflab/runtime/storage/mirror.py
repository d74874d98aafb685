"""A remote output and its mirror: a local folder that stages read and write as they would the output itself.

``pull`` brings files here, ``push`` sends what was written since. Both go by what was last seen of each file on either
side: its size and time here, its size and version there.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from clifflab.artifacts import remove
from clifflab.errors import OutputError
from clifflab.runtime.storage.client import Client, Stamp
from clifflab.runtime.storage.folder import WORK, Local, MirrorFolder, Sinking, mirrored, rank_of, same
from clifflab.runtime.storage.lease import Lease
from clifflab.runtime.storage.objects import Objects
from clifflab.runtime.storage.scratch import Scratch

T = TypeVar("T")
R = TypeVar("R")
THREADS = 8
_OF_DRIVER = ("events.jsonl", "status.json", "study.yaml")  # written beside jobs


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
        self._here = MirrorFolder(scratch.root, scratch.index)

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
            here = self._here
            wanted, there = self._listed(places)
            fetch, verify = list[str](), list[str]()
            for name, stamp in there.items():
                if here.is_unsent(name):
                    continue
                seen = here.seen.get(name)
                if seen is None or here.stat(name) is None or not same(seen.remote, stamp):
                    fetch.append(name)
                elif not seen.settled:
                    verify.append(name)
            fetch += [name for name, good in zip(verify, self._each(self._verify, verify), strict=True) if not good]
            self._each(self._fetch, fetch)
            for name in [name for name in here.seen if name not in there and wanted(name)]:
                here.forget(name)
            here.save()

    def push(self) -> None:
        """Send what was written since the last pull or push.

        Unit files go after results, then metrics, steps' manifests, and the study's manifest: each vouches for what
        goes before it.

        Raises:
            OutputError: The store cannot be written, or another run took the output over; what is there is whole.
        """
        with self._guard:
            self._lease.check()
            changed = [(rank_of(name), name) for name, _ in self._here.unsent()]
            for rank in sorted({rank for rank, _ in changed}):
                self._each(self._send, [name for own, name in changed if own == rank])
            if changed:
                self._here.save()

    def drop(self, before: Mapping[Path, Local]) -> None:
        """Delete here what was written since and not sent: by a job that failed, and that others may do again.

        Args:
            before: What :meth:`files` said then.
        """
        with self._guard:
            for name, now in self._here.unsent():
                if before.get(self.root / name) != now and name not in _OF_DRIVER:
                    self._here.delete(name)

    def let_go(self, needed: Sequence[Path]) -> None:
        """Delete unit files here that were sent and are not needed: they would fill the disk of a long-lived worker.

        Args:
            needed: Files and folders that stay.
        """
        with self._guard:
            names = {self._here.name(place) for place in needed}
            for name in [name for name in self._here.seen if name.startswith(f"{WORK}/")]:
                if name not in names and not _inside(name, names):
                    self._here.forget(name)

    def remove(self, place: Path) -> None:
        """Delete a file or a folder, here and there.

        Raises:
            OutputError: The store refuses.
        """
        with self._guard:
            self._lease.check()
            name = place.relative_to(self.root).as_posix()
            if not mirrored(name):  # a temporary file was never sent
                remove(place)
                return
            files, folders = self._folder(_parent(name))
            last = PurePosixPath(name).name
            if last in files:
                self._objects.again(lambda client: client.delete(name))
            if last in folders:
                self._objects.again(lambda client: client.delete_tree(name))
            remove(place)
            for old in [seen for seen in self._here.seen if seen == name or seen.startswith(f"{name}/")]:
                del self._here.seen[old]
            self._here.save()

    def present(self, place: Path) -> set[Path]:
        """The files below a folder there, as paths here, whether they were pulled or not."""
        name = "" if place == self.root else self._here.name(place)
        return {place / rest for rest in self._tree(name) if mirrored(f"{name}/{rest}".lstrip("/"))}

    def files(self) -> dict[Path, Local]:
        """The files here, with what changes when one is written."""
        return {self.root / name: now for name, now in self._here.files()}

    def close(self) -> None:
        """Let the mirror go; one in a temporary folder is deleted."""
        with self._guard:
            self._here.save(now=True)
            self._scratch.close()

    def _listed(self, places: Sequence[Path] | None) -> tuple[Callable[[str], bool], dict[str, Stamp]]:
        """Whether a file was asked for, and what there is of it there."""
        there, trees, names = dict[str, Stamp](), list[str](), set[str]()
        if places is None:
            files, folders = self._folder("")
            there |= files
            trees += sorted(folders - {WORK})
        else:
            names = {self._here.name(place) for place in places}
            names = {name for name in names if not _inside(name, names)}
            parents = sorted({_parent(name) for name in names})
            listed = dict(zip(parents, self._each(self._folder, parents), strict=True))
            for name in sorted(names):
                files, folders = listed[_parent(name)]
                last = PurePosixPath(name).name
                if last in files:
                    there[name] = files[last]
                if last in folders:
                    trees.append(name)
        for tree, found in zip(trees, self._each(self._tree, trees), strict=True):
            there |= {f"{tree}/{rest}": stamp for rest, stamp in found.items()}

        def wanted(name: str) -> bool:
            if places is None:
                return not name.startswith(f"{WORK}/")
            return name in names or _inside(name, names)

        return wanted, {name: stamp for name, stamp in there.items() if mirrored(name)}

    def _folder(self, place: str) -> tuple[dict[str, Stamp], set[str]]:
        return self._objects.again(lambda client: client.folder(place))

    def _tree(self, place: str) -> dict[str, Stamp]:
        return self._objects.again(lambda client: client.tree(place))

    def _verify(self, name: str) -> bool:
        found = self._objects.again(lambda client: client.stamp(name))
        return found is not None and self._here.confirm(name, *found)

    def _fetch(self, name: str) -> None:
        """Bring one file here, under a temporary name until it is whole."""
        here, place = self._here, self.root / name
        scratch = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

        def copy(client: Client) -> tuple[Stamp, str] | None:
            try:
                with here.on_disk(scratch, lambda: scratch.open("wb", buffering=0)) as handle:
                    etag = client.fetch(name, Sinking(here, handle, scratch))
                found = client.stamp(name)
            except FileNotFoundError:
                return None
            if found is not None and (found[0].size != scratch.stat().st_size or found[1] != (etag or found[1])):
                raise OSError(f"{name} changed while it was read")  # read again
            return found

        try:
            here.on_disk(place, lambda: place.parent.mkdir(parents=True, exist_ok=True))
            found = self._objects.again(copy)
            if found is None:  # deleted since it was listed
                return
            here.on_disk(place, lambda: os.replace(scratch, place))
        finally:
            scratch.unlink(missing_ok=True)
        now = here.stat(name)
        assert now is not None
        here.note(name, now, *found)

    def _send(self, name: str) -> None:
        """Send one file; what is appended meanwhile goes with the next push."""
        here, place, now = self._here, self.root / name, self._here.stat(name)
        if now is None:
            return  # deleted since it was looked for

        def copy(client: Client) -> tuple[Stamp, str] | None:
            with here.on_disk(place, lambda: place.open("rb")) as source:
                client.send(name, source, now[0])
            return client.stamp(name)

        found = self._objects.again(copy)
        if found is None or found[0].size != now[0]:
            size = "nothing" if found is None else f"{found[0].size} of {now[0]} bytes"
            raise OutputError("output", self.address, f"{name}: {size} arrived", "is another run writing there?")
        here.note(name, now, *found)

    def _each(self, act: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results in order. In threads, one too: an interrupt of the main one must not end a write half-way."""
        if not items:
            return []
        with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="clifflab-store") as pool:
            return list(pool.map(act, items))


def _parent(name: str) -> str:
    parent = PurePosixPath(name).parent.as_posix()
    return "" if parent == "." else parent


def _inside(name: str, folders: set[str]) -> bool:
    return any(parent.as_posix() in folders for parent in PurePosixPath(name).parents)
