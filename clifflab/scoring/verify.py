"""Checks of a finished job: its files are whole, its rows are all there once, its scores are those of the plain way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clifflab.artifacts import code_hash, file_hash, fingerprint, read_parquet
from clifflab.errors import InputError
from clifflab.scoring.job import BLOCKS, CODE, DUPLICATES, PARTS, REJECTS, SCORES, Folder, Job, input_identity
from clifflab.scoring.types import Block

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # of a score


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: Which check.
        passed: Whether all is as it should be.
        detail: A sentence.
    """

    name: str
    passed: bool
    detail: str


def verify(root: Path, rows: int, note: Callable[[str], None], seed: int | None = None) -> list[Check]:
    """Check a finished job.

    Args:
        root: Its folder.
        rows: How many rows are scored anew.
        note: Told of what takes time.
        seed: Of the sample; drawn anew each time by default.

    Raises:
        InputError: There is no finished job, or its input or model is not there any more.
    """
    folder = Folder(root)
    about, manifest = folder.about(), folder.manifest()
    if about is None or manifest is None:
        problem = "holds no finished job" if about is None else "holds a job that is not finished"
        raise InputError("--verify", root, problem, "give the --output of a finished clifflab score")
    note("checksums")
    checks = [_identity(about, manifest), *_files(folder, manifest)]
    if not all(check.passed for check in checks):
        return checks
    note("counts and ids")
    checks += _counts(folder, manifest)
    job = Job.model_validate(about["job"])
    if manifest["scored"] and job.generate is None:
        checks.append(_again(folder, job, about, rows, note, random.Random(seed)))
    elif job.generate is not None:
        checks.append(Check("scores", True, "not scored anew: the traces were generated"))
    return checks


def _identity(about: dict[str, Any], manifest: dict[str, Any]) -> Check:
    name = fingerprint(about["identity"])
    same = name == about["fingerprint"] == manifest["fingerprint"] == fingerprint(manifest["identity"])
    return Check("identity", same, f"fingerprint {name[:12]}" if same else "job.json and manifest.json differ")


def _files(folder: Folder, manifest: dict[str, Any]) -> Iterator[Check]:
    """Every file that is named is there and whole, and no other is."""
    parts = folder.root / PARTS
    if not parts.is_file() or file_hash(parts) != manifest["parts"]["sha256"]:
        yield Check("files", False, f"{PARTS} is missing or changed")
        return
    named = read_parquet(parts).to_pylist()
    for part in named:
        path = folder.root / part["file"]
        if not path.is_file():
            yield Check("files", False, f"{part['file']} is missing")
            return
        if file_hash(path) != part["sha256"]:
            yield Check("files", False, f"{part['file']} is changed")
            return
    there = {f"{kind}/{file.name}" for kind in (SCORES, REJECTS) for file in (folder.root / kind).glob("*")}
    if strange := sorted(there - {part["file"] for part in named}):
        yield Check("files", False, f"{strange[0]} belongs to no block")
        return
    yield Check("files", True, f"{len(named):,} files, checksums as written")


def _counts(folder: Folder, manifest: dict[str, Any]) -> Iterator[Check]:
    """Rows and ids: each row once, each scored id once."""
    scored, rejected, reasons = list[Any](), list[Any](), Counter[str]()
    names = list[Any]()
    for part in read_parquet(folder.root / PARTS).to_pylist():
        if part["kind"] == SCORES:
            table = pq.read_table(folder.root / part["file"], columns=["row", "id"], memory_map=False)
            # A row a probe: each trace counts once.
            firsts = np.unique(table["row"].to_numpy(), return_index=True)
            scored.append(firsts[0])
            names.append(_hashes(table["id"].take(pa.array(firsts[1]))))
        elif part["kind"] == REJECTS:
            table = pq.read_table(folder.root / part["file"], columns=["row", "reason"], memory_map=False)
            rejected.append(table["row"].to_numpy())
            counts = pc.value_counts(table["reason"])
            reasons.update(
                dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
            )
    none = np.zeros(0, dtype=np.int64)
    found, lost = np.concatenate([none, *scored]), np.concatenate([none, *rejected])
    every = np.concatenate([found, lost])
    once = len(np.unique(every)) == len(every)
    same = (len(found), len(lost)) == (manifest["scored"], manifest["rejected"])
    adds_up = manifest["read"] == manifest["scored"] + manifest["rejected"] and dict(reasons) == manifest["reasons"]
    counts = f"{len(found):,} scored + {len(lost):,} rejected = {manifest['read']:,} read"
    yield Check("counts", once and same and adds_up, counts if once else "a row is there twice")
    hashes = np.concatenate([np.zeros(0, dtype=np.dtype("S16")), *names])
    unique = len(np.unique(hashes)) == len(hashes)
    yield Check("ids", unique, f"{len(hashes):,} ids, each once" if unique else "an id is scored twice")


def _hashes(column: Any) -> Any:
    """16-byte hashes of texts."""
    import hashlib

    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in column.to_pylist()]
    return np.asarray(digests, dtype=np.dtype("S16"))


def _again(
    folder: Folder, job: Job, about: dict[str, Any], rows: int, note: Callable[[str], None], rng: random.Random
) -> Check:
    """Score a sample of rows the plain way, from the input on."""
    from clifflab.models.loading import load
    from clifflab.scoring.plain import score_plain
    from clifflab.scoring.probes import load_probes
    from clifflab.scoring.sources import find_sources
    from clifflab.scoring.table import inputs_of, scored_table
    from clifflab.scoring.task import Corpus, UnitPreparer

    if about["identity"]["code"] != code_hash(CODE):
        return Check("scores", False, "written by another version of clifflab; score again to compare")
    sources = find_sources(job.input)
    if input_identity(sources) != about["identity"]["input"]:
        return Check("scores", False, "the input changed since")
    blocks = [Block(**row) for row in read_parquet(folder.root / BLOCKS).to_pylist()]
    totals = {
        part["block"]: part["rows"] for part in read_parquet(folder.root / PARTS).to_pylist() if part["kind"] == SCORES
    }
    chosen = _choose({block.number: totals.get(block.number, 0) for block in blocks}, rows, rng)
    note(f"scoring rows of {len(chosen)} block{'s' if len(chosen) > 1 else ''} the plain way")
    loaded, probes = load(job.model), load_probes(job.probes, job.settings.probes)
    prepare = UnitPreparer(Corpus(job, tuple(sources), str(folder.root / DUPLICATES)))
    worst, count = 0.0, 0
    for block in blocks:
        if block.number not in chosen:
            continue
        kept = pq.read_table(folder.part(SCORES, block.number), memory_map=False)
        wanted = rng.sample(sorted(set(kept["row"].to_pylist())), chosen[block.number])
        for prepared in prepare([block]):
            ready = prepared.table.filter(pc.is_in(prepared.table["row"], pa.array(wanted, pa.int64())))
            if ready.num_rows != len(wanted):
                return Check("scores", False, f"block {block.number}: its rows are not those of the input")
            found = score_plain(loaded, probes, job.window, *inputs_of(ready))
            anew = scored_table(ready, found, probes, job.model.name, job.rows.name)
            mine = kept.filter(pc.is_in(kept["row"], pa.array(wanted, pa.int64())))
            gap, same = _gap(mine, anew)
            if not same:
                return Check("scores", False, f"block {block.number}: other ids, tokens or nulls than the plain way's")
            worst, count = max(worst, gap), count + len(wanted)
    limit = TOLERANCE[job.model.dtype]
    return Check("scores", worst <= limit, f"{count:,} rows scored the plain way, largest difference {worst:.1e}")


def _choose(totals: dict[int, int], rows: int, rng: random.Random) -> dict[int, int]:
    """How many rows of which blocks: a few blocks, since each has to be read and prepared."""
    numbers = [number for number, total in totals.items() if total]
    picked = rng.sample(numbers, min(len(numbers), 10))
    share = -(-rows // len(picked))
    return {number: min(totals[number], share) for number in picked}


def _gap(mine: pa.Table, anew: pa.Table) -> tuple[float, bool]:
    """Largest difference of a score, and whether all else is the same."""
    worst = 0.0
    for name in anew.schema.names:
        a, b = mine[name].combine_chunks(), anew[name].combine_chunks()
        if pa.types.is_list(a.type):
            a, b = pc.list_flatten(a), pc.list_flatten(b)
        if not pa.types.is_floating(a.type):
            if not a.equals(b):
                return worst, False
            continue
        if len(a) != len(b) or not pc.is_null(a).equals(pc.is_null(b)):
            return worst, False
        if not name.endswith("_logit"):
            gap = pc.max(pc.abs(pc.subtract(a, b))).as_py()
            worst = max(worst, gap or 0.0)
    return worst, True
