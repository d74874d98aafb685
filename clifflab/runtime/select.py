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
from clifflab.repair.reading import pieces_of, read_here, read_piece

T = TypeVar("T")
_PART = "part"
_SMALL = 32 << 20  # bytes of files that are read here: a task costs more time than they do


class RayReader:
    """A :class:`~clifflab.repair.reading.Reader` over Ray, which starts with the first large table.

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
            from clifflab.runtime.local import stop_ray

            stop_ray()

    def __call__(self, files: Sequence[str], columns: Sequence[str], reduce: Callable[[pa.Table], T]) -> Iterator[T]:
        """What ``reduce`` makes of each batch, in any order."""
        if sum(os.stat(file).st_size for file in files) <= self._small:
            return read_here(files, columns, reduce)
        from clifflab.runtime.local import start_ray

        self._started |= start_ray(self._settings)
        return _read(files, columns, reduce)


def _read(files: Sequence[str], columns: Sequence[str], reduce: Callable[[pa.Table], T]) -> Iterator[T]:
    """Reduce the batches of files in the tasks of a Ray Dataset, whose rows are the pieces of the files.

    Each task reads its piece batch by batch: Ray's own Parquet reader packs small files into one task and reads far
    ahead, which costs half a gigabyte a worker. A reduced batch comes back as a row that holds it as bytes, so that
    whatever ``reduce`` makes can be carried; so does a user's mistake, since Ray would print all of its stack for one.

    Raises:
        ClifflabError: What ``reduce`` raised of its own.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    pieces = [piece for file in files for piece in pieces_of(file)]

    if not pieces:
        return

    def pack(rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number in rows["piece"].tolist():
            try:
                for batch in read_piece(pieces[number], columns):
                    yield {_PART: [pickle.dumps(reduce(batch))]}
            except ClifflabError as error:
                yield {_PART: [pickle.dumps(error)]}

    numbers: Any = ray.data.from_items([{"piece": n} for n in range(len(pieces))], override_num_blocks=len(pieces))
    for row in numbers.map_batches(pack, batch_size=1).iter_rows():
        found = pickle.loads(row[_PART])  # noqa: S301 - written by pack, in a process of this run
        if isinstance(found, ClifflabError):
            raise found
        yield found
