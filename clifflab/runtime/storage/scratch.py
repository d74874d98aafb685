"""Local folders for mirrors: each is held by one process, and used again when that has ended, however it did."""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from clifflab.artifacts import output_error
from clifflab.errors import OutputError

VARIABLE = "CLIFFLAB_SCRATCH"
_MOST = 4096  # processes of one machine that mirror one output


class Scratch:
    """One process's folder for the mirror of one output: ``PARENT/HASH-NUMBER/NAME``.

    The number is the lowest that no living process holds. Below ``CLIFFLAB_SCRATCH``, or a parent that is given, the
    files stay for the next process, which fetches only what has changed; elsewhere they are deleted at the end.

    Args:
        address: Of the output.
        name: Last part of the root.
        parent: Where to make it; by default what ``CLIFFLAB_SCRATCH`` names, else a folder among the temporary files.

    Raises:
        OutputError: It cannot be made.
    """

    def __init__(self, address: str, name: str, parent: Path | None = None) -> None:
        given, self._pid = os.environ.get(VARIABLE), os.getpid()
        self._stays = parent is not None or bool(given)
        parent = (parent or (Path(given).expanduser() if given else _temporary())).absolute()
        key = hashlib.sha256(address.encode()).hexdigest()[:16]
        try:
            self._folder, self._handle = _first_free(parent, key)
            self.root, self.index = self._folder / name, self._folder / ".index.json"
            self.root.mkdir(exist_ok=True)
        except OSError as error:
            problem = output_error(parent, error).problem
            raise OutputError("scratch", parent, problem, f"let {VARIABLE} name a folder with space") from None
        if not self._stays:
            atexit.register(self.close)

    def close(self) -> None:
        """Let it go; where it is temporary, delete it."""
        if self._handle.closed:
            return
        if not self._stays:
            atexit.unregister(self.close)
            if self._pid == os.getpid():  # and not a process that was split off
                shutil.rmtree(self._folder, ignore_errors=True)
        self._handle.close()


def _first_free(parent: Path, key: str) -> tuple[Path, IO[Any]]:
    for number in range(_MOST):
        folder = parent / f"{key}-{number}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = (folder / ".lock").open("a+")
        except FileNotFoundError:
            continue  # deleted just now by the process that held it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_nlink:
                return folder, handle
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                handle.close()
                raise
        handle.close()
    raise OSError(errno.EMFILE, f"{_MOST} processes hold folders there")


def _temporary() -> Path:
    """A folder of this user's own among the temporary files, which no one else can have put there."""
    place = Path(tempfile.gettempdir()) / f"clifflab-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError as error:
        raise OutputError("scratch", place, output_error(place, error).problem, f"set {VARIABLE}") from None
    if place.is_symlink() or not place.is_dir() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OutputError("scratch", place, "is not this user's own folder", f"remove it, or set {VARIABLE}")
    return place
