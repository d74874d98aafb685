"""Where a run's results go: a local folder, or a remote one that each process mirrors.

Stages read and write files below :attr:`Store.root`. Where the output is local (NFS is), that is the output itself.
Where it is ``s3://``, ``gs://`` or another address that pyarrow or fsspec reaches, it is a folder of this process's
own: what a job reads is pulled before it, and what it wrote is pushed after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from clifflab import artifacts
from clifflab.runtime.storage.address import address_of, local_root
from clifflab.runtime.storage.check import check_output as check_output
from clifflab.runtime.storage.check import left_probe as left_probe
from clifflab.runtime.storage.check import seen_probes as seen_probes
from clifflab.runtime.storage.folder import Local
from clifflab.runtime.storage.jobs import mirror_job as mirror_job
from clifflab.runtime.storage.jobs import outputs_of as outputs_of
from clifflab.runtime.storage.jobs import reads_of as reads_of
from clifflab.runtime.storage.mirror import MirrorStore
from clifflab.runtime.storage.scratch import Scratch


class Store(Protocol):
    """Where one run's results are.

    Attributes:
        root: Local folder that stages read and write.
        remote: Whether the root is a mirror; if not, it is the output, and nothing needs to be pulled or pushed.
        address: What a user is shown; holds no credential.
    """

    root: Path
    remote: bool
    address: str

    def lock(self) -> AbstractContextManager[None]:
        """Hold the output for one run at a time.

        Raises:
            OutputError: Another run is writing there.
        """
        ...

    def pull(self, places: Sequence[Path] | None = None) -> None:
        """Bring files and folders below the root up to date; by default all but ``.work``."""
        ...

    def push(self) -> None:
        """Send everything below the root that was written since the last pull or push; each file whole or absent."""
        ...

    def drop(self, before: Mapping[Path, Local]) -> None:
        """Delete what was written below a mirror's root since :meth:`files` gave this, and not pushed."""
        ...

    def let_go(self, needed: Sequence[Path]) -> None:
        """Delete unit files of a mirror that were sent and are not needed; they stay in the output."""
        ...

    def remove(self, place: Path) -> None:
        """Delete a file or a folder, here and there."""
        ...

    def present(self, place: Path) -> set[Path]:
        """The files below a folder of the output, whether they are here or not."""
        ...

    def files(self) -> dict[Path, Local]:
        """The files that are here: size, time of change in ns, and inode of each."""
        ...

    def close(self) -> None:
        """Let the root go, if it is a mirror."""
        ...


class LocalStore:
    """A local folder.

    Args:
        root: The folder, absolute.
    """

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.address = root, str(root)

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder; the lock goes with the process, however it ends."""
        return artifacts.locked(self.root)

    def pull(self, places: Sequence[Path] | None = None) -> None:
        """Nothing to bring."""

    def push(self) -> None:
        """Nothing to send."""

    def drop(self, before: Mapping[Path, Local]) -> None:
        """What is written is in the output, and stays."""

    def let_go(self, needed: Sequence[Path]) -> None:
        """Nothing is here alone."""

    def remove(self, place: Path) -> None:
        """Delete a file or a folder, if it is there."""
        artifacts.remove(place)

    def present(self, place: Path) -> set[Path]:
        """The files below a folder."""
        return {path for path in place.rglob("*") if path.is_file()}

    def files(self) -> dict[Path, Local]:
        """All files."""
        stats = {path: path.stat() for path in self.present(self.root)}
        return {path: (found.st_size, found.st_mtime_ns, found.st_ino) for path, found in stats.items()}

    def close(self) -> None:
        """Nothing to let go."""


def open_store(out: str, name: str, scratch: Path | None = None) -> Store:
    """The store of a run's results; asks no server yet.

    Args:
        out: A local path, ``file://``, ``s3://``, ``gs://``, or an address of any fsspec scheme that can be written.
            Credentials come from the environment.
        name: Of the study: results go to ``OUT/NAME``.
        scratch: Where the mirror of a remote output is made; by default what ``CLIFFLAB_SCRATCH`` names, else a
            temporary folder. No two processes share a mirror.

    Raises:
        OutputError: It is no address of an output, holds a credential, or nothing reaches it.
    """
    root, address = local_root(out, name), address_of(out, name)
    if root is not None:
        return LocalStore(root)
    return MirrorStore(address, Scratch(address, name, scratch))
