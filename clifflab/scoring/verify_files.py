"""Whether a finished job's files are there, whole and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clifflab import tables
from clifflab.artifacts import file_hash
from clifflab.scoring.commit import PARTS_SCHEMA
from clifflab.scoring.job import BLOCKS, DUPLICATES, PARTS, REJECTS, SCORES, TRACES, Folder, Job
from clifflab.scoring.types import Block

REMEDY = "delete the folder and score again"
SCHEMAS = {SCORES: tables.SCORED, REJECTS: tables.SCORE_REJECTS, TRACES: tables.TRACES}
_BLOCK = pa.schema([(name, pa.int64()) for name in Block.__dataclass_fields__])


class VerifyError(Exception):
    """What a check found wrong: a sentence."""


def check_files(folder: Folder, manifest: dict[str, Any], job: Job) -> tuple[dict[tuple[str, int], Path], str]:
    """Every file that is named is there and whole, every block has its files, and no other file is there.

    Returns:
        The files by kind and block, and a sentence.

    Raises:
        VerifyError: They are not as they were written.
    """
    listed = manifest["parts"]
    _same(folder.root / PARTS, PARTS, listed.get("sha256"))
    for side in (BLOCKS, DUPLICATES):
        _same(folder.root / side, side, manifest["sides"].get(side))
    parts = table_of(folder.root / PARTS, PARTS_SCHEMA).to_pylist()
    if len(parts) != listed.get("files"):
        raise VerifyError(f"{PARTS} names {len(parts):,} files, {listed.get('files')} were written; {REMEDY}")
    blocks = blocks_of(folder)
    if len(blocks) != manifest["blocks"]:
        raise VerifyError(f"{BLOCKS} has {len(blocks):,} blocks, {manifest['blocks']:,} were scored; {REMEDY}")
    files = dict[tuple[str, int], Path]()
    for part in parts:
        kind, block, name = str(part["kind"]), part["block"], str(part["file"])
        ours = kind in SCHEMAS and block in range(len(blocks)) and (kind, block) not in files
        if not ours or name != f"{kind}/{folder.part(kind, block).name}":
            raise VerifyError(f"{PARTS} names {name}, which is no file of a block, or is named twice; {REMEDY}")
        path = folder.part(kind, block)
        _same(path, name, part["sha256"])
        about = _metadata(path, name)
        if (about.num_rows, path.stat().st_size) != (part["rows"], part["bytes"]):
            raise VerifyError(f"{name} has other rows or bytes than {PARTS} says; {REMEDY}")
        files[kind, block] = path
    whole = {(SCORES, block.number) for block in blocks}
    if job.settings.keep_traces:
        whole |= {
            (TRACES, number) for kind, number in files if kind == SCORES and _metadata(files[kind, number], "").num_rows
        }
    if lost := sorted(whole - set(files)):
        raise VerifyError(f"block {lost[0][1]} has no file of {lost[0][0]}; {REMEDY}")
    there = {file for kind in SCHEMAS for file in (folder.root / kind).glob("*")}
    if strange := sorted(there - set(files.values())):
        raise VerifyError(f"{strange[0].parent.name}/{strange[0].name} belongs to no block; delete it")
    return files, f"{len(files):,} files, checksums as written"


def blocks_of(folder: Folder) -> list[Block]:
    """The blocks: one behind the other, without gaps.

    Raises:
        VerifyError: They are not.
    """
    blocks = [Block(**row) for row in table_of(folder.root / BLOCKS, _BLOCK).to_pylist()]
    row = 0
    for number, block in enumerate(blocks):
        before = blocks[number - 1] if number else None
        next_in_file = before is not None and before.source == block.source
        start = before.stop if before is not None and next_in_file else 0
        if (block.number, block.base + block.start, block.start) != (number, row, start) or block.rows < 1:
            raise VerifyError(f"{BLOCKS}: block {number} does not follow the one before; {REMEDY}")
        row += block.rows
    return blocks


def duplicates_of(folder: Folder) -> Any:
    """Rows whose id came before, ascending, ``[M]`` int64.

    Raises:
        VerifyError: The file cannot be read.
    """
    try:
        rows: Any = np.load(folder.root / DUPLICATES, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise VerifyError(f"{DUPLICATES} is damaged ({type(error).__name__}); {REMEDY}") from None
    if rows.ndim != 1 or rows.dtype != np.int64 or (np.diff(rows) <= 0).any():
        raise VerifyError(f"{DUPLICATES} holds no ascending numbers of rows; {REMEDY}")
    return rows


def table_of(path: Path, schema: pa.Schema, names: list[str] | None = None) -> pa.Table:
    """Columns of a table of the job.

    Args:
        path: The file.
        schema: What it should hold; more columns may be there.
        names: Which columns are read; all by default.

    Raises:
        VerifyError: The file is missing or damaged, or lacks a column.
    """
    name = path.name if path.parent.name not in SCHEMAS else f"{path.parent.name}/{path.name}"
    try:
        there = pq.read_schema(path)
        for field in schema:
            if field.name not in there.names or there.field(field.name).type != field.type:
                raise VerifyError(f"{name} has no column {field.name} of {field.type}; {REMEDY}")
        return pq.read_table(path, columns=names or schema.names, memory_map=False)
    except FileNotFoundError:
        raise VerifyError(f"{name} is missing; {REMEDY}") from None
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"{name} is damaged ({type(error).__name__}); {REMEDY}") from None


def _same(path: Path, name: str, wanted: str | None) -> None:
    """Whether a file is there and has its checksum."""
    if not path.is_file():
        raise VerifyError(f"{name} is missing; {REMEDY}")
    if not wanted:
        raise VerifyError(f"{name} has no checksum in the manifest; {REMEDY}")
    try:
        found = file_hash(path)
    except OSError as error:
        raise VerifyError(f"{name} cannot be read ({error.strerror}); {REMEDY}") from None
    if found != wanted:
        raise VerifyError(f"{name} is changed; {REMEDY}")


def _metadata(path: Path, name: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"{name} is damaged ({type(error).__name__}); {REMEDY}") from None
