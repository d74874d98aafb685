"""A store that fsspec reaches: a file is written under a temporary name and moved into place, where that is needed."""

from __future__ import annotations

import inspect
import io
import posixpath
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from clifflab.runtime.storage.client import BLOCK, Sink, Stamp


class FsspecClient:
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
        """Files and folders directly in a folder, by their name; empty where there is none."""
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
        """All files below a folder, by their path from it."""
        self._fs.invalidate_cache()
        start = len(self._path(place).rstrip("/")) + 1
        found: dict[str, Any] = self._fs.find(self._path(place), detail=True)
        return {path[start:]: _fsspec_stamp(info) for path, info in found.items() if path[start:]}

    def stamp(self, place: str) -> tuple[Stamp, str] | None:
        """An object's stamp and its etag, which may be empty; ``None`` where there is none."""
        self._fs.invalidate_cache()
        try:
            info = self._fs.info(self._path(place))
        except FileNotFoundError:
            return None
        return (_fsspec_stamp(info), str(info.get("ETag") or "")) if info["type"] == "file" else None

    def fetch(self, place: str, sink: Sink) -> str:
        """Copy an object to an open file; returns its etag, which may be empty."""
        with self._fs.open(self._path(place), "rb") as stream:
            while block := stream.read(BLOCK):
                sink.write(block)
        return ""

    def send(self, place: str, source: io.BufferedReader, size: int) -> None:
        """Write the first bytes of an open file as an object that is whole or absent."""

        def write(path: str) -> None:
            left = size
            with self._fs.open(path, "wb") as stream:
                while left and (block := source.read(min(left, BLOCK))):
                    stream.write(block)
                    left -= len(block)

        if size <= BLOCK:
            self.write(place, source.read(size))
        elif self._whole:
            self._fs.put_file(source.name, self._path(place))
        else:
            self._beside(place, write)

    def write(self, place: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small object; with ``new`` only if there is none, where the filesystem can tell."""
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
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(place))

    def delete_tree(self, place: str) -> None:
        """Delete all objects below a folder."""
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
