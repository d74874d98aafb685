"""The input of a job as its tasks see it: units of blocks to prepared blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from clifflab.config import COLUMN_ROLES, PromptSet
from clifflab.data.prompts import PROMPT_COLUMNS
from clifflab.errors import InputError
from clifflab.models.loading import load_renderer
from clifflab.models.sizes import model_sizes
from clifflab.scoring.ids import sampled
from clifflab.scoring.job import Job
from clifflab.scoring.prepare import Preparer, check_columns
from clifflab.scoring.reading import columns_in, read_unit
from clifflab.scoring.types import Block, Prepared, Source

_CHECKED = 100  # rows that tell whether the columns are there


@dataclass(frozen=True)
class Corpus:
    """The input of a job.

    Attributes:
        job: The job.
        sources: Its files.
        duplicates: File of the rows whose id came before.
    """

    job: Job
    sources: tuple[Source, ...]
    duplicates: str

    def check(self, blocks: Sequence[Block]) -> None:
        """Whether the first rows have the columns, and every file whose columns are known without its rows.

        Raises:
            InputError: A column is missing; lists those that there are.
        """
        if not blocks:
            return
        for _, raw in read_unit(self.sources[blocks[0].source], blocks[:1]):
            check_columns(raw[:_CHECKED], self.job.rows, "--column")
        for place in sorted({block.source for block in blocks}):
            self._check_source(self.sources[place])

    def _check_source(self, source: Source) -> None:
        there, mapped = columns_in(source), self.job.rows.columns
        if there is None:
            return
        role, lost = next(((role, name) for role, name in mapped.items() if name not in there), ("", ""))
        if not lost and not {"prompt", "messages"} & set(mapped) and not set(PROMPT_COLUMNS) & set(there):
            role, lost = "prompt", " or ".join(PROMPT_COLUMNS)
        if lost:
            problem = f"{source.name} has no such column; there are: {', '.join(there)}"
            raise InputError("--column", f"{role}={lost}", problem, "name its columns, or leave the file out")


def columns_of(rows: PromptSet) -> tuple[str, ...]:
    """Columns that rows may be read from; those of a Parquet file that are not among them stay on the disk."""
    return (*PROMPT_COLUMNS, *(rows.columns.get(role, role) for role in COLUMN_ROLES))


class UnitPreparer:
    """Reads and prepares units.

    Args:
        corpus: The input.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._preparer = _preparer(corpus.job)
        self._duplicates: Any = np.load(corpus.duplicates, mmap_mode="r")

    def __call__(self, unit: Sequence[Block]) -> Iterator[Prepared]:
        """Prepared blocks of a unit, in order."""
        job, source = self._corpus.job, self._corpus.sources[unit[0].source]
        for block, raw in read_unit(source, unit, columns_of(job.rows)):
            first, last = np.searchsorted(self._duplicates, (block.base + block.start, block.base + block.stop))
            twice = set(self._duplicates[first:last].tolist())
            if job.sample is not None:
                kept = sampled(np.asarray([block.base + row.row for row in raw], dtype=np.int64), job.sample, job.seed)
                raw = [row for row, keep in zip(raw, kept.tolist(), strict=True) if keep]
            yield self._preparer.prepare(block, source, raw, twice)


def _preparer(job: Job) -> Preparer:
    """The job's preparer, kept as long as the process works for the same job."""
    return _kept(job.model_dump_json())


@lru_cache(maxsize=1)
def _kept(text: str) -> Preparer:
    job = Job.model_validate_json(text)
    return Preparer(load_renderer(job.model), model_sizes(job.model).context, job.rows, job.settings)
