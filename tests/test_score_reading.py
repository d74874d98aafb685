"""Reading corpora: which files, which rows, which blocks, whatever stands in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from clifflab.cli import cli as commands
from clifflab.cli import organism
from clifflab.config import ModelSpec, PromptSet
from clifflab.config.score import ScoreConfig
from clifflab.data.files import iter_rows
from clifflab.errors import InputError, OutputError
from clifflab.models.loading import load_renderer
from clifflab.organism import malformed
from clifflab.organism.corpus import corpus_row
from clifflab.scoring import filesystems, reading, textfiles
from clifflab.scoring import ids as identities
from clifflab.scoring.ids import NO_ID, as_array, find_duplicates, hash_id, sampled
from clifflab.scoring.layout import SourceIndex, id_arrays, index_source, plan_blocks, units_of
from clifflab.scoring.prepare import Preparer
from clifflab.scoring.reading import columns_in, read_unit
from clifflab.scoring.sources import find_sources, would_read
from clifflab.scoring.types import Block, RawRow, Source
from tests.buckets import bucket

ROWS = [{"id": f"r{n}", "prompt": f"ask {n}", "thinking": "hm " * (n % 7), "response": None} for n in range(57)]


def jsonl(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(path: Path, rows: Sequence[dict[str, Any]], groups: Sequence[int]) -> None:
    table, start = pa.Table.from_pylist(list(rows)), 0
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in groups:
            writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
            start += size
    assert start == len(rows)


def laid_out(pattern: Path | str, **options: Any) -> tuple[list[Source], list[SourceIndex], list[Block]]:
    sources = find_sources(str(pattern))
    indexes = [index_source(source, **options) for source in sources]
    return sources, indexes, plan_blocks(indexes)


def read_all(pattern: Path | str, **options: Any) -> list[RawRow]:
    """Every row through blocks and units; checks that blocks tile the input."""
    sources, indexes, blocks = laid_out(pattern, **options)
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert all(0 < block.rows <= options.get("block_rows", 1000) for block in blocks)
    rows, base = list[RawRow](), 0
    for number, index in enumerate(indexes):
        own = [block for block in blocks if block.source == number]
        assert [block.start for block in own] == [0, *(block.stop for block in own)][: len(own)]
        assert (own[-1].stop if own else 0) == index.rows
        assert {block.base for block in own} <= {base}
        base += index.rows
    units = units_of(sources, blocks)
    assert [block for unit in units for block in unit] == blocks
    for unit in units:
        for block, found in read_unit(sources[unit[0].source], unit):
            assert [row.row for row in found] == list(range(block.start, block.stop))
            rows += found
    return rows


def records(rows: Sequence[RawRow]) -> list[Any]:
    return [row.reason or row.record for row in rows]


def put(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(data), None)[1]


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": put(jsonl(ROWS)),
    "a.jsonl.gz": put(gzip.compress(jsonl(ROWS[:20])) + gzip.compress(jsonl(ROWS[20:]))),
    "a.ndjson.zst": put(zstd(jsonl(ROWS[:20])) + zstd(jsonl(ROWS[20:]))),
    "a.parquet": lambda path: parquet(path, ROWS, [57]),
    "tiny.parquet": lambda path: parquet(path, ROWS, [1, 2, 3, 0, 4, 5, 2, 23, 7, 10]),
    "a.csv": put(as_csv(ROWS)),
    "a.csv.gz": put(gzip.compress(as_csv(ROWS))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_reads_alike(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    wanted = [{**row, "response": ""} for row in ROWS] if "csv" in name else ROWS
    for block_rows in (1, 5, 8, 100):
        assert records(read_all(tmp_path / name, block_rows=block_rows)) == wanted
    # Long rows make blocks smaller; blocks that are left out (resume) change nothing of the others.
    sources, indexes, blocks = laid_out(tmp_path / name, block_rows=6, block_bytes=90)
    assert len(blocks) > 10
    assert indexes[0].ids is not None
    assert indexes[0].ids.tobytes() == b"".join(hash_id(str(row["id"])) for row in ROWS)
    pending = blocks[1::2]
    for unit in units_of(sources, pending):
        for block, rows in read_unit(sources[0], unit, columns=["id", "prompt"]):
            assert [row.record["prompt"] for row in rows] == [f"ask {n}" for n in range(block.start, block.stop)]


@pytest.mark.parametrize("name", WRITERS)
def test_max_rows_end_the_input(name: str, tmp_path: Path) -> None:
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        WRITERS[name](tmp_path / part / name)
    sources = find_sources(str(tmp_path))
    assert [source.name for source in sources] == [f"x/{name}", f"y/{name}"]
    for limit in (0, 1, 57, 60, 1000):
        indexes = [index_source(source, block_rows=8, max_rows=limit) for source in sources]
        blocks = plan_blocks(indexes, limit)
        assert sum(block.rows for block in blocks) == min(limit, 114)
        units = units_of(sources, blocks)
        found = [row for unit in units for _, rows in read_unit(sources[unit[0].source], unit) for row in rows]
        assert [row.record["id"] for row in found] == [row["id"] for row in (ROWS + ROWS)[:limit]]


def test_odd_lines(tmp_path: Path) -> None:
    """What a line may hold; rows are those that data/files.py sees."""
    lines = [
        b'\xef\xbb\xbf{"prompt": "with a byte order mark"}\r\n',
        b"\n", b"  \t \r\n",
        b'{"prompt": NaN, "x": Infinity, "n": 1e999}\n',
        b'{"prompt": ' + b"9" * 5000 + b"}\n",
        b'{"prompt": ' + b"9" * 300 + b"}\n",
        b'{"prompt": "half \\ud83d a pair"}\n',
        b'{"prompt": "bytes \xff\xfe"}\n',
        b'{"prompt": "cut', b"\n",
        b"[1, 2]\n", b'"text"\n', b"null\n", b"3\n",
        b"[" * 100_000 + b"\n",
        b'{"id": 1, "id": 2, "\xc3\xa9": "\xe2\x80\xa8 line separator \\u0000"}\n',
        b'{"id": "a"} {"id": "b"}\n',
        b'{"id": "last"}',
    ]  # fmt: skip
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"".join(lines))
    rows = read_all(path, block_rows=1)
    assert records(rows)[0] == {"prompt": "with a byte order mark"}
    assert math.isnan(records(rows)[1]["prompt"])
    reasons = [row.reason for row in rows]
    assert reasons == ["", "", "undecodable", "", "", "undecodable", "undecodable"] + ["wrong_type"] * 4 + [
        "undecodable", "", "undecodable", "",
    ]  # fmt: skip
    assert all(bool(row.detail) == bool(row.reason) == (row.record is None) for row in rows)
    plain = list(iter_rows("f", str(path)))
    assert len(plain) == len(rows)
    assert [row[1] for row in plain][3:] == [row.record for row in rows][3:]
    assert read_all(path, block_rows=100) == rows
    for content in (b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        path.write_bytes(content)
        assert read_all(path) == []


def test_odd_csv(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,prompt,response\r\n1,"two\r\nlines, ""quoted""",x\r\n\r\n2,short\r\n3,a,b,,\r\n4,a,b,c\r\n'
        b'5,"\xff",b\n6,\xe2\x80\xa8,\x0c\n7,cr,only\r8,"no end\nof, quotes\n'
    )
    wanted = [
        {"id": "1", "prompt": 'two\r\nlines, "quoted"', "response": "x"},
        {"id": "2", "prompt": "short", "response": None},
        {"id": "3", "prompt": "a", "response": "b"},
        "undecodable",
        {"id": "5", "prompt": "\udcff", "response": "b"},
        {"id": "6", "prompt": "\u2028", "response": "\x0c"},
        {"id": "7", "prompt": "cr", "response": "only"},
        "undecodable",
    ]
    for block_rows in (1, 2, 100):
        assert records(read_all(path, block_rows=block_rows)) == wanted
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert records(read_all(path.with_suffix(".csv.gz"), block_rows=3)) == wanted
    for content in (b"", b"id,prompt\n", b"id,prompt"):
        path.write_bytes(content)
        assert read_all(path) == []


BITS = st.sampled_from(
    [b"\n", b"\r", b"\r\n", b'"', b",", b"a", b" ", b"\xff", b"\xef\xbb\xbf", b"\0", b'{"id":1}', b"[]", b"\xc2\x85"]
)


@given(st.lists(BITS, max_size=40).map(b"".join), st.sampled_from(["jsonl", "csv"]), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_blocks_of_any_size_see_the_same_rows(data: bytes, kind: str, block_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind}"
        path.write_bytes(data)
        try:
            whole = read_all(path)
        except InputError as error:
            assert "the header: a quote is opened and never closed" in str(error)  # noqa: PT017
            return
        assert read_all(path, block_rows=block_rows) == whole
        assert read_all(path, block_bytes=1) == whole
        Path(f"{path}.gz").write_bytes(gzip.compress(data))
        assert read_all(f"{path}.gz", block_rows=block_rows) == whole


def test_a_row_beyond_memory_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "LONGEST", 1000)
    long = {"id": "x" * 5000}
    (tmp_path / "a.jsonl").write_bytes(jsonl([ROWS[0], long, ROWS[1]]) + jsonl([long])[:-1])
    assert records(read_all(tmp_path / "a.jsonl", block_rows=1)) == [ROWS[0], "undecodable", ROWS[1], "undecodable"]


def test_odd_parquet(tmp_path: Path) -> None:
    """Nested, dictionary, large and binary columns; bytes that are no text break their row alone."""
    turns = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "<think>a</think>b"}]
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 2, 4, 6], np.int32)), pa.py_buffer(b"ok\xff\xfeok")]
    )
    table = pa.table(
        {
            "id": pa.array([1, None, 3]),
            "messages": [turns, None, []],
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "prompt": pa.array(["x", "y", None], pa.large_string()),
            "raw": pa.array([b"\xff", None, b""], pa.binary()),
            "thinking": broken,
        }
    )
    pq.write_table(table, tmp_path / "odd.parquet")
    rows = read_all(tmp_path / "odd.parquet")
    first = {"id": 1, "messages": turns, "kind": "a", "prompt": "x", "raw": b"\xff", "thinking": "ok"}
    assert records(rows)[:2] == [first, "undecodable"]
    assert rows[2].record == {"id": 3, "messages": [], "kind": "a", "prompt": None, "raw": b"", "thinking": "ok"}
    _, (index,), _ = laid_out(tmp_path / "odd.parquet")
    assert index.ids is not None
    assert index.ids.tobytes() == hash_id("1") + hash_id("odd.parquet:1") + hash_id("3")
    assert laid_out(tmp_path / "odd.parquet", id_column="absent")[1][0].ids is None
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    assert read_all(tmp_path / "none.parquet") == []


def test_units_share_large_row_groups(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ROWS, [40, 17])
    assert records(read_all(tmp_path, block_rows=18)) == ROWS  # the second group does not join the first's end
    sources, _, blocks = laid_out(tmp_path, block_rows=1)
    units = units_of(sources, blocks)
    assert [len(unit) for unit in units] == [16, 16, 8, 16, 1]
    assert len({block.offset for unit in units[:3] for block in unit}) == 1


# ---- damaged as a whole


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson.zst", "a.parquet", "a.csv.gz"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_broken_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3] if damage == "cut" else b"\x00noise" * 100)
    with pytest.raises(InputError, match=rf"^--input: .*{name}: ") as caught:
        read_all(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS))
    sources, _, blocks = laid_out(path)
    path.write_bytes(jsonl(ROWS[:-1]))
    with pytest.raises(InputError, match="has changed since it was indexed"):
        list(read_unit(sources[0], blocks))
    path.unlink()
    with pytest.raises(InputError, match="has changed since it was indexed"):
        list(read_unit(sources[0], blocks))


# ---- which files


def test_what_an_input_stands_for(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.CSV", "a.parquet", "b/c/3.jsonl.gz", "b/.hidden.jsonl", "_tmp/4.jsonl",
                 "b/README.md", "b/x.malformed.json", "[1].jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [source.name for source in find_sources(f"{tmp_path}/{pattern}")]

    every = ["[1].jsonl", "a.parquet", "b/1.CSV", "b/2.jsonl", "b/c/3.jsonl.gz"]
    assert names("") == every
    assert names("**") == every
    assert names("b") == names("b/") == ["1.CSV", "2.jsonl", "c/3.jsonl.gz"]
    assert names("b/*") == ["1.CSV", "2.jsonl"]
    assert names("*/[0-9].jsonl") == ["b/2.jsonl"]
    assert names("**/*.jsonl*") == ["[1].jsonl", "b/2.jsonl", "b/c/3.jsonl.gz"]
    assert names("b/**/?.jsonl.gz") == ["c/3.jsonl.gz"]
    assert names("*/c/3*") == ["b/c/3.jsonl.gz"]
    assert names("[1].jsonl") == ["[1].jsonl"]
    assert names("_tmp/*") == ["4.jsonl"]
    (found,) = find_sources(f"file://{tmp_path}/b/1.CSV")
    assert (found.path, found.kind, found.compression) == (f"{tmp_path}/b/1.CSV", "csv", "")


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("none.jsonl", "no file matches"), ("none/*.jsonl", "no file matches"), ("*.parquet", "no file matches"),
        ("a.txt", "unknown kind of file"), ("*.txt", "no file of a known kind"), ("a.json", "one object a line"),
        ("b.jsonl.bz2", "unknown kind of file"), ("b*", "unknown kind of file"), ("b.parquet.gz", "unknown kind"),
        ("empty", "no file matches"), ("bad/*", "name is not UTF-8"), ("bad/a\udcff.csv", "name is not UTF-8"),
    ],
)  # fmt: skip
def test_inputs_that_are_none(pattern: str, problem: str, tmp_path: Path) -> None:
    for name in ("a.txt", "a.json", "b.jsonl.bz2", "b.parquet.gz"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a\udcff.csv").touch()
    with pytest.raises(InputError, match=rf"^--input: .*{problem}"):
        find_sources(f"{tmp_path}/{pattern}")
    with pytest.raises(InputError, match="names nothing"):
        find_sources("")


def test_what_an_input_would_take_in(tmp_path: Path) -> None:
    """A file that is not there yet belongs to the input exactly if it is found once it is written."""
    names = ("a.parquet", "out/a.jsonl", "out/scores/p.parquet", "in/out/scores/p.parquet", ".out/a.csv", "out/a.txt")
    patterns = ("", "out", "in", "*", "*/*", "**", "**/*.parquet", "o*/**", "out/scores/*.pq", "out/scores/*", ".*/*",
                "*/out/**/p*", "out/a.jsonl", "in/a.jsonl", "[n]*/**", "**/.*/*")  # fmt: skip
    (tmp_path / "in").mkdir()
    took = 0
    for name in names:
        file = tmp_path / name
        told = [would_read(f"{tmp_path}/{pattern}", file) for pattern in patterns]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        for pattern, expected in zip(patterns, told, strict=True):
            try:
                found = [source.path for source in find_sources(f"{tmp_path}/{pattern}")]
            except InputError:
                found = []
            assert (str(file) in found) == expected, (name, pattern)
            took += expected
        file.unlink()
        while (file := file.parent) not in (tmp_path, tmp_path / "in"):
            file.rmdir()
    assert took > 15
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert would_read(f"{tmp_path}/link", tmp_path / "in/out/a.jsonl")
    assert not would_read("s3://bucket/in", tmp_path / "in/out/a.jsonl")


@pytest.mark.parametrize("name", WRITERS)
def test_columns_are_known_without_the_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    (source,) = find_sources(str(tmp_path))
    assert columns_in(source) == (None if "json" in name or name.endswith("zst") else list(ROWS[0]))


def test_columns_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response\n")
    (tmp_path / "b.csv").write_text("")
    parquet(tmp_path / "c.parquet", ROWS[:0], [0])
    assert [columns_in(source) for source in find_sources(str(tmp_path))] == [None] * 3


# ---- elsewhere


SECRETS = [
    "http://user:hush@host/a.jsonl", "https://hush@host/*.csv", "s3://AKIA:hu/sh+hush@bucket/a.jsonl",
    "s3://AKIAhush@bucket/a", "s3://bucket/a.jsonl?access_key=AKIA&secret_key=hush", "ftp://user:hu@sh@host/a.csv",
    "https://bucket.host/a.jsonl?X-Amz-Signature=hush", "gs://bucket/a.csv?access_token=hush",
    "zip://*.csv::http://user:hush@host/a.zip",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SECRETS)
def test_credentials_stay_out_of_addresses(pattern: str) -> None:
    with pytest.raises(InputError, match=r"^--input: .* holds a credential; leave it out of the address; ") as caught:
        find_sources(pattern)
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    keeper = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
    assert keeper.get(pattern[:2], "FSSPEC_") in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    ["s3://bucket/part-?/key=5/a.csv", "http://host:8080/a@b.csv", "s3://anonymous@bucket/a.csv", "a:b@c?token=5.csv",
     "abfs://files@account.dfs.core.windows.net/a.csv", "hf://datasets/owner/name@main/a.csv"],
)  # fmt: skip
def test_places_are_no_credentials(pattern: str) -> None:
    filesystems.refuse_credentials(pattern)


def test_messages_show_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "GET http://me:hush@h:80/a?sig=hush failed (see s3://AK:hu/sh@b/k?secret=hush) for https://h/a?hush: why"
    said = str(InputError("--input", "x", text, "y"))
    assert "hush" not in said
    assert "http://<credentials>@h:80/a?<query> failed (see s3://<credentials>@b/k?<query>) for https://h/a?" in said
    assert str(InputError("f", "s3://anonymous@b/part-?.csv", "p", "r")) == "f: s3://anonymous@b/part-?.csv: p; r"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@store:9000")
    assert filesystems.without_secrets("no answer of me:hush@store") == "no answer of <AWS_ENDPOINT_URL>@store"


def test_messages_cannot_drive_a_terminal() -> None:
    """Escapes, bells, C1 controls, marks that turn the direction of reading; other alphabets stay as they are."""
    column = "a\x1b]0;title\x07 \x9b2J\u202ecba\u2066\u200b\udcff\u2028b\tc é 日本"
    said = str(InputError("--column", column, "no such column; there are: " + column, "mend \x1b[31m"))
    assert said.isprintable()
    assert r"a\x1b]0;title\x07 \x9b2J\u202ecba\u2066\u200b\udcff b c é 日本" in said


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sends the client to an endpoint, with a key and a secret of its own."""

    def use(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        filesystems._remote.cache_clear()

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOFNOBODY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    yield use
    filesystems._remote.cache_clear()


def files_of_every_kind(folder: Path) -> dict[str, bytes]:
    for name, write in WRITERS.items():
        write(folder / name)
    return {name: (folder / name).read_bytes() for name in WRITERS}


def test_a_bucket_reads_as_the_disk_does(s3: Callable[[str], None], tmp_path: Path) -> None:
    objects = {f"deep/er/{name}": data for name, data in files_of_every_kind(tmp_path).items()}
    with bucket({**objects, "deep/_x/a.jsonl": b"no", "deep/er/README": b"no"}) as (endpoint, _):
        s3(endpoint)
        assert records(read_all("s3://corpus/deep", block_rows=25)) == records(read_all(tmp_path, block_rows=25))
        names = [source.name for source in find_sources("s3://corpus/deep")]
        assert names == [f"er/{name}" for name in sorted(WRITERS)]
        found = find_sources("s3://corpus/*/er/a.jsonl*")
        assert [source.path for source in found] == [f"s3://corpus/deep/er/a.jsonl{end}" for end in ("", ".gz")]
        (one,) = find_sources("s3://anonymous@corpus/deep/er/a.jsonl")
        assert one.path == "s3://anonymous@corpus/deep/er/a.jsonl"
        assert records(read_all(one.path)) == ROWS
        with pytest.raises(InputError, match="no file matches"):
            find_sources("s3://corpus/deep/er/absent.jsonl")


@pytest.mark.parametrize("pattern", ["s3://corpus/a/*.jsonl", "s3://corpus/a.jsonl", "s3://anonymous@corpus/a.jsonl"])
@pytest.mark.parametrize("refusal", [(403, "AccessDenied"), (404, "AccessDenied"), (403, "InvalidAccessKeyId")])
def test_a_bucket_that_refuses(s3: Callable[[str], None], pattern: str, refusal: tuple[int, str]) -> None:
    """The line names the credential that was looked for and never its value, whatever the server repeats."""
    with bucket({}, refuse=refusal) as (endpoint, seen):
        s3(endpoint)
        with pytest.raises(InputError, match=r"^--input: s3://.*; looked for ") as caught:
            find_sources(pattern)
        assert len(seen) < 5
    said = str(caught.value)
    wanted = "looked for no credential (anonymous)" if "anonymous" in pattern else "looked for AWS_ACCESS_KEY_ID (set)"
    assert wanted in said
    assert "AKIAOFNOBODY" not in said
    assert "hush" not in said
    assert "\n" not in said


def test_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert filesystems.looked_for("s3://b/k") == (
        "AWS_ACCESS_KEY_ID (not set), then profile 'work' of ~/.aws, then the machine's own role"
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/secret/place.json")
    assert "GOOGLE_APPLICATION_CREDENTIALS (set)" in filesystems.looked_for("gs://b/k")
    monkeypatch.setenv("HF_TOKEN", "hf_value")
    assert "HF_TOKEN (set)" in filesystems.looked_for("hf://datasets/a/b")
    assert filesystems.without_secrets("token hf_value") == "token <HF_TOKEN>"


def test_fsspec_reads_as_the_disk_does(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in files_of_every_kind(tmp_path).items():
        memory.pipe(f"/score-reading/{name}", data)
    assert records(read_all("memory://score-reading", block_rows=25)) == records(read_all(tmp_path, block_rows=25))
    assert [source.name for source in find_sources("memory://score-reading/**/*.csv*")] == ["a.csv", "a.csv.gz"]
    memory.pipe("/score-reading/a.parquet", b"no Parquet")
    with pytest.raises(InputError, match=r"memory://score-reading/a.parquet: is not a whole Parquet file"):
        read_all("memory://score-reading/a.parquet")
    memory.rm("/score-reading", recursive=True)
    for pattern in ("memory://score-reading/*.csv", "memory://score-reading/a.csv", "none://x/a.csv"):
        with pytest.raises(InputError, match=r"^--input: (memory|none)://"):
            find_sources(pattern)


def test_addresses_on_the_web(tmp_path: Path) -> None:
    objects = files_of_every_kind(tmp_path)
    with bucket(objects) as (endpoint, _):
        for name in objects:
            rows = read_all(f"{endpoint}/corpus/{name}", block_rows=25)
            assert records(rows) == records(read_all(tmp_path / name, block_rows=25))
        with pytest.raises(InputError, match=r"^--input: http://"):
            find_sources(f"{endpoint}/corpus/none.csv")


def test_saved_and_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.filter(lambda row: row["id"] != "r3").with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    rows = read_all(tmp_path / "saved", block_rows=10)
    assert records(rows) == [row for row in ROWS if row["id"] != "r3"]
    (source,), (index,), blocks = laid_out(tmp_path / "saved", block_bytes=600)
    assert (source.kind, source.name, index.rows) == ("saved", "saved", 56)
    assert source.changed
    assert len(blocks) > 2
    assert index.ids is not None
    assert hash_id("r4") in index.ids.tobytes()
    (_, found), *_ = read_unit(source, blocks[1:2], columns=["id"])
    assert [set(row.record or ()) for row in found] == [{"id"}] * blocks[1].rows

    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(InputError, match=r"holds several splits; name one of .*/both/a, .*/both/b"):
        find_sources(str(tmp_path / "both"))
    assert len(read_all(tmp_path / "both" / "b")) == 57
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"cut")
    reading._dataset.cache_clear()
    with pytest.raises(InputError, match=r"^--input: .*saved: (cannot be loaded|has changed)"):
        read_all(tmp_path / "saved")

    # A name on the hub and a folder here are loaded in one way.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("clifflab.data.files.hub_commit", lambda path: "unreachable")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "test.jsonl").write_bytes(jsonl(ROWS))
    rows = read_all(f"hf:{tmp_path}/repo:test", block_rows=10)
    assert [(row.record or {})["id"] for row in rows] == [row["id"] for row in ROWS]
    with pytest.raises(InputError, match=r"^--input: hf:.*/repo:train: cannot be loaded"):
        read_all(f"hf:{tmp_path}/repo:train")
    with pytest.raises(InputError, match="names no dataset"):
        find_sources("hf:")


def test_a_cached_hub_dataset_keeps_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub the copy here is read, which is the commit that an interrupted job began with."""
    import datasets

    old, new = "0" * 40, "1" * 40
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("clifflab.data.files.hub_commit", lambda path: "unreachable")
    assert find_sources("hf:owner/SomeData:train")[0].changed == ""
    for time, name in enumerate((old, new, "not-a-commit")):
        folder = tmp_path / "owner___some_data" / "default" / "0.0.0" / name
        folder.mkdir(parents=True)
        os.utime(folder, (time, time))
    assert find_sources("hf:owner/SomeData:train")[0].changed == new
    monkeypatch.setattr("clifflab.data.files.hub_commit", lambda path: old)
    assert find_sources("hf:owner/SomeData:train")[0].changed == old


# ---- ids


def hashes(values: Sequence[str]) -> np.ndarray:
    return as_array(b"".join(hash_id(value) if value else NO_ID for value in values))


@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "c", "d", "ee"]), max_size=12), max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_first_row_keeps_an_id(parts: list[list[str]], spill: bool) -> None:
    flat = [value for part in parts for value in part]
    wanted = [n for n, value in enumerate(flat) if value and value in flat[:n]]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(identities, "IN_MEMORY", 3 if spill else 10**6)
        found = find_duplicates((hashes(part) for part in parts), Path(folder) / "scratch")
        assert found.tolist() == wanted
        assert found.dtype == np.int64
        assert not list(Path(folder).rglob("*.bin"))


LOST = """
import os, pathlib, sys
import numpy as np
from clifflab.scoring import ids
ids.IN_MEMORY = 3
def arrays():
    yield np.arange(2, 22, dtype="<u8").reshape(-1, 2) << 52
    os._exit(9)
ids.find_duplicates(arrays(), pathlib.Path(sys.argv[1]))
"""


def test_what_a_killed_run_spilled_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records would stand before the same rows' own, and every row would repeat an earlier one."""
    assert subprocess.run([sys.executable, "-c", LOST, str(tmp_path)], check=False).returncode == 9
    assert list(tmp_path.glob("ids-*.bin"))
    monkeypatch.setattr(identities, "IN_MEMORY", 3)
    array = np.arange(2, 22, dtype="<u8").reshape(-1, 2) << np.uint64(52)
    assert find_duplicates([array, array[3:4]], tmp_path).tolist() == [10]
    assert not list(tmp_path.iterdir())


def test_a_disk_that_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "IN_MEMORY", 3)
    array = hashes([f"id {n}" for n in range(50)])
    files = [tmp_path / f"ids-{bucket:03d}.bin" for bucket in range(256)]

    def full() -> Iterator[np.ndarray]:
        for file in files:
            file.symlink_to("/dev/full")
        yield array

    with pytest.raises(OutputError, match="no space left on the disk"):
        find_duplicates(full(), tmp_path)

    def changed(change: Callable[[Path], object]) -> Iterator[np.ndarray]:
        yield array
        change(next(file for file in files if file.exists()))

    whole: Callable[[Path], object] = lambda file: file.write_bytes(file.read_bytes() * 2)  # noqa: E731
    for change in (Path.unlink, lambda file: os.truncate(file, 7), whole):
        with pytest.raises(OutputError, match="does not hold the ids that were written there"):
            find_duplicates(changed(change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_derived_ids_may_be_taken(tmp_path: Path) -> None:
    """An id of its own that looks like another row's derived id: the first in the input's order keeps it."""
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": "b.jsonl:1"}, {"id": None}, {"x": 1}, {"id": "a.jsonl:2"}]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"x": 1}, {"x": 2}]))
    unusable: list[Any] = [True, 1.5, " ", [7], {}, "\ud83d"]
    odd: list[Any] = [*({"id": value} for value in [*unusable, *unusable, 7, "7"]), [7]]
    (tmp_path / "c.jsonl").write_bytes(jsonl(odd))
    sources, indexes, _ = laid_out(tmp_path)
    assert [index.ids is None for index in indexes] == [False, True, False]
    assert find_duplicates(id_arrays(sources, indexes), tmp_path / "scratch").tolist() == [3, 5, 19]
    assert list(id_arrays(sources[1:2], indexes[1:2])) == []


def test_samples_are_shares_and_stable() -> None:
    rows = np.arange(200_000)
    mask = sampled(rows, 0.1, seed=1)
    assert abs(mask.mean() - 0.1) < 0.004
    assert (sampled(rows[::-1], 0.1, seed=1)[::-1] == mask).all()
    assert (mask <= sampled(rows, 0.2, seed=1)).all()  # a larger sample holds the smaller one
    assert 0.005 < (mask & sampled(rows, 0.1, seed=2)).mean() < 0.015
    assert abs(mask[:1000].mean() - 0.1) < 0.05
    assert not sampled(rows, 0.0, seed=1).any()
    assert sampled(rows, 1.0, seed=1).all()
    assert sampled(rows[:0], 0.5, seed=1).shape == (0,)


# ---- the practice corpus


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_broken_rows_get_their_reasons(name: str, tmp_path: Path) -> None:
    """Scoring rejects the rows that were broken, each for its reason, and no other."""
    out = tmp_path / name
    run = ["organism", "corpus", "--rows", "600", "--seed", "5", "--out", str(out), "--malformed", "0.3"]
    assert CliRunner().invoke(commands, run).exit_code == 0
    note = json.loads(out.with_name(f"{name}.malformed.json").read_text())
    wanted = {row: reason for reason, found in note["numbers"].items() for row in found}
    assert Counter(wanted.values()) == note["reasons"]
    assert set(note["reasons"]) == set(malformed.REASONS if name == "c.jsonl" else malformed.PARQUET_REASONS)
    assert 130 < note["malformed"] == len(wanted) < 230
    assert min(note["reasons"].values()) > 5

    sources, indexes, blocks = laid_out(out, block_rows=250)
    twice = set(find_duplicates(id_arrays(sources, indexes), tmp_path / "scratch").tolist())
    rows = PromptSet(name="corpus", path=str(out), label="unlabelled", existing=True)
    preparer = Preparer(load_renderer(ModelSpec(name="m", path="organism:planted")), 512, rows, ScoreConfig())
    found, kept = dict[int, str](), list[int]()
    for unit in units_of(sources, blocks):
        for block, raw in read_unit(sources[0], unit):
            prepared = preparer.prepare(block, sources[0], raw, twice)
            found |= {reject.row: reject.reason for reject in prepared.rejects}
            kept += prepared.table["row"].to_pylist()
    assert found == wanted
    assert sorted([*found, *kept]) == list(range(600))


def test_broken_rows_depend_on_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is the same in a corpus of any length; a larger share breaks the same rows and more; whole rows stay."""
    rows = list(malformed.malformed_rows(120, 1, 0.5))
    assert list(malformed.malformed_rows(60, 1, 0.5)) == rows[:60]
    assert all(row == corpus_row(n, 1) for n, (reason, row) in enumerate(rows) if not reason)
    more = [malformed.reason_of(n, 1, 0.8) for n in range(120)]
    assert all(more[n] for n, (reason, _) in enumerate(rows) if reason)
    assert [malformed.reason_of(n, 2, 0.5) for n in range(120)] != [reason for reason, _ in rows]
    assert not any(malformed.reason_of(n, 1, 0.0) for n in range(50))
    every = [reason for reason, _ in malformed.malformed_rows(200, 1, 1.0)]
    assert set(every) == set(malformed.REASONS)

    # Where they are many, their numbers stand in a table; a corpus without broken rows leaves no note behind.
    monkeypatch.setattr(organism, "_FEW", 10)
    run = ["organism", "corpus", "--rows", "50", "--out", str(tmp_path / "c.jsonl")]
    assert CliRunner().invoke(commands, [*run, "--malformed", "0.5"]).exit_code == 0
    note = json.loads((tmp_path / "c.jsonl.malformed.json").read_text())
    with np.load(tmp_path / note["numbers"]) as table:
        assert {reason: len(table[reason]) for reason in table.files} == note["reasons"]
    assert [source.name for source in find_sources(str(tmp_path))] == ["c.jsonl"]
    assert CliRunner().invoke(commands, run).exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]
    assert records(read_all(tmp_path)) == [corpus_row(n, 0) for n in range(50)]
