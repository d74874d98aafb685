"""Is every row of a corpus in the results of ``clifflab score`` exactly once, and rejected just where it was spoilt?

Nothing of the scoring code is used: the corpus is read as lines, the results as Parquet files, in step, one block at a
time. Of the whole job only eight bytes an id are kept, to see that no id is scored twice.
"""

from __future__ import annotations

import json
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clifflab.artifacts import file_hash, read_json
from clifflab.bench.records import UnequalResultsError
from clifflab.errors import InputError

_KINDS = ("scores", "rejects")
Found = dict[int, tuple[str | None, str]]


@dataclass(frozen=True)
class Counted:
    """What the results hold.

    Attributes:
        scored: Rows with scores.
        reasons: Rejected rows by reason.
    """

    scored: int
    reasons: Mapping[str, int]

    @property
    def rows(self) -> int:
        """All rows."""
        return self.scored + sum(self.reasons.values())


def read_planted(corpus: Path) -> dict[int, str]:
    """Why rows of a practice corpus were spoilt, by row, as ``clifflab organism corpus --malformed`` noted it.

    Raises:
        InputError: There is no such note, or it is damaged.
    """
    note = Path(f"{corpus}.malformed.json")
    try:
        about = json.loads(note.read_bytes())
        numbers = about["numbers"]
        if isinstance(numbers, str):
            with np.load(note.with_name(numbers)) as arrays:
                numbers = {reason: arrays[reason].tolist() for reason in arrays.files}
        found = {row: reason for reason, rows in numbers.items() for row in rows}
        if Counter(found.values()) != Counter({reason: n for reason, n in about["reasons"].items() if n}):
            raise ValueError("its counts are others")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        remedy = "write the corpus again, with --malformed"
        raise InputError("corpus", note, f"cannot be read ({type(error).__name__}: {error})", remedy) from None
    return found


def check_results(root: Path, corpus: Path, planted: Mapping[int, str]) -> Counted:
    """Compare results with the corpus that they are of.

    Args:
        root: Folder of a finished job, of one probe.
        corpus: Its JSON Lines file.
        planted: Reasons of the rows that were spoilt, by row.

    Raises:
        UnequalResultsError: A row is missing, doubled or another's, a reject is not what was planted, or the manifest
            does not add up.
    """
    manifest = read_json(root / "manifest.json")
    if not isinstance(manifest, dict):
        raise UnequalResultsError(f"bench scale: {root} has no manifest: the job is not finished")
    check_files(root, manifest)
    reasons: Counter[str] = Counter()
    scored_ids = array("q")
    at = 0
    with corpus.open("rb") as lines:
        for block in _blocks(root):
            _in_order(sorted(block), at)
            own = list(islice(lines, len(block)))
            _equal("rows of the corpus", at + len(own), at + len(block))
            for row, line in zip(sorted(block), own, strict=True):
                name, reason = block[row]
                _row(row, line, name, reason, planted.get(row, ""))
                if reason:
                    reasons[reason] += 1
                else:
                    scored_ids.append(hash(name))
            at += len(block)
        _equal("rows of the corpus behind the last that was read", sum(1 for _ in lines), 0)
    _equal("rejects", dict(reasons), dict(Counter(planted.values())))
    ids = np.sort(np.frombuffer(scored_ids, dtype=np.int64))
    _equal("ids scored twice", int((ids[1:] == ids[:-1]).sum()), 0)
    found = Counted(len(ids), dict(sorted(reasons.items())))
    told = {name: manifest[name] for name in ("read", "scored", "rejected", "reasons")}
    sums = {"read": found.rows, "scored": found.scored, "rejected": sum(reasons.values()), "reasons": found.reasons}
    _equal("sums of the manifest", told, sums)
    return found


def check_files(root: Path, manifest: Mapping[str, Any]) -> None:
    """Whether the folder holds just the files that the manifest's list names, with their rows, bytes and checksums.

    Raises:
        UnequalResultsError: It does not.
    """
    parts = root / manifest["parts"]["file"]
    _equal("checksum of the list of files", file_hash(parts), manifest["parts"]["sha256"])
    listed = {row["file"]: row for row in pq.read_table(parts).to_pylist()}
    there = {path.relative_to(root).as_posix() for kind in (*_KINDS, "traces") for path in (root / kind).glob("*")}
    _equal("files beside those listed, or missing", sorted(there ^ set(listed)), [])
    for name, row in listed.items():
        path = root / name
        found = (pq.read_metadata(path).num_rows, path.stat().st_size, file_hash(path))
        _equal(f"rows, bytes and checksum of {name}", found, (row["rows"], row["bytes"], row["sha256"]))


def _blocks(root: Path) -> Iterator[Found]:
    """The rows of each block, with their ids, and why they are rejected, if they are."""
    names = sorted({path.name for kind in _KINDS for path in (root / kind).glob("part-*.parquet")})
    for name in names:
        found: Found = {}
        for kind in _KINDS:
            if (root / kind / name).is_file():
                _add(found, root / kind / name)
        yield found


def _add(found: Found, path: Path) -> None:
    schema = pq.read_schema(path)
    reasons: Iterable[str]
    table = pq.read_table(path, columns=[n for n in ("row", "id", "reason") if n in schema.names])
    reasons = table["reason"].to_pylist() if "reason" in table.column_names else [""] * len(table)
    for row, name, reason in zip(table["row"].to_pylist(), table["id"].to_pylist(), reasons, strict=True):
        if row in found:
            raise UnequalResultsError(f"bench scale: row {row} occurs twice ({path})")
        found[row] = (name, reason)


def _in_order(rows: list[int], first: int) -> None:
    """Whether these are all rows from the first on."""
    for expected, row in enumerate(rows, first):
        if row != expected:
            problem = "is missing" if row > expected else "occurs twice"
            raise UnequalResultsError(f"bench scale: row {min(row, expected)} {problem}")


def _row(row: int, line: bytes, name: str | None, reason: str, planted: str) -> None:
    if reason != planted:
        told, expected = (word or "scored" for word in (reason, planted))
        raise UnequalResultsError(f"bench scale: row {row} is {told}, and should be {expected}")
    wanted = id_of(line)
    unread = name is None and reason == "undecodable"
    if wanted is not None and name != wanted and not unread:
        raise UnequalResultsError(f"bench scale: row {row} is {name!r}, and should be {wanted!r}")


def id_of(line: bytes) -> str | None:
    """The id in a line of a corpus; ``None`` where it cannot be read."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    name = record.get("id") if isinstance(record, dict) else None
    return name if isinstance(name, str) and name else None


def _equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UnequalResultsError(f"bench scale: {what}: {found}, and should be {expected}")
