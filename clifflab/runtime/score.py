"""Scoring a corpus: find the input, lay out its blocks, do those that are not done, add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from clifflab.artifacts import HashCache, read_parquet, refuse_links, remove, write_atomic, write_parquet
from clifflab.errors import ClifflabError, shorten
from clifflab.models.loading import absolute, load_renderer, model_identity, resolve_spec
from clifflab.models.sizes import model_sizes
from clifflab.runtime.events import EventLog
from clifflab.runtime.progress import Counted
from clifflab.runtime.status import Watcher, tell_whole
from clifflab.scoring.commit import Receipt, clear_work, committed, finish
from clifflab.scoring.ids import find_duplicates
from clifflab.scoring.job import ATTEMPTS, BLOCKS, DUPLICATES, EVENTS, HASHES, INDEX, Folder, Job
from clifflab.scoring.layout import SourceIndex, id_arrays, index_source, plan_blocks, units_of
from clifflab.scoring.probes import check_probes, load_probes
from clifflab.scoring.sources import find_sources
from clifflab.scoring.task import Corpus
from clifflab.scoring.types import Block, Source

Unit = list[Block]
_LOGGED = ("block", "read", "scored", "tokens", "seconds", "pid", "node", "again")  # of a receipt


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
    folder = Folder(place)
    job = _settled(job)
    sources = find_sources(job.input)
    probes = load_probes(job.probes, job.settings.probes)
    with folder.lock():
        refuse_links(folder.root)
        hashes = HashCache(folder.work(HASHES))
        model, template = model_identity(job.model, hashes), load_renderer(job.model).template_hash
        sizes = model_sizes(job.model)
        check_probes(probes, model, template, sizes.layers, sizes.width)
        identity = job.identity(model, probes, template, sources)
        mine = folder.holds(identity, overwrite=overwrite)
        manifest = folder.manifest() if mine else None
        if manifest is not None:
            folder.take(job, identity, anew=False)
            clear_work(folder)
            tell_whole(place.name)
            return Finished(place, manifest, again=True)
        carrier = pool()
        layout = _kept_layout(folder) if mine else None
        if layout is None:
            layout = _new_layout(job, folder, sources, carrier, progress)
        corpus = Corpus(job, tuple(sources), str(folder.root / DUPLICATES))
        corpus.check(layout.blocks)  # before anything is thrown away
        fingerprint = folder.take(job, identity, anew=not mine)
        hashes.save()
        layout.keep(folder)
        with _watched(folder) as events:
            _work(folder, fingerprint, corpus, layout.blocks, carrier, progress, events)
            manifest = finish(folder, fingerprint, layout.blocks, identity, len(probes))
        return Finished(place, manifest, again=False)


def _settled(job: Job) -> Job:
    """The job with its model resolved, and a full path for a local input."""
    path = job.input
    if "://" not in path and not path.startswith("hf:"):
        path = str(Path(path).expanduser().absolute())
    model = resolve_spec(absolute(job.model))
    return job.model_copy(update={"model": model, "input": path, "rows": job.rows.model_copy(update={"path": path})})


@dataclass(frozen=True)
class Layout:
    """How the input is done.

    Attributes:
        blocks: All blocks.
        duplicates: Rows whose id came before, ascending; ``None`` where they are kept already.
    """

    blocks: list[Block]
    duplicates: Any

    def keep(self, folder: Folder) -> None:
        """Write it down for the tasks, and for a resume; the blocks last."""
        if self.duplicates is None:
            return
        write_atomic(folder.root / DUPLICATES, lambda scratch: _save(scratch, self.duplicates))
        names = list(Block.__dataclass_fields__)
        columns = {name: [getattr(block, name) for block in self.blocks] for name in names}
        write_parquet(folder.root / BLOCKS, pa.table(columns, schema=pa.schema([(name, pa.int64()) for name in names])))


def _kept_layout(folder: Folder) -> Layout | None:
    """What an earlier run found."""
    if not (folder.root / BLOCKS).is_file() or not (folder.root / DUPLICATES).is_file():
        return None
    return Layout([Block(**row) for row in read_parquet(folder.root / BLOCKS).to_pylist()], None)


def _new_layout(job: Job, folder: Folder, sources: Sequence[Source], pool: Pool, progress: Counted) -> Layout:
    """One pass over the input: rows, where blocks begin, ids that come twice."""
    progress.note(f"reading the ids of {len(sources)} file{'s' if len(sources) > 1 else ''}")
    indexer = Indexer(job.rows.columns.get("id", "id"), job.settings.block_rows, job.max_rows)
    indexes = pool.index(indexer, sources)
    blocks = plan_blocks(indexes, job.max_rows)
    return Layout(blocks, find_duplicates(id_arrays(sources, indexes), folder.work(INDEX)))


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


@contextmanager
def _watched(folder: Folder) -> Iterator[EventLog]:
    """The job's event log, and with it its ``status.json`` and status lines; a failure is the last that they tell."""
    watcher = Watcher(folder.root, folder.root.name)
    events = EventLog(folder.root / EVENTS, [watcher.add])
    try:
        yield events
    except Exception as error:
        with suppress(ClifflabError):  # a full disk takes no word of it
            events.write("failed", error=shorten(str(error), 400))
        raise
    finally:
        watcher.close()


def _work(
    folder: Folder,
    fingerprint: str,
    corpus: Corpus,
    blocks: Sequence[Block],
    pool: Pool,
    progress: Counted,
    events: EventLog,
) -> None:
    """Do the blocks that have no receipt."""
    progress.begin(sum(block.rows for block in blocks))
    wanted: set[int] = set()
    for block in blocks:
        receipt = committed(folder, fingerprint, block.number)
        if receipt is None:
            wanted.add(block.number)
        else:
            progress.add(receipt)
    # Attempts count within a run: what kept failing may succeed with other settings, or more memory.
    events.write("start", blocks=len(blocks), done=len(blocks) - len(wanted), begun=_attempts(folder))
    remove(folder.work(ATTEMPTS))
    if not wanted:
        events.write("end", begun=0)
        return
    units = [[block for block in unit if block.number in wanted] for unit in units_of(corpus.sources, blocks)]
    progress.work()
    try:
        for receipt in pool.run(corpus.job, folder.root, fingerprint, corpus, [unit for unit in units if unit]):
            events.write("block", **{name: receipt[name] for name in _LOGGED if name in receipt})
            progress.add(receipt)
        events.write("end", begun=_attempts(folder))
    finally:
        progress.end()


def _attempts(folder: Folder) -> int:
    """How often workers began a block since the last run began."""
    place = folder.work(ATTEMPTS)
    return sum(1 for _ in place.iterdir()) if place.is_dir() else 0
