"""The workers that train together, as one of them sees them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from clifflab.artifacts import output_error, remove
from clifflab.errors import ClifflabError

WriteFolder = Callable[[Path], None]


class Group(Protocol):
    """Workers that train together.

    Attributes:
        rank: Which one this is, from 0; 0 writes files.
        size: How many there are.
    """

    rank: int
    size: int

    def wrap(self, model: Any) -> Any:
        """The model, called as before; its gradients become the mean over all workers."""
        ...

    def apart(self, wrapped: Any) -> AbstractContextManager[Any]:
        """Within it, gradients add up in each worker alone."""
        ...

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all workers; each gives one of the same shape."""
        ...

    def save(self, write: WriteFolder, step: int) -> None:
        """Keep a checkpoint, which replaces those before; every worker calls it and the first one writes."""
        ...

    def restore(self) -> Path | None:
        """Folder of the last whole checkpoint."""
        ...


class Alone:
    """One worker.

    Args:
        folder: Where its checkpoints go; none are kept without one.
    """

    rank = 0
    size = 1

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def wrap(self, model: Any) -> Any:
        """The model as it is."""
        return model

    def apart(self, wrapped: Any) -> AbstractContextManager[Any]:
        """Nothing to keep apart."""
        return nullcontext()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The values as they are."""
        return values

    def save(self, write: WriteFolder, step: int) -> None:
        """Write a checkpoint beside its place, rename it, and delete those before."""
        if self._folder is None:
            return
        before = self._checkpoints()
        place = self._folder / f"checkpoint-{step:08d}"
        write_folder(place, write)
        for folder in before:
            if folder != place:
                shutil.rmtree(folder, ignore_errors=True)

    def restore(self) -> Path | None:
        """The checkpoint of the latest step."""
        found = self._checkpoints()
        return found[-1] if found else None

    def _checkpoints(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*")) if self._folder and self._folder.is_dir() else []


def write_folder(place: Path, write: WriteFolder) -> None:
    """Let ``write`` fill a new folder, which then takes its place, whatever was there before.

    Raises:
        OutputError: The disk is full or cannot be written.
    """
    scratch = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    with writing(place):
        remove(scratch)  # of a process that had this number and was killed
        scratch.mkdir(parents=True)
        try:
            write(scratch)
            for file in scratch.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            remove(place)
            os.replace(scratch, place)
        finally:
            remove(scratch)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Errors of writing weights, as one line with a remedy: safetensors has a kind of its own for a full disk."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise output_error(place, error) from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise output_error(place, OSError(int(code[1]), os.strerror(int(code[1])))) from error


class FirstWorkerError(ClifflabError):
    """Raised in the other workers when the first one could not go on; what it met is the error to show."""


def together(group: Group, work: Callable[[], None], device: torch.device) -> None:
    """Let the first worker do something alone; if it fails, all fail, so that none waits for the others for ever.

    Raises:
        FirstWorkerError: In the others; the first raises what it met.
    """
    failure: Exception | None = None
    if group.rank == 0:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised again once the others know
            failure = error
    if float(group.total(torch.tensor(float(failure is not None), device=device))):
        raise failure or FirstWorkerError("the first worker could not go on: see its message")
