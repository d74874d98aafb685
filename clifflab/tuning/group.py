"""The workers that train together, as one of them sees them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from clifflab.artifacts import output_error
from clifflab.errors import ClifflabError, InputError

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
    try:
        scratch.mkdir(parents=True)
        write(scratch)
        if place.exists():
            shutil.rmtree(place)
        os.replace(scratch, place)
    except OSError as error:
        raise output_error(place, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def together(group: Group, work: Callable[[], None], device: torch.device) -> None:
    """Let the first worker do something alone; if it fails, all fail, so that none waits for the others for ever.

    Raises:
        ClifflabError: What the first worker met; the others name the first.
    """
    failure: ClifflabError | None = None
    if group.rank == 0:
        try:
            work()
        except ClifflabError as error:
            failure = error
    if float(group.total(torch.tensor(float(failure is not None), device=device))):
        raise failure or InputError("worker", group.rank, "the first worker could not go on", "see its message")
