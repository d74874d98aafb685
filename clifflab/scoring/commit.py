"""A block's files and the receipt that commits them; a job's manifest, whose counts add up.

A block is there when its receipt is: files without one are leftovers, and are written anew under the same names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clifflab import tables
from clifflab.artifacts import file_hash, package_versions, read_json, remove, write_atomic, write_json, write_parquet
from clifflab.errors import ClifflabError
from clifflab.scoring.job import (
    ATTEMPTS,
    BLOCKS,
    DUPLICATES,
    INDEX,
    MANIFEST,
    PARTS,
    RECEIPTS,
    REJECTS,
    SCORES,
    TRACES,
    Folder,
    has_size,
)
from clifflab.scoring.types import Block, Reject

Receipt = dict[str, Any]
_TOTALS = ("read", "scored", "tokens", "padding", "cut")
_AT_ONCE = 1000  # receipts that are held in memory
PARTS_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("kind", pa.string()),
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)


class CountsError(ClifflabError):
    """Rows were lost or doubled: a bug, or files that somebody changed."""

    exit_code = 1


def commit(
    folder: Folder, fingerprint: str, block: Block, found: dict[str, pa.Table], rejects: Sequence[Reject],
    about: dict[str, Any],
) -> Receipt:  # fmt: skip
    """Write a block's tables, and then its receipt.

    Args:
        folder: The job's folder.
        fingerprint: Of the job.
        block: The block.
        found: Tables by kind; an empty table of rejects is not written.
        rejects: Rows that are not scored.
        about: What else the receipt tells: ``read``, ``scored``, ``tokens``, ``padding``, ``cut``, ``way``
            and ``why``.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    rows = [[getattr(reject, name) for reject in rejects] for name in tables.SCORE_REJECTS.names]
    wanted = {**found, REJECTS: pa.table(rows, schema=tables.SCORE_REJECTS)}
    files = []
    for kind, table in wanted.items():
        path = folder.part(kind, block.number)
        if not table.num_rows and kind != SCORES:
            remove(path)  # a leftover of an attempt that went otherwise
            continue
        write_parquet(path, table)
        size, digest = path.stat().st_size, file_hash(path)
        files.append({"kind": kind, "file": f"{kind}/{path.name}", "rows": table.num_rows, "bytes": size})
        files[-1]["sha256"] = digest
    receipt = {
        "block": block.number,
        "rows": block.rows,
        "fingerprint": fingerprint,
        **about,
        "rejected": dict(sorted(Counter(reject.reason for reject in rejects).items())),
        "files": files,
    }
    if receipt["read"] != receipt["scored"] + len(rejects):
        raise CountsError(
            f"block {block.number}: {receipt['read']} rows read, {receipt['scored']} + {len(rejects)} out"
        )
    write_json(folder.receipt(block.number), receipt)
    return receipt


def committed(folder: Folder, fingerprint: str, block: int) -> Receipt | None:
    """A block's receipt, if it is there, this job's, and so are the files that it names."""
    receipt = read_json(folder.receipt(block))
    if not isinstance(receipt, dict) or receipt.get("fingerprint") != fingerprint:
        return None
    whole = all(has_size(folder.root / file["file"], file["bytes"]) for file in receipt["files"])
    return receipt if whole else None


def finish(
    folder: Folder, fingerprint: str, blocks: Sequence[Block], identity: dict[str, Any], probes: int
) -> dict[str, Any]:
    """Add the receipts up, write the manifest, and clear away what only an unfinished job needs.

    Args:
        folder: The job's folder.
        fingerprint: The job's.
        blocks: All its blocks.
        identity: What the fingerprint is made of.
        probes: How many probes are read of each trace.

    Raises:
        CountsError: A block has no receipt, or the counts do not add up.
    """
    totals, reasons, ways = Counter[str](), Counter[str](), Counter[str]()
    kept, why = set[str](), set[str]()

    def write(scratch: Path) -> None:
        with pq.ParquetWriter(scratch, PARTS_SCHEMA, compression="zstd") as writer:
            for start in range(0, len(blocks), _AT_ONCE):
                rows: list[dict[str, Any]] = []
                for block in blocks[start : start + _AT_ONCE]:
                    receipt = committed(folder, fingerprint, block.number)
                    if receipt is None:
                        raise CountsError(f"block {block.number} has no receipt; run again: it continues")
                    totals.update({name: receipt[name] for name in _TOTALS})
                    reasons.update(receipt["rejected"])
                    ways[receipt["way"]] += 1
                    why.update({receipt["why"]} - {""})
                    rows += [{"block": block.number, **file} for file in receipt["files"]]
                kept.update(row["file"] for row in rows)
                writer.write_table(pa.Table.from_pylist(rows, schema=PARTS_SCHEMA))

    write_atomic(folder.root / PARTS, write)
    manifest: dict[str, Any] = {
        "status": "complete",
        "fingerprint": fingerprint,
        **{name: totals[name] for name in _TOTALS},
        "rejected": sum(reasons.values()),
        "reasons": dict(sorted(reasons.items())),
        "blocks": len(blocks),
        "probes": probes,
        "ways": dict(sorted(ways.items())),
        "padded_because": sorted(why),
        "parts": {"file": PARTS, "files": len(kept), "sha256": file_hash(folder.root / PARTS)},
        "sides": {name: file_hash(folder.root / name) for name in (BLOCKS, DUPLICATES)},
        "identity": identity,
        "versions": package_versions(every=True),
    }
    if manifest["read"] != manifest["scored"] + manifest["rejected"]:
        raise CountsError(f"{manifest['read']} rows read, {manifest['scored']} scored, {manifest['rejected']} rejected")
    clear_strays(folder, kept)
    write_json(folder.root / MANIFEST, manifest)
    clear_work(folder)
    return manifest


def clear_work(folder: Folder) -> None:
    """Remove what only an unfinished job needs."""
    remove(folder.root / RECEIPTS)
    for name in (INDEX, ATTEMPTS):
        remove(folder.work(name))
    for left in folder.root.glob(".*.tmp"):  # of a run that was killed
        remove(left)


def clear_strays(folder: Folder, kept: Collection[str]) -> None:
    """Remove parts that no receipt names, and what a killed worker was writing."""
    for file in [file for kind in (SCORES, REJECTS, TRACES) for file in (folder.root / kind).glob("*")]:
        if f"{file.parent.name}/{file.name}" not in kept:
            remove(Path(file))
