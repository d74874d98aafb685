"""Where a run's files are kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from clifflab.artifacts import locked, remove


class Store(Protocol):
    """The folder of a study's results, as the stages see it."""

    root: Path
    remote: bool
    address: str

    def lock(self) -> AbstractContextManager[None]:
        """One run at a time."""
        ...

    def pull(self, places: Sequence[Path] | None = None) -> None:
        """Bring files here."""
        ...

    def push(self) -> None:
        """Send files."""
        ...

    def remove(self, place: Path) -> None:
        """Delete."""
        ...


class LocalStore:
    """A folder."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.address = root, str(root)

    def lock(self) -> AbstractContextManager[None]:
        """One run at a time."""
        return locked(self.root)

    def pull(self, places: Sequence[Path] | None = None) -> None:
        """Nothing."""

    def push(self) -> None:
        """Nothing."""

    def remove(self, place: Path) -> None:
        """Delete."""
        remove(place)


def open_store(out: str, name: str, scratch: Path | None = None) -> Store:
    """The store."""
    return LocalStore((Path(out) / name).absolute())
