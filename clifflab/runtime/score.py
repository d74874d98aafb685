"""Scoring a corpus: find the input, lay out its blocks, do those that are not done, add up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from clifflab.artifacts import HashCache, output_error, read_parquet, remove, write_atomic, write_parquet
from clifflab.errors import OutputError
from clifflab.models.loading import absolute, load_renderer, model_identity, resolve_spec
from clifflab.models.sizes import model_sizes
from clifflab.runtime.progress import Counted
from clifflab.scoring.commit import Receipt, clear_work, committed, finish
from clifflab.scoring.ids import find_duplicates
from clifflab.scoring.job import ATTEMPTS, BLOCKS, DUPLICATES, EVENTS, HASHES, INDEX, Folder, Job
from clifflab.scoring.layout import SourceIndex, id_arrays, index_source, plan_blocks, units_of
from clifflab.scoring.probes import check_probes, load_probes
from clifflab.scoring.sources import find_sources
from clifflab.scoring.task import Corpus
from clifflab.scoring.types import Block, Source

Unit = list[Block]


class Pool(Protocol):
    """Carries units out: in this process, or over Ray Data."""

    def index(self, one: Callable[[Source], SourceIndex], sources: Sequence[Source]) -> list[SourceIndex]:
        """Index every source, in order."""
        ...

    def run(self, job: Job, root: Path, fingerprint: str, corpus: Corpus, units: Sequence[Unit]) -> Iterator[Receipt]:
        """Receipts of all blocks of the units, in any order."""
        ...


@dataclass(frozen=True)
class Finished:
    """What a job gave.

    Attributes:
        root: Its folder.
        manifest: Its manifest.
        again: Whether it was finished before: nothing was done.
    """

    root: Path
    manifest: dict[str, Any]
    again: bool


def score(job: Job, place: Path, pool: Callable[[], Pool], progress: Counted, *, overwrite: bool = False) -> Finished:
    """Score a corpus, or go on with it.

    Args:
        job: What to score; its model need not be resolved.
        place: Folder of the results.
        pool: Makes what carries the work out; asked only if there is work.
        progress: Told of every block.
        overwrite: Throw the results of another job away.

    Raises:
        InputError: The input, the model or the probes cannot be used.
        OutputError: The folder holds something else, or cannot be written.
        WorkerError: Workers died at one block too often.
    """
    if "://" in str(place):
        raise OutputError("--output", place, "is no local folder", "give a folder that all workers see")
    folder = Folder(place)
    job = job.model_copy(update={"model": resolve_spec(absolute(job.model))})
    sources = find_sources(job.input)
    probes = load_probes(job.probes, job.settings.probes)
    with folder.lock():
        hashes = HashCache(folder.work(HASHES))
        model, template = model_identity(job.model, hashes), load_renderer(job.model).template_hash
        sizes = model_sizes(job.model)
        check_probes(probes, model, template, sizes.layers, sizes.width)
        identity = job.identity(model, template, sources)
        fingerprint = folder.claim(job, identity, overwrite=overwrite)
        hashes.save()
        manifest = folder.manifest()
        if manifest is not None:
            clear_work(folder)
            return Finished(place, manifest, again=True)
        carrier = pool()
        blocks, duplicates = _layout(job, folder, sources, carrier, progress)
        corpus = Corpus(job, tuple(sources), str(duplicates))
        corpus.check(blocks)
        _work(job, folder, fingerprint, corpus, blocks, carrier, progress)
        return Finished(place, finish(folder, fingerprint, blocks, identity), again=False)


def _layout(
    job: Job, folder: Folder, sources: Sequence[Source], pool: Pool, progress: Counted
) -> tuple[list[Block], Path]:
    """The blocks and the rows whose id came before, found once and kept."""
    kept, duplicates = folder.root / BLOCKS, folder.root / DUPLICATES
    if kept.is_file() and duplicates.is_file():
        return [Block(**row) for row in read_parquet(kept).to_pylist()], duplicates
    progress.note(f"reading the ids of {len(sources)} file{'s' if len(sources) > 1 else ''}")
    rows = job.settings.block_rows
    indexes = pool.index(Indexer(job.rows.columns.get("id", "id"), rows, job.max_rows), sources)
    blocks = plan_blocks(indexes, job.max_rows)
    found = find_duplicates(id_arrays(sources, indexes), folder.work(INDEX))
    write_atomic(duplicates, lambda scratch: _save(scratch, found))
    names = list(Block.__dataclass_fields__)
    columns_of = {name: [getattr(block, name) for block in blocks] for name in names}
    schema = pa.schema([(name, pa.int64()) for name in names])
    write_parquet(kept, pa.table(columns_of, schema=schema))
    return blocks, duplicates


@dataclass(frozen=True)
class Indexer:
    """Indexes one source; plain data that crosses process borders."""

    id_column: str
    block_rows: int
    max_rows: int | None

    def __call__(self, source: Source) -> SourceIndex:
        """The source's rows, where its blocks begin, and hashes of its ids."""
        return index_source(source, self.id_column, self.block_rows, max_rows=self.max_rows)


def _save(path: Path, rows: Any) -> None:
    with path.open("wb") as handle:
        np.save(handle, rows)


def _work(
    job: Job, folder: Folder, fingerprint: str, corpus: Corpus, blocks: Sequence[Block], pool: Pool, progress: Counted
) -> None:
    """Do the blocks that have no receipt."""
    done = [committed(folder, fingerprint, block.number) for block in blocks]
    left = [block for block, receipt in zip(blocks, done, strict=True) if receipt is None]
    wanted = {block.number for block in left}
    events = _Events(folder.root / EVENTS)
    # Attempts count within a run: what kept failing may succeed with other settings, or more memory.
    events.write("start", blocks=len(blocks), done=len(blocks) - len(left), begun=_attempts(folder))
    remove(folder.work(ATTEMPTS))
    progress.begin(sum(block.rows for block in blocks), [receipt for receipt in done if receipt])
    if not left:
        return
    units = [[block for block in unit if block.number in wanted] for unit in units_of(corpus.sources, blocks)]
    try:
        for receipt in pool.run(job, folder.root, fingerprint, corpus, [unit for unit in units if unit]):
            events.block(receipt)
            progress.add(receipt)
        events.write("end", begun=_attempts(folder))
    finally:
        progress.end()


def _attempts(folder: Folder) -> int:
    """How often workers began a block since the last run began."""
    place = folder.work(ATTEMPTS)
    return sum(1 for _ in place.iterdir()) if place.is_dir() else 0


class _Events:
    """The log of a job, a line an event; appended to by every run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, kind: str, **about: Any) -> None:
        """Append an event."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **about})
        try:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise output_error(self._path, error) from None

    def block(self, receipt: Receipt) -> None:
        """A block is done."""
        names = ("block", "read", "scored", "tokens", "seconds", "pid", "node", "again")
        self.write("block", **{name: receipt[name] for name in names if name in receipt})
