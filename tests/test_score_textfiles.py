"""Records of CSV files that are broken: quotes without an end, rows without an end, line breaks of every kind."""

from __future__ import annotations

import csv
import gzip
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clifflab.data.files import iter_rows
from clifflab.errors import InputError
from clifflab.scoring import textfiles
from tests.test_score_reading import read_all, records

LONG = 100


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "LONGEST", LONG)
    monkeypatch.setattr(textfiles, "_CHUNK", 16)


def row(*values: str) -> dict[str, str]:
    return dict(zip(("id", "prompt", "response"), values, strict=True))


def everywhere(path: Path, data: bytes) -> list[Any]:
    """Records of a file, the same in blocks of any size and packed."""
    path.write_bytes(b"id,prompt,response\n" + data)
    found = records(read_all(path))
    for block_rows in (1, 2, 5):
        assert records(read_all(path, block_rows=block_rows)) == found
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert records(read_all(path.with_suffix(".csv.gz"), block_rows=2)) == found
    return found


def test_a_quote_that_never_closes(tmp_path: Path) -> None:
    """What follows is no part of a good row."""
    path = tmp_path / "a.csv"
    good = b"a,p,r\n"
    for data, lines in (
        (b'b,ask,"I said\nc,p,r\nd,p,r\n', 3),
        (b'b,ask,"', 1),
        (b'b,"x"",y\r\n\r\n', 2),
        (b'b,"a"\n"\n', 1),
    ):
        whole = [row("b", "a", "")][:0] if b'"a"' not in data else [{"id": "b", "prompt": "a", "response": None}]
        assert everywhere(path, good + data) == [row("a", "p", "r"), *whole, "undecodable"]
        assert f"never closed, and takes in the last {lines} line" in read_all(path)[-1].detail
        studied = list(iter_rows("prompts.0.path", str(path)))
        assert [record for _, record, _ in studied] == [row("a", "p", "r"), *whole, None]
        assert (studied[-1][0], studied[-1][2]) == (len(whole) + 1, read_all(path)[-1].detail)
    for data in (b'a,p,"r"', b'a,p,"r"\n', b'a,p,"r"\n\n', b"a,p,r"):  # a last line without a break is whole
        assert everywhere(path, data) == [row("a", "p", "r")] == [r[1] for r in iter_rows("f", str(path))]
    path.write_bytes(b'id,"prompt\na,b\n')
    for read in (lambda: read_all(path), lambda: list(iter_rows("--input", str(path)))):
        with pytest.raises(InputError, match=r"--input: .*a.csv: .*quote is opened and never closed.* last 2 lines"):
            read()


@pytest.mark.usefixtures("short")
def test_a_row_beyond_memory_is_one_bad_row(tmp_path: Path) -> None:
    path, after = tmp_path / "a.csv", b'b,"p,\n2",r\n'
    for long in (
        b"a," + b"z" * 500 + b",x\n",
        b"a," + b"z," * 200 + b"x\n",
        b'a,"' + b"line of it\n" * 50 + b'",x\n',
        b'a,"' + b'line of ""it"",\r' * 50 + b'",x\r',
        b'a,"' + b'""' * 200 + b'\n",x\r\n',
        b'a,"' + b"z" * 200 + b'"z"\n',
        b"a," + b"z" * 200 + b'"\n',
        b'"' + b"z" * 200 + b'","\n"\n',
        b"a," + b'"z\n",' * 50 + b'"\r\n"\n',
    ):
        good = row("b", "p,\n2", "r")
        assert everywhere(path, long + after) == ["undecodable", good], long
        assert everywhere(path, after + long + long + after) == [good, "undecodable", "undecodable", good]
        assert everywhere(path, after + long[:-1]) == [good, "undecodable"]
        assert "longer than" in read_all(path)[-1].detail
    assert everywhere(path, after + b'a,"' + b"z\n" * 500 + after.replace(b'"', b"")) == [
        row("b", "p,\n2", "r"),
        "undecodable",
    ]
    exact = b"a," + b"z" * (LONG - 5) + b",x"
    assert everywhere(path, exact + b"\n" + after) == [row("a", "z" * (LONG - 5), "x"), row("b", "p,\n2", "r")]
    assert everywhere(path, exact + b"\r\n" + after) == ["undecodable", row("b", "p,\n2", "r")]
    numbers = [row(str(n), f"prompt{n}", f"response{n}") for n in range(60)]
    data = b"\r".join(",".join(r.values()).encode() for r in numbers)
    assert everywhere(path, data) == everywhere(path, data + b"\r") == numbers
    path.write_bytes(b"id," + b"prompt," * 30 + b"response\na,p,r\n")
    with pytest.raises(InputError, match=r"the header: row is longer than"):
        read_all(path)


def plain(data: bytes, longest: int) -> Iterator[Any]:
    """The same records by ``csv.reader`` over the whole file."""
    lines = re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", data)
    asked = 0

    def given() -> Iterator[str]:
        nonlocal asked
        for line in lines:
            asked += 1
            yield line.decode("utf-8", "surrogateescape")
        asked += 1

    begun = 0
    for fields in csv.reader(given()):
        size = sum(map(len, lines[begun:asked]))
        if fields:
            more = any(field.strip() for field in fields[2:])
            yield "undecodable" if size > longest or asked > len(lines) or more else fields[:2]
        begun = asked


BITS = st.sampled_from(
    [b"\n", b"\r", b"\r\n", b'"', b'"', b",", b",", b"a", b" ", b'""', b'",', b',"', b"bcd", b"\xff", b"\0"]
)


@given(st.lists(BITS, max_size=40).map(b"".join), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_records_are_those_of_the_whole_file(data: bytes, chunk: int, block_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "LONGEST", 9)
        patch.setattr(textfiles, "_CHUNK", chunk)
        path = Path(folder) / "a.csv"
        path.write_bytes(b"\xef\xbb\xbfa,b\n" + data)
        found = read_all(path)
        shown = [r.reason or [v for v in (r.record or {}).values() if v is not None] for r in found]
        assert shown == list(plain(data, 9))
        assert read_all(path, block_rows=block_rows) == found


def test_long_rows_are_passed_over_quickly() -> None:
    for bit in (b"z", b'""', b",", b'","', b'z""', b'",z,"', b',z"z'):
        began = time.process_time()
        textfiles._after(bit * (1 << 20), "quoted")
        assert time.process_time() - began < 5
