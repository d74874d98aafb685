"""Rows of a source: what stands there, broken or not.

A broken line is a row with a reason and not the end of the run; a file that is broken as a whole is an error. Lines of
white space are no rows, as in :mod:`clifflab.data.files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clifflab.errors import InputError
from clifflab.scoring.filesystems import FIELD, locate, reading, scheme_of
from clifflab.scoring.sources import check_unchanged
from clifflab.scoring.textfiles import TextReader
from clifflab.scoring.types import Block, RawRow, Source

_BATCH = 2048  # rows that are turned into records together


def read_unit(
    source: Source, blocks: Sequence[Block], columns: Sequence[str] | None = None
) -> Iterator[tuple[Block, list[RawRow]]]:
    """Read blocks of a source in one go.

    Args:
        source: Where they lie.
        blocks: Some of its blocks, in their order; what lies between them is passed over.
        columns: Which columns matter (of Parquet files and datasets, where the others need not be read); default all.

    Yields:
        Each block with its rows: as many as it says, numbered within the source.

    Raises:
        InputError: The source is damaged as a whole, or has changed since it was indexed.
    """
    check_unchanged(source)
    with reading(source.path):
        if source.kind == "parquet":
            yield from _read_parquet(source, blocks, columns)
        elif source.kind in ("saved", "hub"):
            yield from _read_dataset(source, blocks, columns)
        else:
            yield from _read_text(source, blocks)


def _read_text(source: Source, blocks: Sequence[Block]) -> Iterator[tuple[Block, list[RawRow]]]:
    text = TextReader(source, blocks[0].offset)
    try:
        row = blocks[0].offset_row
        for block in blocks:
            if block.offset_row > row:
                text.seek(block.offset)
                row = block.offset_row
            items, made, rows = text.items(), text.made, list[RawRow]()
            for item in items if block.rows else ():
                if row >= block.start:
                    rows.append(RawRow(row, *made(item[1])))
                row += 1
                if row == block.stop:
                    break
            yield block, _whole(source, block, rows)
    finally:
        text.close()


def _whole(source: Source, block: Block, rows: list[RawRow]) -> list[RawRow]:
    if len(rows) != block.rows:
        raise InputError(FIELD, source.path, "has changed since it was indexed", "leave the input as it is, run again")
    return rows


@contextmanager
def open_parquet(source: Source) -> Iterator[pq.ParquetFile]:
    """A Parquet file, read in small steps.

    Raises:
        InputError: It is no whole Parquet file.
    """
    try:
        filesystem, path = locate(source.path)
        handle = filesystem.open_input_file(path) if scheme_of(source.path) else path
        with pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False) as table:
            yield table
    except (pa.ArrowInvalid, EOFError) as error:
        raise InputError(
            FIELD, source.path, f"is not a whole Parquet file ({error})", "write or copy it again"
        ) from None


def _read_parquet(
    source: Source, blocks: Sequence[Block], columns: Sequence[str] | None
) -> Iterator[tuple[Block, list[RawRow]]]:
    with open_parquet(source) as table:
        about, names = table.metadata, table.schema_arrow.names
        wanted = None if columns is None else [name for name in names if name in set(columns)]
        for offset, run in groupby(blocks, key=lambda block: block.offset):
            here = list(run)
            groups, row = [offset], here[0].offset_row
            while row + sum(about.row_group(group).num_rows for group in groups) < here[-1].stop:
                groups.append(groups[-1] + 1)
                if groups[-1] >= about.num_row_groups:
                    _whole(source, here[-1], [])
            batches = table.iter_batches(_BATCH, row_groups=groups, columns=wanted, use_threads=False)
            yield from _cut(source, here, row, batches)


def _cut(
    source: Source, blocks: Sequence[Block], row: int, batches: Iterator[Any]
) -> Iterator[tuple[Block, list[RawRow]]]:
    """Batches from row ``row`` on, as blocks."""
    batch, first = None, row  # the batch at hand and the row that it begins with
    for block in blocks:
        rows = list[RawRow]()
        at = block.start
        while at < block.stop:
            while batch is None or first + batch.num_rows <= at:
                first += batch.num_rows if batch is not None else 0
                batch = next(batches, None)
                if batch is None:
                    _whole(source, block, rows)
                    return
            taken = min(block.stop, first + batch.num_rows) - at
            rows += raw_rows(batch.slice(at - first, taken), at)
            at += taken
        yield block, rows


def raw_rows(batch: Any, row: int) -> list[RawRow]:
    """Rows of an Arrow batch or table, the first of which is ``row``; bytes that are no text break one row alone."""
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except (ValueError, OverflowError):
        return [_row_alone(batch.slice(place, 1), row + place) for place in range(batch.num_rows)]
    if not names:
        return [RawRow(row + place, {}) for place in range(batch.num_rows)]
    return [
        RawRow(number, dict(zip(names, values, strict=True)))
        for number, values in enumerate(zip(*columns, strict=True), row)
    ]


def _row_alone(batch: Any, row: int) -> RawRow:
    try:
        return RawRow(row, {name: batch.column(place)[0].as_py() for place, name in enumerate(batch.schema.names)})
    except (ValueError, OverflowError) as error:
        return RawRow(row, None, "undecodable", f"row cannot be decoded ({error.__class__.__name__})")


def _read_dataset(
    source: Source, blocks: Sequence[Block], columns: Sequence[str] | None
) -> Iterator[tuple[Block, list[RawRow]]]:
    data = open_dataset(source)
    if columns is not None:
        data = data.select_columns([name for name in data.column_names if name in set(columns)])
    for block in blocks:
        rows = raw_rows(data[block.start : block.stop], block.start) if block.rows else []
        yield block, _whole(source, block, rows)


def columns_in(source: Source) -> list[str] | None:
    """Columns of a source, from its schema or header alone; rows are not read.

    Returns:
        Names in their order; ``None`` where they are each row's own matter (JSONL), or there is no row to have any.

    Raises:
        InputError: The source cannot be read.
    """
    with reading(source.path):
        if source.kind == "parquet":
            with open_parquet(source) as table:
                return list(table.schema_arrow.names) if table.metadata.num_rows else None
        if source.kind == "csv":
            text = TextReader(source)
            try:
                return text.header if next(text.items(), None) else None
            finally:
                text.close()
        if source.kind == "saved":
            data = open_dataset(source)
            return list(data.column_names) if len(data) else None
    return None


def open_dataset(source: Source) -> Any:
    """A saved or hub dataset that gives Arrow tables; a hub dataset is fetched once and kept in the local cache.

    Raises:
        InputError: It cannot be loaded.
    """
    return _dataset(source).with_format("arrow")


@lru_cache(maxsize=4)
def _dataset(source: Source) -> Any:
    import datasets

    if source.kind == "saved":
        load, remedy = partial(datasets.load_from_disk, source.path), "give a file, or one split saved"
    else:
        name, _, split = source.name.partition(":")
        load = partial(datasets.load_dataset, name, split=split or "train", revision=source.changed or None)
        remedy = "check its name and split, log in if it is gated"
    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(FIELD, source.path, f"cannot be loaded ({error})", remedy) from None
