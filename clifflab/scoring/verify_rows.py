"""Whether every row of the input came out once, under the right block, with every probe, and no id twice.

Files are read one block at a time; what is kept of a row are its number and a hash of its id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clifflab import tables
from clifflab.scoring.ids import WIDTH, hash_id, sampled
from clifflab.scoring.job import DUPLICATES, MANIFEST, REJECTS, SCORES, TRACES, Folder, Job
from clifflab.scoring.types import DUPLICATE_ID, NOT_FINITE, TOO_LONG, Block, Reject
from clifflab.scoring.verify_files import REMEDY, VerifyError, blocks_of, duplicates_of, table_of

NO_MEMORY = "does not fit into memory"  # detail of a trace that the model could not hold
_KEY = ("probe", "train_positions", "estimator", "layer")
_HASH = np.dtype(f"S{WIDTH}")
_TYPED = ("parquet", "saved", "hub")  # kinds of sources whose columns are read one by one

Rows = npt.NDArray[np.int64]


@dataclass
class Tally:
    """What the files of a job hold.

    Attributes:
        blocks: The blocks.
        scored: Traces with scores, by block.
        rejected: Rejects, by block.
        made: Rejects that only the model can tell.
        cut: Traces whose middle was cut out.
        least: Tokens of thinking and closing tokens: what the model read at least.
        reasons: Rejects by reason.
        ids: Numbers of rows and hashes of their ids, without duplicates.
        repeats: The same of the rejects whose id came before.
        nameless: Rejects without an id that could not be decoded: their rows and sources.
        detail: A sentence.
    """

    blocks: list[Block]
    scored: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)
    made: int = 0
    cut: int = 0
    least: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    ids: list[tuple[Rows, Any]] = field(default_factory=list)
    repeats: list[tuple[Rows, Any]] = field(default_factory=list)
    nameless: Counter[str] = field(default_factory=Counter)
    detail: str = ""


def model_made(reject: Mapping[str, Any] | Reject) -> bool:
    """Whether only the model can tell that a row is rejected."""
    about = reject if isinstance(reject, Mapping) else vars(reject)
    return about["reason"] == NOT_FINITE or (about["reason"], about["detail"]) == (TOO_LONG, NO_MEMORY)


def check_rows(folder: Folder, manifest: dict[str, Any], job: Job, parts: Mapping[tuple[str, int], Path]) -> Tally:
    """Every row of every block once, as a trace with every probe or as a reject; the manifest counts them so.

    Args:
        folder: The job's folder.
        manifest: Its manifest.
        job: The job.
        parts: Files by kind and block.

    Raises:
        VerifyError: A row is lost, doubled or in the wrong place, or a count differs.
    """
    tally, duplicates = Tally(blocks_of(folder)), duplicates_of(folder)
    probes = [
        "/".join([p["sha256"][:12], *(str(p[name]) for name in _KEY[1:])]) for p in manifest["identity"]["probes"]
    ]
    read = 0
    for block in tally.blocks:
        wanted = np.arange(block.base + block.start, block.base + block.stop, dtype=np.int64)
        if job.sample is not None:
            wanted = wanted[sampled(wanted, job.sample, job.seed)]
        read += len(wanted)
        scored = _scored(tally, block, parts[SCORES, block.number], sorted(probes))
        if (TRACES, block.number) in parts:
            _traces(parts[TRACES, block.number], scored)
        rejects = tables.SCORE_REJECTS.empty_table()
        if (REJECTS, block.number) in parts:
            rejects = table_of(parts[REJECTS, block.number], tables.SCORE_REJECTS)
        lost = _whole(rejects, "row", f"block {block.number}: rejects").to_numpy()
        _once(block, wanted, scored["row"].to_numpy(), lost)
        _rejected(tally, block, rejects)
        _duplicates(wanted, duplicates, rejects)
    _totals(manifest, tally, read)
    if job.max_rows is not None and sum(block.rows for block in tally.blocks) > job.max_rows:
        raise VerifyError(f"more rows than --max-rows {job.max_rows}; {REMEDY}")
    counts = f"{manifest['scored']:,} scored + {manifest['rejected']:,} rejected = {read:,} read"
    tally.detail = f"{counts}; {len(probes)} probe{'s' if len(probes) > 1 else ''} each"
    return tally


def _scored(tally: Tally, block: Block, path: Path, probes: Sequence[str]) -> pa.Table:
    """The traces of a part, one row each: row, id, trace_id."""
    about = f"block {block.number}: scores"
    names = ["row", "id", "trace_id", "cut_tokens", "thinking_tokens", "closing_tokens", *_KEY]
    table = table_of(path, tables.SCORED, names)
    for name in names:
        _whole(table, name, about)
    rows, firsts, places = np.unique(table["row"].to_numpy(), return_index=True, return_inverse=True)
    separator = pa.scalar("/")
    key = pc.binary_join_element_wise(*(table[name].cast(pa.string()) for name in _KEY), separator)
    keys, codes = _coded(key)
    pairs = np.bincount(places * max(len(keys), 1) + codes, minlength=len(rows) * len(keys))
    if (pairs != 1).any():
        place = int(np.flatnonzero(pairs != 1)[0])
        times = "is missing" if not pairs[place] else f"is there {pairs[place]} times"
        raise VerifyError(
            f"{about}: row {rows[place // len(keys)]} of probe {keys[place % len(keys)]} {times}; {REMEDY}"
        )
    if len(rows) and sorted(keys) != probes:
        raise VerifyError(f"{about}: {len(keys)} probes, which are not the job's {len(probes)}; {REMEDY}")
    for name in ("id", "trace_id", "cut_tokens", "thinking_tokens", "closing_tokens"):
        _, codes = _coded(table[name])
        if (codes != codes[firsts][places]).any():
            raise VerifyError(f"{about}: {name} of a row is not the same for all probes; {REMEDY}")
    traces = table.take(pa.array(firsts)).select(names[:6])
    tally.scored[block.number] = len(rows)
    tally.cut += int((traces["cut_tokens"].to_numpy() > 0).sum())
    tally.least += int(traces["thinking_tokens"].to_numpy().sum() + traces["closing_tokens"].to_numpy().sum())
    tally.ids.append((rows, _hashes(traces["id"])))
    return traces


def _traces(path: Path, scored: pa.Table) -> None:
    """The texts are those of the scored traces."""
    names = _whole(table_of(path, tables.TRACES, ["trace_id"]), "trace_id", path.stem).to_pylist()
    if sorted(names) != sorted(scored["trace_id"].to_pylist()):
        raise VerifyError(f"traces/{path.name}: other traces than those that are scored; {REMEDY}")


def _once(block: Block, wanted: Rows, scored: Rows, rejected: Rows) -> None:
    """The rows of a block are there, each once, and no others."""
    found = np.sort(np.concatenate([scored, rejected]))
    if np.array_equal(found, wanted):
        return
    if len(strange := np.setdiff1d(found, wanted)):
        raise VerifyError(f"block {block.number} holds row {strange[0]}, which is none of its rows; {REMEDY}")
    if len(lost := np.setdiff1d(wanted, found)):
        raise VerifyError(f"block {block.number}: row {lost[0]} is neither scored nor rejected; {REMEDY}")
    twice = found[:-1][found[1:] == found[:-1]]
    how = "both scored and rejected" if twice[0] in scored else "rejected twice"
    raise VerifyError(f"block {block.number}: row {twice[0]} is {how}; {REMEDY}")


def _rejected(tally: Tally, block: Block, rejects: pa.Table) -> None:
    """Count the rejects of a block, and keep their ids."""
    reasons = _whole(rejects, "reason", f"block {block.number}: rejects").to_pylist()
    if (rejects["row"].to_numpy() - block.base != rejects["source_row"].to_numpy()).any():
        raise VerifyError(f"block {block.number}: rejects: a row has another source_row than its own; {REMEDY}")
    tally.rejected[block.number] = len(reasons)
    tally.reasons.update(reasons)
    tally.made += sum(map(model_made, rejects.select(["reason", "detail"]).to_pylist()))
    named, again = pc.is_valid(rejects["id"]), pc.equal(rejects["reason"], DUPLICATE_ID)
    for kept, mask in ((tally.ids, pc.and_not(named, again)), (tally.repeats, pc.and_(named, again))):
        some = rejects.filter(mask)
        kept.append((some["row"].to_numpy(), _hashes(some["id"])))
    undecodable = pc.and_not(pc.equal(rejects["reason"], "undecodable"), named)
    tally.nameless.update(rejects.filter(undecodable)["source"].to_pylist())


def _duplicates(wanted: Rows, duplicates: Rows, rejects: pa.Table) -> None:
    """The rows whose id came before are rejected for it, and no others."""
    if not len(wanted):
        return
    first, last = np.searchsorted(duplicates, (wanted[0], wanted[-1] + 1))
    known = np.intersect1d(duplicates[first:last], wanted)
    again = rejects.filter(pc.equal(rejects["reason"], DUPLICATE_ID))["row"].to_numpy()
    if len(strange := np.setdiff1d(again, known)):
        raise VerifyError(f"row {strange[0]} is rejected as {DUPLICATE_ID}, which it is not in {DUPLICATES}; {REMEDY}")
    # A row that cannot be read has no id to repeat.
    nameless = rejects.filter(pc.is_null(rejects["id"]))["row"].to_numpy()
    if len(missed := np.setdiff1d(known, np.concatenate([again, nameless]))):
        raise VerifyError(f"row {missed[0]} is in {DUPLICATES} and not rejected as {DUPLICATE_ID}; {REMEDY}")


def _totals(manifest: dict[str, Any], tally: Tally, read: int) -> None:
    """The manifest's counts are those of the files."""
    found = {"read": read, "scored": tally.scored.total(), "rejected": tally.rejected.total()}
    for name, count in found.items():
        if manifest[name] != count:
            raise VerifyError(f"{MANIFEST} says {manifest[name]:,} {name}, the files hold {count:,}; {REMEDY}")
    if manifest["reasons"] != dict(tally.reasons):
        raise VerifyError(f"{MANIFEST} counts other reasons of rejects than the files hold; {REMEDY}")
    # A trace that the model could not score may have been cut before.
    if not tally.cut <= manifest["cut"] <= tally.cut + tally.made:
        raise VerifyError(
            f"{MANIFEST} says that {manifest['cut']:,} traces were cut, the files {tally.cut:,}; {REMEDY}"
        )
    if sum(manifest["ways"].values()) != manifest["blocks"]:
        raise VerifyError(f"{MANIFEST} counts {sum(manifest['ways'].values()):,} blocks by their way; {REMEDY}")
    if manifest["padding"] and "padded" not in manifest["ways"]:
        raise VerifyError(
            f"{MANIFEST} says {manifest['padding']:,} tokens of padding, and no block was padded; {REMEDY}"
        )
    if manifest["tokens"] < tally.least or (manifest["tokens"] and not tally.scored.total() + tally.made):
        raise VerifyError(f"{MANIFEST} says {manifest['tokens']:,} tokens, which the files do not fit; {REMEDY}")


def check_ids(tally: Tally, identity: Mapping[str, Any], job: Job) -> str:
    """No id twice among rows that are no duplicates; the id of each duplicate in an earlier row.

    Raises:
        VerifyError: It is not so.
    """
    rows, hashes = _joined(tally.ids)
    order = np.lexsort((rows, hashes))
    rows, hashes = rows[order], hashes[order]
    twice = np.flatnonzero(hashes[1:] == hashes[:-1])
    if len(twice):
        raise VerifyError(f"rows {rows[twice[0]]} and {rows[twice[0] + 1]} have the same id; {REMEDY}")
    again, repeated = _joined(tally.repeats)
    detail = f"{len(hashes):,} ids, each once"
    if job.sample is not None:  # the earlier row may not be in the sample
        return detail
    places = np.searchsorted(hashes, repeated)
    known = places < len(hashes)
    known[known] = hashes[places[known]] == repeated[known]
    known[known] = rows[places[known]] < again[known]
    orphans = again[~known]
    # Where columns are read one by one, a row that cannot be decoded may yet have had an id that a later one repeats.
    kinds = {source[0]: source[1] for source in identity.get("input", [])}
    spare = sum(count for source, count in tally.nameless.items() if kinds.get(source) in _TYPED)
    if len(np.unique(repeated[~known])) > spare:
        raise VerifyError(f"row {orphans[0]} is rejected as {DUPLICATE_ID}, and no row before it has its id; {REMEDY}")
    return f"{detail}; {len(again):,} repeated" if len(again) else detail


def _joined(parts: list[tuple[Rows, Any]]) -> tuple[Rows, Any]:
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(part[0] for part in parts)])
    return rows, np.concatenate([np.zeros(0, dtype=_HASH), *(part[1] for part in parts)])


def _hashes(column: Any) -> Any:
    return np.frombuffer(b"".join(map(hash_id, column.to_pylist())), dtype=_HASH)


def _whole(table: pa.Table, name: str, about: str) -> Any:
    """A column without nulls."""
    if table[name].null_count:
        raise VerifyError(f"{about}: {name} is null somewhere; {REMEDY}")
    return table[name]


def _coded(column: Any) -> tuple[list[Any], Any]:
    """Distinct values, and which of them stands in each row."""
    coded = column.combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)
