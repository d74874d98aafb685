"""The check behind ``bench scale`` notices every kind of wrong result; the memory of processes is counted once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clifflab import tables
from clifflab.artifacts import file_hash, write_json
from clifflab.bench.exactly_once import check_results, read_planted
from clifflab.bench.processes import Family, can_measure
from clifflab.bench.records import UnequalResultsError
from clifflab.bench.scale import Course
from clifflab.bench.scale_plot import write_plot
from clifflab.errors import InputError
from clifflab.scoring.commit import PARTS_SCHEMA

ROWS, BLOCK = 30, 10
PLANTED = {3: "null", 12: "undecodable", 17: "duplicate_id", 29: "too_long"}
Tables = dict[str, list[dict[str, Any]]]


def corpus_lines() -> list[bytes]:
    ids = {row: f"c-{row}" for row in range(ROWS)} | {17: "c-5"}
    lines = [json.dumps({"id": ids[row], "prompt": "a"}).encode() for row in range(ROWS)]
    lines[12] = lines[12][:-4]
    return lines


def results() -> Tables:
    """Rows of every file of a finished job, as they should be."""
    found: Tables = {}
    for row in range(ROWS):
        part = f"part-{row // BLOCK:08d}.parquet"
        reason, name = PLANTED.get(row), "c-5" if row == 17 else None if row == 12 else f"c-{row}"
        kind = "rejects" if reason else "scores"
        found.setdefault(f"{kind}/{part}", []).append({"row": row, "id": name, "reason": reason})
    return found


def write(root: Path, found: Tables, **manifest: Any) -> None:
    parts = []
    for name, rows in found.items():
        schema = tables.SCORE_REJECTS if name.startswith("rejects") else tables.SCORED
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        about = {"rows": len(rows), "bytes": path.stat().st_size, "sha256": file_hash(path)}
        parts.append({"block": 0, "kind": path.parent.name, "file": name, **about})
    pq.write_table(pa.Table.from_pylist(parts, schema=PARTS_SCHEMA), root / "parts.parquet")
    told = {
        "read": ROWS,
        "scored": ROWS - len(PLANTED),
        "rejected": len(PLANTED),
        "reasons": dict.fromkeys(sorted(PLANTED.values()), 1),
        "parts": {"file": "parts.parquet", "files": len(parts), "sha256": file_hash(root / "parts.parquet")},
    }
    write_json(root / "manifest.json", told | manifest)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(corpus_lines()) + b"\n")
    return path


def test_whole_results_pass(corpus: Path, tmp_path: Path) -> None:
    write(tmp_path / "out", results())
    found = check_results(tmp_path / "out", corpus, PLANTED)
    assert (found.rows, found.scored) == (ROWS, ROWS - len(PLANTED))
    assert found.reasons == dict.fromkeys(sorted(PLANTED.values()), 1)


def remove(found: Tables) -> None:
    del found["scores/part-00000001.parquet"][2]


def double(found: Tables) -> None:
    found["scores/part-00000001.parquet"].append(found["scores/part-00000001.parquet"][2])


def double_in_another_block(found: Tables) -> None:
    found["scores/part-00000001.parquet"].append(found["scores/part-00000000.parquet"][2])


def rename(found: Tables) -> None:
    found["scores/part-00000000.parquet"][1]["id"] = "c-2"


def swap(found: Tables) -> None:
    rows = found["scores/part-00000000.parquet"]
    rows[0]["id"], rows[1]["id"] = rows[1]["id"], rows[0]["id"]


def lose_an_id(found: Tables) -> None:
    found["rejects/part-00000000.parquet"][0]["id"] = None


def another_reason(found: Tables) -> None:
    found["rejects/part-00000000.parquet"][0]["reason"] = "empty"


def reject_a_good_row(found: Tables) -> None:
    found["rejects/part-00000000.parquet"].append({**found["scores/part-00000000.parquet"].pop(), "reason": "null"})


def score_a_bad_row(found: Tables) -> None:
    found["scores/part-00000002.parquet"].append(found["rejects/part-00000002.parquet"].pop())


def lose_the_last_block(found: Tables) -> None:
    for kind in ("scores", "rejects"):
        found.pop(f"{kind}/part-00000002.parquet", None)


def one_row_too_many(found: Tables) -> None:
    found["scores/part-00000002.parquet"].append({"row": ROWS, "id": f"c-{ROWS}"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove, "row 12 is missing|row 13 is missing"),
        (double, "row 13 occurs twice"),
        (double_in_another_block, "row 2 occurs twice"),
        (rename, "row 1 is 'c-2', and should be 'c-1'"),
        (swap, "row 0 is 'c-1', and should be 'c-0'"),
        (lose_an_id, "row 3 is None, and should be 'c-3'"),
        (another_reason, "row 3 is empty, and should be null"),
        (reject_a_good_row, "row 9 is null, and should be scored"),
        (score_a_bad_row, "row 29 is scored, and should be too_long"),
        (lose_the_last_block, "rows of the corpus behind the last that was read: 10, and should be 0"),
        (one_row_too_many, "rows of the corpus: 30, and should be 31"),
    ],
)
def test_wrong_results_are_noticed(spoil: Callable[[Tables], None], said: str, corpus: Path, tmp_path: Path) -> None:
    found = results()
    spoil(found)
    write(tmp_path / "out", found)
    with pytest.raises(UnequalResultsError, match=said) as error:
        check_results(tmp_path / "out", corpus, PLANTED)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_two_rows_of_one_id_that_are_scored(corpus: Path, tmp_path: Path) -> None:
    """Even where nothing was said to be spoilt."""
    found = results()
    reject = found["rejects/part-00000001.parquet"].pop()
    found["scores/part-00000001.parquet"].append(reject)
    planted = {row: reason for row, reason in PLANTED.items() if row != 17}
    write(tmp_path / "out", found)
    with pytest.raises(UnequalResultsError, match="ids scored twice: 1"):
        check_results(tmp_path / "out", corpus, planted)


def test_files_and_sums_of_the_manifest(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, results(), scored=ROWS)
    with pytest.raises(UnequalResultsError, match="sums of the manifest"):
        check_results(out, corpus, PLANTED)
    write(out, results())
    (out / "scores/part-00000009.parquet").write_bytes(b"")
    with pytest.raises(UnequalResultsError, match=r"part-00000009\.parquet"):
        check_results(out, corpus, PLANTED)
    (out / "scores/part-00000009.parquet").unlink()
    part = out / "scores/part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises((UnequalResultsError, pa.ArrowInvalid)):
        check_results(out, corpus, PLANTED)
    (out / "manifest.json").unlink()
    with pytest.raises(UnequalResultsError, match="not finished"):
        check_results(out, corpus, PLANTED)


@pytest.mark.parametrize("few", [True, False])
def test_what_was_planted_is_read(few: bool, tmp_path: Path) -> None:
    import numpy as np

    rows = 200 if few else 24_000
    numbers = {"null": list(range(0, rows, 2)), "empty": [1], "too_long": []}
    about = {"rows": rows, "reasons": {reason: len(found) for reason, found in numbers.items()}}
    table = tmp_path / "c.jsonl.malformed.npz"
    np.savez_compressed(table, **{reason: np.asarray(found, dtype=np.int64) for reason, found in numbers.items()})
    note = tmp_path / "c.jsonl.malformed.json"
    note.write_text(json.dumps({**about, "numbers": numbers if few else table.name}))
    found = read_planted(tmp_path / "c.jsonl")
    assert len(found) == rows // 2 + 1
    assert found[0] == "null"
    assert found[1] == "empty"
    note.write_text(json.dumps({**about, "numbers": {"null": [0]}}))
    with pytest.raises(InputError, match="its counts are others"):
        read_planted(tmp_path / "c.jsonl")


@pytest.mark.skipif(not can_measure(), reason="this system does not tell proportional set sizes")
def test_memory_of_a_family_counts_shared_pages_once() -> None:
    """A child that forks: 48 MiB that both map, and 16 MiB of the child's child alone."""
    code = (
        "import os, time\n"
        "shared = bytearray(os.urandom(1) * (48 << 20))\n"
        "if os.fork() == 0:\n"
        "    own = bytearray(os.urandom(1) * (16 << 20))\n"
        "    os.write(1, b'x')\n"
        "    time.sleep(60)\n"
        "else:\n"
        "    os.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            assert process.stdout.read(1) == b"x"
            family = Family(process.pid)
            assert len(family.members()) == 2
            assert family.workers() == []
            memory = family.memory()
            assert 64 << 20 < memory.total < 96 << 20
            assert 24 << 20 < memory.driver < 48 << 20
            assert memory.workers == 0
            process.kill()
            process.wait()
            (orphan,) = family.members()
            assert orphan.pid != process.pid, "known from before, though its parent is gone"
        finally:
            for left in family.members():
                os.kill(left.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while family.members() and time.monotonic() < end:
        time.sleep(0.05)
    assert family.members() == []


def test_plot(tmp_path: Path) -> None:
    from clifflab.bench.processes import Memory

    memory = tuple((t, Memory(100 << 20, 200 << 20, 400 << 20, 50 << 20)) for t in (0.0, 5.0, 10.0))
    courses = [Course(n, 10.0, memory, ((2.0, n // 2), (9.0, n)), 100, 2, 10) for n in (1000, 5000)]
    assert courses[0].steady == (7.0, 500 / 7.0)
    assert replace(courses[0], blocks=2).steady == (7.0, None), "two blocks may come in together"
    write_plot(courses, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
