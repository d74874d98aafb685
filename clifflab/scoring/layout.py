"""How the input is divided: rows of each source, blocks of rows, and the runs of blocks that are read in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from clifflab.scoring.filesystems import reading
from clifflab.scoring.ids import NO_ID, as_array, derived_id, hash_id, hash_of
from clifflab.scoring.reading import open_dataset, open_parquet, raw_rows
from clifflab.scoring.textfiles import TextReader
from clifflab.scoring.types import Block, Source

BLOCK_BYTES = 8 << 20  # of text in a block, at most about this much (a single row may be longer)
_RUNS = 8  # a file that must be read from its start, or a row group, is divided into this many runs at most
_SHORTEST_RUN = 16  # blocks
_BATCH = 8192  # rows of ids read together


@dataclass(frozen=True)
class SourceIndex:
    """What is known of a source before its rows are read.

    Attributes:
        rows: How many rows it has.
        marks: Where its blocks begin ``[B, 3]``: the row, the place where reading begins (as in
            :class:`~clifflab.scoring.types.Block`), and the row that stands there.
        ids: Hashes of the rows' ids ``[rows, 2]`` (:func:`clifflab.scoring.ids.as_array`; zeros: unreadable);
            ``None`` where no row brings one, so that all are derived.
    """

    rows: int
    marks: np.ndarray
    ids: np.ndarray | None


def index_source(
    source: Source,
    id_column: str | None = "id",
    block_rows: int = 1000,
    block_bytes: int = BLOCK_BYTES,
    max_rows: int | None = None,
) -> SourceIndex:
    """Count a source's rows, find where its blocks begin, and hash its rows' ids.

    Memory: 16 bytes a row that brings an id. Of a Parquet file the id column alone is read.

    Args:
        source: The source.
        id_column: Column of ids; ``None``: all ids are derived, and lines are counted without being parsed.
        block_rows: Rows of a block, at most.
        block_bytes: Bytes of a block, about: fewer rows where they are long.
        max_rows: Stop after this many.

    Raises:
        InputError: The source cannot be read, or is damaged as a whole.
    """
    with reading(source.path):
        if source.kind == "parquet":
            return _index_parquet(source, id_column, block_rows, block_bytes, max_rows)
        if source.kind in ("saved", "hub"):
            return _index_dataset(source, id_column, block_rows, block_bytes, max_rows)
        return _index_text(source, id_column, block_rows, block_bytes, max_rows)


def _index_text(
    source: Source, id_column: str | None, block_rows: int, block_bytes: int, max_rows: int | None
) -> SourceIndex:
    text, ids = TextReader(source), _Ids(source.name)
    marks = list[tuple[int, int, int]]()
    row = begun = began = 0  # the block at hand: its first row and byte
    jumps = not source.compression
    try:
        for position, raw in text.items() if max_rows != 0 else ():
            if not marks or row - begun == block_rows or position - began >= block_bytes:
                begun, began = row, position
                marks.append((row, position, row) if jumps else (row, 0, 0))
            if id_column is not None:
                record = text.made(raw)[0]
                if record is None:
                    ids.unreadable()
                else:
                    ids.add(record.get(id_column))
            row += 1
            if row == max_rows:
                break
    finally:
        text.close()
    return SourceIndex(row, _marks(marks), ids.array() if id_column is not None else None)


def _index_parquet(
    source: Source, id_column: str | None, block_rows: int, block_bytes: int, max_rows: int | None
) -> SourceIndex:
    ids = _Ids(source.name)
    with open_parquet(source) as table:
        about = table.metadata
        rows = about.num_rows if max_rows is None else min(about.num_rows, max_rows)
        marks = list[tuple[int, int, int]]()
        first = open_rows = open_bytes = 0  # open: whole row groups since the last mark
        for number in range(about.num_row_groups):
            group = about.row_group(number)
            count, size = group.num_rows, group.total_byte_size
            if first >= rows or not count:
                continue
            step = _step(count, size, block_rows, block_bytes)
            if step < count:  # a large group is divided, evenly
                pieces = -(-count // step)
                marks += [(first + count * piece // pieces, number, first) for piece in range(pieces)]
                open_rows = block_rows
            elif open_rows + count > block_rows or open_bytes + size > block_bytes or not marks:
                marks.append((first, number, first))
                open_rows, open_bytes = count, size
            else:
                open_rows, open_bytes = open_rows + count, open_bytes + size
            first += count
        if id_column is not None and id_column in table.schema_arrow.names and rows:
            for batch in table.iter_batches(_BATCH, columns=[id_column], use_threads=False):
                ids.add_rows(batch.slice(0, rows - len(ids)), id_column)
                if len(ids) == rows:
                    break
    return SourceIndex(rows, _marks([mark for mark in marks if mark[0] < rows]), ids.array())


def _index_dataset(
    source: Source, id_column: str | None, block_rows: int, block_bytes: int, max_rows: int | None
) -> SourceIndex:
    data, ids = open_dataset(source), _Ids(source.name)
    rows = len(data) if max_rows is None else min(len(data), max_rows)
    step = _step(len(data), source.size or data.dataset_size or 0, block_rows, block_bytes)
    if id_column is not None and id_column in data.column_names:
        column = data.select_columns([id_column])
        for start in range(0, rows, _BATCH):
            ids.add_rows(column[start : min(start + _BATCH, rows)], id_column)
    return SourceIndex(rows, _marks([(row, 0, 0) for row in range(0, rows, step)]), ids.array())


def _step(rows: int, size: int, block_rows: int, block_bytes: int) -> int:
    """Rows of a block by their mean size."""
    return max(1, min(block_rows, block_bytes * rows // max(size, 1)))


def _marks(marks: list[tuple[int, int, int]]) -> np.ndarray:
    return np.asarray(marks, dtype=np.int64).reshape(-1, 3)


class _Ids:
    """Hashes of a source's ids as they are read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._hashes = bytearray()
        self._rows = 0
        self._own = False  # whether any row brought an id

    def __len__(self) -> int:
        return self._rows

    def add(self, value: object) -> None:
        self._own |= value is not None
        self._hashes += hash_of(value, self._name, self._rows)
        self._rows += 1

    def unreadable(self) -> None:
        self._hashes += NO_ID
        self._rows += 1

    def add_rows(self, batch: object, column: str) -> None:
        for row in raw_rows(batch, 0):
            if row.record is None:
                self.unreadable()
            else:
                self.add(row.record[column])

    def array(self) -> np.ndarray | None:
        return as_array(self._hashes) if self._own else None


def id_arrays(sources: Sequence[Source], indexes: Sequence[SourceIndex]) -> Iterator[np.ndarray]:
    """Hashes of all rows' ids in the order of the input, for :func:`clifflab.scoring.ids.find_duplicates`.

    Derived ids are unique among themselves. They are hashed only where another source brings ids of its own, which
    could look like one.
    """
    if all(index.ids is None for index in indexes):
        return
    for source, index in zip(sources, indexes, strict=True):
        if index.ids is not None:
            yield index.ids
            continue
        for start in range(0, index.rows, _BATCH):
            rows = range(start, min(start + _BATCH, index.rows))
            yield as_array(b"".join(hash_id(derived_id(source.name, row)) for row in rows))


def plan_blocks(indexes: Sequence[SourceIndex], max_rows: int | None = None) -> list[Block]:
    """The blocks of the whole input, in its order.

    Args:
        indexes: Of the sources, in their order.
        max_rows: Leave out what comes behind this many rows of the whole input.
    """
    blocks, base = list[Block](), 0
    for source, index in enumerate(indexes):
        rows = index.rows if max_rows is None else min(index.rows, max_rows - base)
        starts = [*index.marks[:, 0].tolist(), index.rows]
        for (start, offset, offset_row), stop in zip(index.marks.tolist(), starts[1:], strict=True):
            if start >= rows:
                break
            blocks.append(Block(len(blocks), source, start, min(stop, rows), base, offset, offset_row))
        base += index.rows
    return blocks


def units_of(sources: Sequence[Source], blocks: Sequence[Block]) -> list[list[Block]]:
    """Runs of blocks that :func:`clifflab.scoring.reading.read_unit` reads in one go.

    A block of plain text or of a dataset stands alone. Blocks of one Parquet row group go together, as do those of a
    compressed file; long runs are divided, though each part is then read from the run's start, so that several workers
    share a single large file.

    Args:
        sources: The whole input.
        blocks: Some of its blocks, in their order.
    """
    units = list[list[Block]]()
    for (source, _), run in groupby(blocks, key=lambda block: (block.source, block.offset)):
        here = list(run)
        alone = sources[source].kind in ("saved", "hub")
        size = 1 if alone else max(_SHORTEST_RUN, -(-len(here) // _RUNS))
        units += [here[place : place + size] for place in range(0, len(here), size)]
    return units
