"""Records of JSONL and CSV files: where each begins, and what it holds.

Reading may begin at any record's first byte and sees the same records as reading from the start. A record longer than
:data:`LONGEST` is not held in memory.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from clifflab.data.files import open_quote
from clifflab.errors import InputError
from clifflab.scoring.filesystems import FIELD
from clifflab.scoring.sources import open_source
from clifflab.scoring.types import WRONG_TYPE, Source

LONGEST = 64 << 20  # bytes of a row
_BOM = b"\xef\xbb\xbf"
_ENDS = b"\r\n"
_CHUNK = 1 << 20  # bytes of a CSV file that are divided into lines together
# From within a quoted field to the end of the last that is entered: a quote is one of two, or what follows it leads to
# the next field that begins with one.
_QUOTED = re.compile(rb'[^"]*+(?:"(?:"|[^,]*+(?:,(?!")[^,]*+)*+,")[^"]*+)*+')
Made = tuple[dict[str, Any] | None, str, str]  # record, reason, detail


class Item(NamedTuple):
    """A record of a text file before it is parsed: where it begins, and its line, or its fields.

    Of a record that cannot be read there is a sentence (CSV), or ``None`` (JSONL: too long).
    """

    position: int
    raw: Any


class TextReader:
    """Records of a JSONL or CSV file from any record's first byte on.

    Args:
        source: The file.
        offset: Where to begin.

    Raises:
        InputError: The header of a CSV file cannot be read.
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
            if header and isinstance(header.raw, str):
                self.close()
                raise InputError(FIELD, self._source.path, f"the header: {header.raw}", "mend or leave out the file")
            self._header = list(header.raw) if header else []
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


class _TooLong(Exception):  # noqa: N818 - a signal between two functions
    """The record at hand is longer than :data:`LONGEST`."""


class _Pieces:
    """Lines of a CSV file as text, for ``csv.reader``, which asks for one more as long as a quote is open.

    Bytes that are no UTF-8 become lone surrogates. A line ends with ``\\n``, ``\\r`` or both, wherever reading began.

    Attributes:
        position: The byte behind the lines given.
        ended: Whether one more line was asked for than there are.
        lines: Lines of the record at hand.
    """

    def __init__(self, handle: BinaryIO, position: int) -> None:
        self.position, self.ended = position, False
        self._parts = _parts(handle)
        self.begin()

    def begin(self) -> None:
        """A new record begins here."""
        self.lines, self._start = 0, self.position

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> str:
        first, taken = not self.position, list[bytes]()
        for part in self._parts:
            self.position += len(part)
            taken.append(part)
            if self.position - self._start > LONGEST:
                self._skip(taken)
                raise _TooLong
            if part[-1] in _ENDS:
                break
        if not taken:
            self.ended = True
            raise StopIteration
        self.lines += 1
        line = taken[0] if len(taken) == 1 else b"".join(taken)
        if first and line.startswith(_BOM):
            line = line[len(_BOM) :]
        return line.decode("utf-8", "surrogateescape")

    def _skip(self, taken: list[bytes]) -> None:
        """Pass over the rest of a record, of whose last line the parts are taken."""
        part = b"".join(taken)
        if self.position == len(part) and part.startswith(_BOM):
            part = part[len(_BOM) :]
        state = _after(part, "quoted" if self.lines else "start")
        while state == "quoted" or part[-1] not in _ENDS:
            if not (part := next(self._parts, b"")):
                return
            self.position += len(part)
            state = _after(part, state)


def _parts(handle: BinaryIO) -> Iterator[bytes]:
    """Lines, of which long ones come in parts."""
    held = b""
    while chunk := handle.readline(_CHUNK):
        if not held and b"\r" not in chunk:
            yield chunk
            continue
        chunk = held + chunk
        # Whether a line break ends here, or is halved, shows in what follows.
        held = b"\r" if chunk.endswith(b"\r") else b""
        yield from chunk[: len(chunk) - len(held)].splitlines(keepends=True)
    if held:
        yield held


def _after(part: bytes, state: str) -> str:
    """Where in a record a part of a line ends, as ``csv.reader`` sees it.

    Args:
        part: The part; may end with its line's break, and holds no other.
        state: Where it begins: at the ``start`` of a field, in a ``plain`` or ``quoted`` one, or at a ``quote`` within
            the latter, which closes it unless it is one of two.
    """
    at = 0
    while at < len(part):
        if state == "quoted":
            found = _QUOTED.match(part, at)
            assert found
            at = found.end() + 1
            state = "quote" if found.end() < len(part) else "quoted"
        elif part.startswith(b'"', at) and state != "plain":
            state, at = "quoted", at + 1
        else:  # on to the next field that begins with a quote
            found_at = part.find(b',"', at)
            if found_at < 0:
                return "start" if part.endswith(b",") else "plain"
            state, at = "start", found_at + 1
    return state


def _csv_items(handle: BinaryIO, position: int) -> Iterator[Item]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))  # never reached: records are shorter
    pieces = _Pieces(handle, position)
    reader = csv.reader(pieces)
    while True:
        pieces.begin()
        start = pieces.position
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _TooLong:
            yield Item(start, f"row is longer than {LONGEST >> 20} MiB")
            continue
        except csv.Error:
            yield Item(start, "row is no CSV")
            continue
        if pieces.ended:
            yield Item(start, open_quote(pieces.lines))
        elif fields:
            yield Item(start, fields)


def _csv_record(header: list[str], fields: list[str] | str) -> Made:
    if isinstance(fields, str):
        return None, "undecodable", fields
    if len(fields) > len(header) and any(field.strip() for field in fields[len(header) :]):
        return None, "undecodable", f"row has {len(fields)} fields where the header has {len(header)}"
    record: dict[str, Any] = dict(zip(header, fields, strict=False))
    for name in header[len(fields) :]:
        record[name] = None
    return record, "", ""
