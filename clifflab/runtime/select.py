"""Reading and reducing tables over Ray Data: batches are reduced where they are read, and only what remains travels."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import pyarrow as pa

from clifflab.config import RuntimeConfig
from clifflab.errors import ClifflabError
from clifflab.repair.files import BATCH, read_here, schema_of

T = TypeVar("T")
_PART = "part"
_SMALL = 32 << 20  # bytes of files that are read here: a task costs more time than they do


class RayReader:
    """A :class:`~clifflab.repair.files.Reader` over Ray, which it starts for the first large table and ends at the end.

    Args:
        settings: How Ray is started.
        small: Bytes of files that are read in this process.
    """

    def __init__(self, settings: RuntimeConfig, small: int = _SMALL) -> None:
        self._settings, self._small = settings, small
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def __call__(self, files: Sequence[str], columns: Sequence[str], reduce: Callable[[pa.Table], T]) -> Iterator[T]:
        """What ``reduce`` makes of each batch, in any order."""
        if sum(os.stat(file).st_size for file in files) <= self._small:
            return read_here(files, columns, reduce)
        from clifflab.runtime.local import start_ray

        self._started |= start_ray(self._settings)
        return _read(files, columns, reduce)


def _read(files: Sequence[str], columns: Sequence[str], reduce: Callable[[pa.Table], T]) -> Iterator[T]:
    """Read files as a Ray Dataset and reduce its batches in the tasks that read them.

    A reduced batch comes back as one row that holds it as bytes, so that whatever ``reduce`` makes can be carried.

    Raises:
        ClifflabError: What ``reduce`` raised of its own.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = set(schema_of(files[0]).names)

    def pack(batch: pa.Table) -> pa.Table:
        return pa.table({_PART: pa.array([pickle.dumps(reduce(batch))], pa.large_binary())})

    read: Any = ray.data.read_parquet(list(files), columns=[name for name in columns if name in there])
    packed = read.map_batches(pack, batch_size=BATCH, batch_format="pyarrow", zero_copy_batch=True)
    try:
        for row in packed.iter_rows():
            yield pickle.loads(row[_PART])  # noqa: S301 - written by pack, in a process of this run
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClifflabError):
            raise error.cause from None
        raise
