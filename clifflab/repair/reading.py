"""Reading Parquet files of any size batch by batch, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from clifflab.errors import InputError

T = TypeVar("T")
BATCH, PIECE = 65_536, 250_000  # rows


class Reader(Protocol):
    """Reads files and reduces their batches: :func:`read_here` in this process, the runtime over Ray."""

    def __call__(self, files: Sequence[str], columns: Sequence[str], reduce: Callable[[pa.Table], T]) -> Iterator[T]:
        """What ``reduce`` makes of each batch of the files, in any order; columns that a file lacks are left out."""
        ...


def read_here(files: Sequence[str], columns: Sequence[str], reduce: Callable[[pa.Table], T]) -> Iterator[T]:
    """Read and reduce in this process, batch after batch.

    Raises:
        InputError: A file is no whole Parquet file.
    """
    return (reduce(batch) for file in files for piece in pieces_of(file) for batch in read_piece(piece, columns))


@dataclass(frozen=True)
class Piece:
    """Row groups of a file that are read together."""

    file: str
    groups: tuple[int, ...]


def pieces_of(file: str) -> list[Piece]:
    """A file in pieces of about :data:`PIECE` rows, in order.

    Raises:
        InputError: It is no whole Parquet file.
    """
    try:
        about = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None
    pieces, groups, rows = list[Piece](), list[int](), 0
    for group in range(about.num_row_groups):
        groups.append(group)
        rows += about.row_group(group).num_rows
        if rows >= PIECE or group == about.num_row_groups - 1:
            pieces.append(Piece(file, tuple(groups)))
            groups, rows = [], 0
    return pieces


def read_piece(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of a piece; columns that the file lacks are left out.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with pq.ParquetFile(piece.file, pre_buffer=False) as table:
            there = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(BATCH, row_groups=list(piece.groups), columns=there):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(piece.file, error) from None


def schema_of(file: str) -> pa.Schema:
    """Columns of a Parquet file.

    Raises:
        InputError: It is none.
    """
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def rows_of(file: str) -> int:
    """Rows of a Parquet file.

    Raises:
        InputError: It is none.
    """
    return sum(
        pq.read_metadata(piece.file).row_group(group).num_rows for piece in pieces_of(file) for group in piece.groups
    )


def _damaged(file: str, error: Exception) -> InputError:
    return InputError("file", file, f"is not a whole Parquet file ({error})", "write or copy it again")
