"""Identities of rows: 128-bit hashes, and which rows repeat an earlier one's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clifflab.artifacts import output_error
from clifflab.errors import OutputError

WIDTH = 16  # bytes of a hash
NO_ID = bytes(WIDTH)  # a row whose id cannot be read; no text has this hash, but for a chance of 2**-128
IN_MEMORY = 500_000  # rows; beyond, hashes are sorted into files first
_BUCKETS = 256
_RECORD = WIDTH + 8  # bytes: a hash and the number of its row


def hash_id(identity: str) -> bytes:
    """Sixteen bytes that stand for an id."""
    return hashlib.blake2b(identity.encode(), digest_size=WIDTH).digest()


def derived_id(name: str, row: int) -> str:
    """Id of a row that brings none: its source's name and its number there."""
    return f"{name}:{row}"


def hash_of(value: Any, name: str, row: int) -> bytes:
    """Hash of a row's id: of its own, of the derived one where it brings none, :data:`NO_ID` where it is unusable.

    What counts as an id is as in :func:`clifflab.data.prompts.row_id`.
    """
    if value is None:
        return hash_id(derived_id(name, row))
    if isinstance(value, bool | float | list | dict | bytes):
        return NO_ID
    text = str(value)
    try:
        return hash_id(text) if text.strip() else NO_ID
    except UnicodeEncodeError:
        return NO_ID


def as_array(hashes: bytes | bytearray) -> np.ndarray:
    """Hashes side by side as ``[N, 2]`` unsigned integers."""
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


def find_duplicates(arrays: Iterable[np.ndarray], scratch: Path) -> np.ndarray:
    """Rows whose id an earlier row has, in memory bounded by the share of one bucket.

    Args:
        arrays: Hashes ``[n, 2]`` of consecutive rows, in the order of the input (:func:`as_array`).
        scratch: A folder of its own for large inputs; what is written there is deleted again.

    Returns:
        Numbers of the rows within the whole input ``[M]``, ascending, int64. The first row of an id is not among them.

    Raises:
        OutputError: The disk is full, or does not keep what is written there.
    """
    kept, rows, spilled = list[np.ndarray](), 0, 0
    files = [scratch / f"ids-{bucket:03d}.bin" for bucket in range(_BUCKETS)]
    try:
        for file in files:  # a run that was killed leaves its own behind
            file.unlink(missing_ok=True)
        for array in arrays:
            for part in _records(array, rows):
                kept.append(part)
                if sum(map(len, kept)) > IN_MEMORY:
                    spilled += _spill(kept, files)
                    kept = []
            rows += len(array)
        if not spilled:
            found = [_repeats(np.concatenate(kept))] if kept else []
        else:
            spilled += _spill(kept, files)
            read, found = 0, list[np.ndarray]()
            for file in files:
                if file.exists():
                    records = _read_back(file)
                    read += len(records)
                    found.append(_repeats(records))
            if read != spilled:
                raise _damaged(scratch)
    except OSError as error:
        raise output_error(scratch, error) from None
    finally:
        with suppress(OSError):
            for file in files:
                file.unlink(missing_ok=True)
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _records(array: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Hash and row number of the rows with an id ``[n, 3]``, a stretch at a time."""
    for start in range(0, len(array), IN_MEMORY):
        part = np.asarray(array[start : start + IN_MEMORY], dtype="<u8")
        rows = np.arange(first + start, first + start + len(part), dtype="<u8")
        readable = part.any(axis=1)
        yield np.column_stack([part[readable], rows[readable]])


def _spill(parts: list[np.ndarray], files: list[Path]) -> int:
    """Append records to the files of their buckets, in the order of the input; returns how many there are."""
    if not parts:
        return 0
    files[0].parent.mkdir(parents=True, exist_ok=True)
    records = np.concatenate(parts)
    buckets = records[:, 0] >> np.uint64(56)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(_BUCKETS + 1))
    for bucket, file in enumerate(files):
        chosen = order[bounds[bucket] : bounds[bucket + 1]]
        if len(chosen):
            with file.open("ab") as handle:
                handle.write(records[chosen].tobytes())
    return len(records)


def _read_back(file: Path) -> np.ndarray:
    """Records of a bucket ``[n, 3]``, as they were written: each row once, in the order of the input."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())  # some disks tell only now that they had no room
        data = handle.read()
    if len(data) % _RECORD:
        raise _damaged(file)
    records = np.frombuffer(data, "<u8").reshape(-1, 3)
    if (records[1:, 2] <= records[:-1, 2]).any():
        raise _damaged(file)
    return records


def _damaged(place: Path) -> OutputError:
    return OutputError("--output", place, "does not hold the ids that were written there", "check the disk, run again")


def _repeats(records: np.ndarray) -> np.ndarray:
    """Row numbers of all but the first record of each hash; the records come in ascending order of rows."""
    order = np.lexsort((records[:, 1], records[:, 0]))  # stable: rows of one hash stay in order
    hashes = records[order, :2]
    again = np.zeros(len(records), dtype=bool)
    again[1:] = (hashes[1:] == hashes[:-1]).all(axis=1)
    return np.asarray(records[order[again], 2], dtype=np.int64)


def sampled(rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which rows belong to a random sample; a row's lot depends on its number and the seed alone.

    Args:
        rows: Numbers of rows within the whole input ``[N]``.
        share: Share of the rows to take, 0 to 1.
        seed: Another seed, another sample.

    Returns:
        A mask ``[N]``.
    """
    salt = int.from_bytes(hashlib.blake2b(f"sample/{seed}".encode(), digest_size=8).digest(), "little")
    mixed = np.asarray(rows).astype(np.uint64) + np.uint64(salt) if len(rows) else np.zeros(0, np.uint64)
    # The finaliser of SplitMix64: every bit of the number moves every bit of the result.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(11)) < np.uint64(round(share * 2**53)))
