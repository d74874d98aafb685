"""The objects of a remote output: list, read, write whole, delete; asked again where a store stumbles.

Two clients: pyarrow's for ``s3://`` and ``gs://``, whose writes appear when they are complete, and fsspec's for the
rest, where a file is written under a temporary name and moved into place (the stores of ``_WHOLE`` need no move).
"""

from __future__ import annotations

import inspect
import io
import mmap
import posixpath
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from clifflab.errors import OutputError, UserError
from clifflab.scoring.filesystems import OUTPUT, denied, locate, of_store, reading, scheme_of

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before an operation is tried again
PATIENCE = 60.0  # seconds after which it is not
_BLOCK = 8 << 20  # bytes that are held of a large file
_WHOLE = ("abfs", "abfss", "az")  # a blob appears when its blocks are committed
_READ_ONLY = ("hf", "http", "https", "github", "zip", "data")
_HOPELESS = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")


@dataclass(frozen=True)
class Stamp:
    """What a store says of an object.

    Attributes:
        size: Bytes.
        version: Changes when the object does, if not within one second; empty where the store tells nothing.
        when: Its last change by the store's clock, seconds since the epoch.
        exact: The version changes within one second too.
    """

    size: int
    version: str = ""
    when: float | None = None
    exact: bool = False


class Sink(Protocol):
    """Where the bytes of an object go."""

    def write(self, data: bytes, /) -> object:
        """Take the next bytes."""
        ...


class Client(Protocol):
    """One store's own way; paths are below the output's folder, with ``/`` between their parts."""

    def folder(self, place: str) -> tuple[dict[str, Stamp], set[str]]:
        """Files and folders directly in a folder, by their name; empty where there is none."""
        ...

    def tree(self, place: str) -> dict[str, Stamp]:
        """All files below a folder, by their path from it."""
        ...

    def stamp(self, place: str) -> tuple[Stamp, str] | None:
        """An object's stamp and its etag, which may be empty; ``None`` where there is none."""
        ...

    def fetch(self, place: str, sink: Sink) -> str:
        """Copy an object to an open file; returns its etag.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def send(self, place: str, source: io.BufferedReader, size: int) -> None:
        """Write the first bytes of an open file as an object that is whole or absent."""
        ...

    def write(self, place: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small object; with ``new`` only if there is none, as far as the store offers that."""
        ...

    def delete(self, place: str) -> None:
        """Delete an object, if it is there."""
        ...

    def delete_tree(self, place: str) -> None:
        """Delete all objects below a folder."""
        ...


class Objects:
    """The objects below one address; every failure is one line about it.

    Args:
        address: Of the folder, without a credential.
        pauses: Seconds before each further try.

    Raises:
        OutputError: No filesystem is known for the address, or it can only be read.
    """

    def __init__(self, address: str, pauses: tuple[float, ...] | None = None) -> None:
        self.address, self._pauses = address, PAUSES if pauses is None else pauses
        if scheme_of(address) in _READ_ONLY:
            remedy = "choose a local folder, s3://BUCKET/..., gs://BUCKET/..., or another store that can be written"
            raise OutputError(OUTPUT, address, "can only be read", remedy)
        filesystem, base = locate(address, OUTPUT)
        handler = getattr(filesystem, "handler", None)
        self.client: Client = (
            _Arrow(filesystem, base) if handler is None else _Fsspec(handler.fs, base, scheme_of(address) in _WHOLE)
        )

    def again(self, act: Callable[[Client], T]) -> T:
        """Do something, and again where the store stumbles.

        Raises:
            OutputError: It was refused, or did not work for longer than is waited.
        """
        start = time.monotonic()
        for pause in (*self._pauses, None):
            try:
                return act(self.client)
            except Exception as error:
                if isinstance(error, UserError) or not (isinstance(error, OSError) or of_store(error)):
                    raise
                hopeless = denied(error) or any(word in str(error) for word in _HOPELESS)
                if pause is None or hopeless or time.monotonic() - start > PATIENCE:
                    with reading(self.address, OUTPUT):
                        raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def read(self, place: str) -> bytes | None:
        """A small object; ``None`` where there is none."""

        def fetch(client: Client) -> bytes | None:
            sink = io.BytesIO()
            try:
                client.fetch(place, sink)
            except FileNotFoundError:
                return None
            return sink.getvalue()

        return self.again(fetch)

    def now(self, name: str) -> float | None:
        """The store's clock, read off an object that is written and deleted; ``None`` where it has none."""
        self.again(lambda client: client.write(name, b"now"))
        found = self.again(lambda client: client.stamp(name))
        self.again(lambda client: client.delete(name))
        return found[0].when if found else None


class _Arrow:
    """A filesystem of pyarrow."""

    def __init__(self, filesystem: Any, base: str) -> None:
        self._fs, self._base = filesystem, base

    def folder(self, place: str) -> tuple[dict[str, Stamp], set[str]]:
        files, folders = dict[str, Stamp](), set[str]()
        for info in self._list(place, recursive=False):
            if info.is_file:
                files[info.base_name] = _arrow_stamp(info)
            else:
                folders.add(info.base_name)
        return files, folders

    def tree(self, place: str) -> dict[str, Stamp]:
        start = len(self._path(place)) + 1
        return {info.path[start:]: _arrow_stamp(info) for info in self._list(place, recursive=True) if info.is_file}

    def stamp(self, place: str) -> tuple[Stamp, str] | None:
        try:
            with self._fs.open_input_stream(self._path(place)) as stream:
                told = _told(stream)
        except FileNotFoundError:
            return None
        if "content-length" in told and "last-modified" in told:  # all in one request
            with suppress(ValueError):
                when = datetime.fromisoformat(told["last-modified"]).timestamp()
                return Stamp(int(told["content-length"]), str(int(when)), when), told.get("etag", "")
        info = self._fs.get_file_info(self._path(place))
        return (_arrow_stamp(info), told.get("etag", "")) if info.is_file else None

    def fetch(self, place: str, sink: Sink) -> str:
        with self._fs.open_input_stream(self._path(place)) as stream:
            while block := stream.read(_BLOCK):
                sink.write(block)
            return _told(stream).get("etag", "")

    def send(self, place: str, source: io.BufferedReader, size: int) -> None:
        # A stream that is closed, be it by an error on this side, commits what it was given. So nothing can fail on
        # this side while it is open: small files are in memory before, large ones are mapped. An error of the store
        # stays with the stream, which then commits nothing.
        if size <= _BLOCK:
            self.write(place, source.read(size))
            return
        with mmap.mmap(source.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            stream = self._fs.open_output_stream(self._path(place))
            try:
                for start in range(0, size, _BLOCK):
                    stream.write(mapped[start : start + _BLOCK])
                    stream.flush()  # waits for the parts, which would pile up in memory
            finally:
                stream.close()

    def write(self, place: str, data: bytes, *, new: bool = False) -> bool:
        with self._fs.open_output_stream(self._path(place)) as stream:
            stream.write(data)
        return True

    def delete(self, place: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.delete_file(self._path(place))

    def delete_tree(self, place: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.delete_dir(self._path(place))

    def _list(self, place: str, *, recursive: bool) -> list[Any]:
        from pyarrow import fs

        found: list[Any] = self._fs.get_file_info(
            fs.FileSelector(self._path(place), recursive=recursive, allow_not_found=True)
        )
        return found

    def _path(self, place: str) -> str:
        return f"{self._base}/{place}" if place else self._base


def _arrow_stamp(info: Any) -> Stamp:
    when = None if info.mtime is None else info.mtime.timestamp()
    # A listing may give fractions of a second that a single answer lacks.
    return Stamp(info.size, "" if when is None else str(int(when)), when)


def _told(stream: Any) -> dict[str, str]:
    """What a store tells of an open object, by names in lower case."""
    found = (stream.metadata() or {}).items()
    pairs = [[part.decode() if isinstance(part, bytes) else str(part) for part in pair] for pair in found]
    return {name.lower(): value for name, value in pairs}


class _Fsspec:
    """A filesystem of fsspec.

    Args:
        filesystem: The filesystem.
        base: The folder.
        whole: Its writes appear when they are complete.
    """

    def __init__(self, filesystem: Any, base: str, whole: bool) -> None:
        self._fs, self._base, self._whole = filesystem, filesystem._strip_protocol(base), whole
        self._exclusive = "mode" in inspect.signature(type(filesystem).pipe_file).parameters

    def folder(self, place: str) -> tuple[dict[str, Stamp], set[str]]:
        self._fs.invalidate_cache()
        files, folders = dict[str, Stamp](), set[str]()
        with suppress(FileNotFoundError, NotADirectoryError):
            for info in self._fs.ls(self._path(place), detail=True):
                name = posixpath.basename(info["name"].rstrip("/"))
                if info["type"] == "file":
                    files[name] = _fsspec_stamp(info)
                else:
                    folders.add(name)
        return files, folders

    def tree(self, place: str) -> dict[str, Stamp]:
        self._fs.invalidate_cache()
        start = len(self._path(place).rstrip("/")) + 1
        found: dict[str, Any] = self._fs.find(self._path(place), detail=True)
        return {path[start:]: _fsspec_stamp(info) for path, info in found.items() if path[start:]}

    def stamp(self, place: str) -> tuple[Stamp, str] | None:
        self._fs.invalidate_cache()
        try:
            info = self._fs.info(self._path(place))
        except FileNotFoundError:
            return None
        return (_fsspec_stamp(info), str(info.get("ETag") or "")) if info["type"] == "file" else None

    def fetch(self, place: str, sink: Sink) -> str:
        with self._fs.open(self._path(place), "rb") as stream:
            while block := stream.read(_BLOCK):
                sink.write(block)
        return ""

    def send(self, place: str, source: io.BufferedReader, size: int) -> None:
        def write(path: str) -> None:
            left = size
            with self._fs.open(path, "wb") as stream:
                while left and (block := source.read(min(left, _BLOCK))):
                    stream.write(block)
                    left -= len(block)

        if size <= _BLOCK:
            self.write(place, source.read(size))
        elif self._whole:
            self._fs.put_file(source.name, self._path(place))
        else:
            self._beside(place, write)

    def write(self, place: str, data: bytes, *, new: bool = False) -> bool:
        path = self._path(place)
        if new and self._exclusive:
            self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        elif self._whole:
            self._fs.pipe_file(path, data)
        else:
            self._beside(place, lambda scratch: self._fs.pipe_file(scratch, data))
        return True

    def delete(self, place: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(place))

    def delete_tree(self, place: str) -> None:
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(place), recursive=True)

    def _beside(self, place: str, write: Callable[[str], None]) -> None:
        """Let ``write`` fill a temporary object beside its place, and move it there."""
        path = self._path(place)
        folder, name = posixpath.split(path)
        scratch = f"{folder}/.{name}.{secrets.token_hex(6)}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            write(scratch)
            self._fs.mv(scratch, path)
        except BaseException:
            with suppress(Exception):  # the error that came first is the one to tell
                self._fs.rm_file(scratch)
            raise

    def _path(self, place: str) -> str:
        return f"{self._base}/{place}" if place else self._base


def _fsspec_stamp(info: dict[str, Any]) -> Stamp:
    times = (info.get(name) for name in ("LastModified", "last_modified", "mtime", "modified", "updated", "created"))
    raw = next((found for found in times if found is not None), None)
    when = raw.timestamp() if isinstance(raw, datetime) else float(raw) if isinstance(raw, int | float) else None
    content = info.get("ETag") or info.get("etag") or info.get("md5")
    exact = bool(content) or (when is not None and when != int(when))
    return Stamp(int(info["size"] or 0), str(content or raw or ""), when, exact)
