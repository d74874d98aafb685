"""A store that pyarrow reaches: ``s3://`` and ``gs://``. An object appears when its write is complete."""

from __future__ import annotations

import io
import mmap
from contextlib import suppress
from datetime import datetime
from typing import Any

from clifflab.runtime.storage.client import BLOCK, Sink, Stamp


class ArrowClient:
    """A filesystem of pyarrow."""

    def __init__(self, filesystem: Any, base: str) -> None:
        self._fs, self._base = filesystem, base

    def folder(self, place: str) -> tuple[dict[str, Stamp], set[str]]:
        """Files and folders directly in a folder, by their name; empty where there is none."""
        files, folders = dict[str, Stamp](), set[str]()
        for info in self._list(place, recursive=False):
            if info.is_file:
                files[info.base_name] = _arrow_stamp(info)
            else:
                folders.add(info.base_name)
        return files, folders

    def tree(self, place: str) -> dict[str, Stamp]:
        """All files below a folder, by their path from it."""
        start = len(self._path(place)) + 1
        return {info.path[start:]: _arrow_stamp(info) for info in self._list(place, recursive=True) if info.is_file}

    def stamp(self, place: str) -> tuple[Stamp, str] | None:
        """An object's stamp and its etag, which may be empty; ``None`` where there is none."""
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
        """Copy an object to an open file; returns its etag, which may be empty."""
        with self._fs.open_input_stream(self._path(place)) as stream:
            while block := stream.read(BLOCK):
                sink.write(block)
            return _told(stream).get("etag", "")

    def send(self, place: str, source: io.BufferedReader, size: int) -> None:
        """Write the first bytes of an open file as an object that is whole or absent."""
        # A stream that is closed, be it by an error on this side, commits what it was given. So nothing can fail on
        # this side while it is open: small files are in memory before, large ones are mapped. An error of the store
        # stays with the stream, which then commits nothing.
        if size <= BLOCK:
            self.write(place, source.read(size))
            return
        with mmap.mmap(source.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            stream = self._fs.open_output_stream(self._path(place))
            try:
                for start in range(0, size, BLOCK):
                    stream.write(mapped[start : start + BLOCK])
                    stream.flush()  # waits for the parts, which would pile up in memory
            finally:
                stream.close()

    def write(self, place: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small object. Nothing can be refused where one is there already: pyarrow has no such request."""
        with self._fs.open_output_stream(self._path(place)) as stream:
            stream.write(data)
        return True

    def delete(self, place: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(self._path(place))

    def delete_tree(self, place: str) -> None:
        """Delete all objects below a folder."""
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
