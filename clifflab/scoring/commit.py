"""A block's files and the receipt that commits them; a job's manifest, whose counts add up.

A block is there when its receipt is: files without one are leftovers, and are written anew under the same names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import file_hash, package_versions, read_json, remove, write_json, write_parquet
from clifflab.errors import ClifflabError
from clifflab.scoring.job import ATTEMPTS, INDEX, MANIFEST, PARTS, RECEIPTS, REJECTS, SCORES, TRACES, Folder
from clifflab.scoring.types import Block, Reject

Receipt = dict[str, Any]
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
        about: What else the receipt tells: ``read``, ``scored``, ``tokens``.

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
    """A block's receipt, if it is there and this job's."""
    receipt = read_json(folder.receipt(block))
    return receipt if isinstance(receipt, dict) and receipt.get("fingerprint") == fingerprint else None


def finish(folder: Folder, fingerprint: str, blocks: Sequence[Block], identity: dict[str, Any]) -> dict[str, Any]:
    """Add the receipts up, write the manifest, and clear away what only an unfinished job needs.

    Raises:
        CountsError: A block has no receipt.
    """
    receipts: list[Receipt] = []
    for block in blocks:
        receipt = committed(folder, fingerprint, block.number)
        if receipt is None:
            raise CountsError(f"block {block.number} has no receipt; run again: it continues")
        receipts.append(receipt)
    rejected: Counter[str] = Counter()
    for receipt in receipts:
        rejected.update(receipt["rejected"])
    files = [{"block": receipt["block"], **file} for receipt in receipts for file in receipt["files"]]
    write_parquet(folder.root / PARTS, pa.Table.from_pylist(files, schema=PARTS_SCHEMA))
    totals = {
        name: sum(receipt[name] for receipt in receipts) for name in ("read", "scored", "tokens", "padding", "cut")
    }
    manifest = {
        "status": "complete",
        "fingerprint": fingerprint,
        **totals,
        "rejected": sum(rejected.values()),
        "reasons": dict(sorted(rejected.items())),
        "blocks": len(blocks),
        "parts": {"file": PARTS, "files": len(files), "sha256": file_hash(folder.root / PARTS)},
        "identity": identity,
        "versions": package_versions(every=True),
    }
    if manifest["read"] != manifest["scored"] + manifest["rejected"]:
        raise CountsError(f"{manifest['read']} rows read, {manifest['scored']} scored, {manifest['rejected']} rejected")
    clear_strays(folder, (file["file"] for file in files))
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


def clear_strays(folder: Folder, files: Iterable[str]) -> None:
    """Remove parts that no receipt names, as an earlier layout of the blocks may have left them."""
    kept = set(files)
    for file in [file for kind in (SCORES, REJECTS, TRACES) for file in (folder.root / kind).glob("*")]:
        if f"{file.parent.name}/{file.name}" not in kept:
            remove(Path(file))
