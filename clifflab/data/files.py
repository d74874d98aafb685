"""Rows of JSONL, JSON, CSV and Parquet files, of saved Hugging Face datasets and of hub datasets.

Every reader yields ``(row number, record or None, problem)``: a line that cannot be decoded is a broken row and not the
end of the run, a file that cannot be opened is an :class:`~clifflab.errors.InputError`.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clifflab.errors import InputError

Row = tuple[int, dict[str, Any] | None, str]
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def iter_rows(field: str, path: str) -> Iterator[Row]:
    """Rows of a source, in its order.

    Args:
        field: The config field that named the source, for error lines.
        path: A file, a folder of a saved dataset, or ``hf:NAME[:SPLIT]``.

    Raises:
        InputError: The source is missing, of an unknown kind, or broken as a whole.
    """
    if path.startswith("hf:"):
        yield from _hub_rows(field, path)
        return
    file = Path(path)
    check_source(field, path)
    if file.is_dir():
        yield from _saved_rows(field, file)
        return
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    reader = readers.get(file.suffix.lower(), _parquet_rows)
    try:
        yield from reader(field, file)
    except OSError as error:
        raise InputError(field, path, f"cannot be read ({error.strerror or error})", "check the file") from None


def check_source(field: str, path: str) -> None:
    """Fail early where a source is missing or of an unknown kind (cheap: opens nothing)."""
    if path.startswith(("hf:", "organism:")):
        return
    file = Path(path)
    if not file.exists():
        raise InputError(
            field, path, "no such file",
            "check the path: it counts from the study's folder, from --data DIR, or else from here",
        )  # fmt: skip
    if file.is_dir():
        return
    if file.suffix.lower() not in _SUFFIXES:
        raise InputError(field, path, "unknown kind of file", f"give one of {', '.join(_SUFFIXES)}, or a saved dataset")


def source_hash(path: str) -> str:
    """SHA-256 of a source's bytes (a folder: of its files in order); names are hashed where bytes are not at hand."""
    digest = hashlib.sha256()
    file = Path(path)
    if path.startswith(("hf:", "organism:")):
        digest.update(f"{path}@{hub_commit(path) if path.startswith('hf:') else ''}".encode())
        return digest.hexdigest()
    for part in sorted(file.rglob("*")) if file.is_dir() else [file]:
        if part.is_file():
            digest.update(part.relative_to(file).as_posix().encode())
            with part.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _jsonl_rows(field: str, file: Path) -> Iterator[Row]:
    with file.open("rb") as handle:
        number = -1
        for line in handle:
            if not line.strip():
                continue
            number += 1
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield number, None, f"line cannot be decoded ({error.__class__.__name__})"
                continue
            yield _as_row(number, record)


def _json_rows(field: str, file: Path) -> Iterator[Row]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            field, file, f"is not JSON ({error})", "mend it, or use .jsonl for one object a line"
        ) from None
    if not isinstance(records, list):
        raise InputError(field, file, "holds no list of rows", "give a JSON list of objects")
    for number, record in enumerate(records):
        yield _as_row(number, record)


def _csv_rows(field: str, file: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as handle:
        lines = _Lines(handle)
        reader = csv.DictReader(lines)
        try:
            names, begun = reader.fieldnames, lines.given
            if names and lines.ended:
                raise InputError(field, file, f"is not CSV ({open_quote(begun)})", "mend the file")
            for number, record in enumerate(reader):
                if lines.ended:
                    yield number, None, open_quote(lines.given - begun)
                    return
                begun = lines.given
                yield number, dict(record), ""
        except csv.Error as error:
            raise InputError(field, file, f"is not CSV ({error})", "mend the file") from None


class _Lines:
    """Lines as ``csv.reader`` takes them: within a record it asks for one more only while a quote is open.

    Attributes:
        given: How many were given.
        ended: Whether one more was asked for than there are.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.given, self.ended = 0, False
        self._lines = iter(lines)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        self.given += 1
        return line


def open_quote(lines: int) -> str:
    """What is wrong with the last record of a CSV file that ends inside a quoted field."""
    return f"a quote is opened and never closed, and takes in the last {lines} line{'s' * (lines != 1)}"


def _parquet_rows(field: str, file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=4096):
                for record in batch.to_pylist():
                    yield number, record, ""
                    number += 1
    except (pa.ArrowInvalid, pa.ArrowIOError, EOFError, ValueError, OverflowError) as error:
        raise InputError(field, file, f"is not a whole Parquet file ({error})", "write or copy it again") from None


def _saved_rows(field: str, folder: Path) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise InputError(
            field, folder, f"is not a saved dataset ({error})", "give a file, or one split saved"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(f"{folder}/{name}" for name in data)
        raise InputError(field, folder, "holds several splits", f"name one of {splits}")
    for number, record in enumerate(data):
        yield number, dict(record), ""


def _hub_rows(field: str, path: str) -> Iterator[Row]:
    import datasets

    _, _, rest = path.partition(":")
    name, _, split = rest.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, record in enumerate(data):
            yield number, dict(record), ""
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            field, path, f"cannot be loaded ({error})", "check its name and split, log in if gated"
        ) from None


def hub_commit(path: str) -> str:
    """Commit of a hub dataset; the name alone stands for it where the hub cannot be reached (a cached copy is read)."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path.removeprefix("hf:").partition(":")[0], timeout=10).sha)
    except Exception:  # noqa: BLE001 - the client's errors change with its version; loading reports what matters
        return "unreachable"


def _as_row(number: int, record: Any) -> Row:
    if not isinstance(record, dict):
        return number, None, f"row is no object but {type(record).__name__}"
    return number, record, ""
