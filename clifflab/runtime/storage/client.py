"""What a store can do: the few operations that a mirror needs of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Protocol


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


BLOCK = 8 << 20  # bytes that are held of a large file
