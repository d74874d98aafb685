"""Whether an output can be used from here, and whether several machines mean the same place by it.

Each leaves a small file with its name and looks for those of the others: two disks with the same path do not hold each
other's. Nothing is left behind.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from clifflab.artifacts import locked, output_error
from clifflab.errors import OutputError
from clifflab.runtime.storage.address import address_of, local_root
from clifflab.runtime.storage.lease import LEASE, Lease
from clifflab.runtime.storage.objects import Objects
from clifflab.scoring.filesystems import OUTPUT

PROBE = ".clifflab-check-"
_PAUSES, _PATIENCE = (0.5, 1.0), 5.0  # seconds: a check is not to last


@contextmanager
def left_probe(out: str, name: str, token: str, node: str) -> Iterator[None]:
    """Leave a file for other nodes to see, and read it back; it goes at the end.

    Args:
        out: Where results go, as :func:`clifflab.runtime.storage.open_store` takes it.
        name: Of the study.
        token: Of this check: letters, digits, ``-``.
        node: This node's name.

    Raises:
        OutputError: The output cannot be written, or gives back something else than was written.
    """
    place = _Place(out, name)
    own, content = f"{PROBE}{token}-{quote(node, safe='')}", secrets.token_bytes(16)
    place.write(own, content)
    try:
        if place.read(own) != content:
            problem = "does not give back what was written"
            raise OutputError(OUTPUT, place.address, problem, "is another check running there? try again")
        yield
    finally:
        place.delete(own)


def seen_probes(out: str, name: str, token: str) -> set[str]:
    """Names of the nodes whose files of this check are there."""
    start = f"{PROBE}{token}-"
    return {unquote(file.removeprefix(start)) for file in _Place(out, name).names() if file.startswith(start)}


def check_output(out: str, name: str, token: str, node: str = "") -> set[str]:
    """Write, read back and delete a file in the output; returns the other nodes whose files are seen.

    While one node holds :func:`left_probe`, each other one that calls this sees the same place exactly if that node's
    name is in the answer.

    Args:
        out: Where results go.
        name: Of the study.
        token: Of this check.
        node: This node's name.

    Raises:
        OutputError: The output cannot be used from here.
    """
    with left_probe(out, name, token, node):
        return seen_probes(out, name, token) - {node}


def refuse_held(out: str, name: str) -> None:
    """Fail where a run holds the output now; leaves nothing behind.

    Args:
        out: Where results go.
        name: Of the study.

    Raises:
        OutputError: One does, and says who it is as far as that is known.
    """
    root = local_root(out, name)
    if root is not None:
        if (root / ".lock").exists():
            with locked(root):
                return
        return
    objects = Objects(address_of(out, name), _PAUSES, _PATIENCE)
    if objects.read(LEASE) is not None:
        with Lease(objects).hold():
            return


class _Place:
    """A folder of small files, local or remote."""

    def __init__(self, out: str, name: str) -> None:
        self.address = address_of(out, name)
        self._root = local_root(out, name)
        self._objects = None if self._root else Objects(self.address, _PAUSES, _PATIENCE)
        self._made: list[Path] = []

    def write(self, file: str, data: bytes) -> None:
        if self._objects:
            self._objects.again(lambda client: client.write(file, data))
            return
        assert self._root is not None
        try:
            self._made = [folder for folder in (self._root, *self._root.parents) if not folder.exists()]
            self._root.mkdir(parents=True, exist_ok=True)
            (self._root / file).write_bytes(data)
        except OSError as error:
            self.delete(file)
            raise output_error(self._root, error) from None

    def read(self, file: str) -> bytes | None:
        if self._objects:
            return self._objects.read(file)
        assert self._root is not None
        try:
            return (self._root / file).read_bytes()
        except OSError as error:
            raise output_error(self._root, error) from None

    def names(self) -> list[str]:
        if self._objects:
            return list(self._objects.again(lambda client: client.folder(""))[0])
        assert self._root is not None
        return [path.name for path in self._root.iterdir()] if self._root.is_dir() else []

    def delete(self, file: str) -> None:
        if self._objects:
            with suppress(OutputError):
                self._objects.again(lambda client: client.delete(file))
            return
        assert self._root is not None
        with suppress(OSError):
            (self._root / file).unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # somebody else's by now
                folder.rmdir()
