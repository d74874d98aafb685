"""Records of JSONL and CSV files: where each begins, and what it holds.

Reading may begin at any record's first byte and sees the same records as reading from the start. A record longer than
:data:`LONGEST` is not held in memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from clifflab.scoring.sources import open_source
from clifflab.scoring.types import WRONG_TYPE, Source

LONGEST = 64 << 20  # bytes of a row
_BOM = b"\xef\xbb\xbf"
Made = tuple[dict[str, Any] | None, str, str]  # record, reason, detail


class Item(NamedTuple):
    """A record of a text file before it is parsed: where it begins, and its line or fields (``None``: too long)."""

    position: int
    raw: Any


class TextReader:
    """Records of a JSONL or CSV file from any record's first byte on.

    Args:
        source: The file.
        offset: Where to begin.
    """

    def __init__(self, source: Source, offset: int = 0) -> None:
        self._source = source
        self._handle = open_source(source)
        self._header: list[str] = []
        self._items = self._from(0)
        if offset:
            self.seek(offset)

    def seek(self, offset: int) -> None:
        """Go to a record of a file that is not compressed."""
        self._handle.seek(offset)
        self._items = self._from(offset)

    def _from(self, position: int) -> Iterator[Item]:
        if self._source.kind == "jsonl":
            return _lines(self._handle, position)
        items = _csv_items(self._handle, position)
        if not position:
            header = next(items, None)
            self._header = list(header.raw or ()) if header else []
        return items

    @property
    def header(self) -> list[str]:
        """Names of the columns of a CSV file; none of a file without a line."""
        return self._header

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def items(self) -> Iterator[Item]:
        """Records from here on, unparsed."""
        return self._items

    def made(self, raw: Any) -> Made:
        """Parse a record."""
        return parse_line(raw) if self._source.kind == "jsonl" else _csv_record(self._header, raw)


def _lines(handle: BinaryIO, position: int) -> Iterator[Item]:
    """Lines that are not blank."""
    while line := handle.readline(LONGEST):
        start, position = position, position + len(line)
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while rest := handle.readline(LONGEST):
                position += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield Item(start, None)
            continue
        if not start and line.startswith(_BOM):
            line = line[len(_BOM) :]
        if line.strip():
            yield Item(start, line)


def parse_line(line: bytes | None) -> Made:
    """The record of a line of JSON."""
    if line is None:
        return None, "undecodable", f"line is longer than {LONGEST >> 20} MiB"
    try:
        text = line.decode()
        record = json.loads(text[1:] if text[0] == "\ufeff" else text)
    except (ValueError, RecursionError) as error:
        return None, "undecodable", f"line cannot be decoded ({error.__class__.__name__})"
    if not isinstance(record, dict):
        return None, WRONG_TYPE, f"row is no object but {type(record).__name__}"
    return record, "", ""


class _Pieces:
    """Lines of a CSV file as text, and how many bytes they took; bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, handle: BinaryIO, position: int) -> None:
        self.position = position
        self._pieces = self._split(handle)

    def _split(self, handle: BinaryIO) -> Iterator[bytes]:
        while line := handle.readline(LONGEST):
            if b"\r" in line:  # some files end lines with it alone
                yield from line.splitlines(keepends=True)
            else:
                yield line

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        first = not self.position
        self.position += len(piece)
        if first and piece.startswith(_BOM):
            piece = piece[len(_BOM) :]
        return piece.decode("utf-8", "surrogateescape")


def _csv_items(handle: BinaryIO, position: int) -> Iterator[Item]:
    csv.field_size_limit(LONGEST)
    pieces = _Pieces(handle, position)
    reader = csv.reader(pieces)
    while True:
        start = pieces.position
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield Item(start, None)
            continue
        if fields:
            yield Item(start, fields)


def _csv_record(header: list[str], fields: list[str] | None) -> Made:
    if fields is None:
        return None, "undecodable", f"row is no CSV, or has a field longer than {LONGEST >> 20} MiB"
    if len(fields) > len(header) and any(field.strip() for field in fields[len(header) :]):
        return None, "undecodable", f"row has {len(fields)} fields where the header has {len(header)}"
    record: dict[str, Any] = dict(zip(header, fields, strict=False))
    for name in header[len(fields) :]:
        record[name] = None
    return record, "", ""
