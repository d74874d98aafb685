"""What one worker does with a prepared block: score it, write its files, commit it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clifflab.artifacts import output_error
from clifflab.errors import WorkerError
from clifflab.models.forward import not_finite
from clifflab.models.loading import LoadedModel, load
from clifflab.scoring.commit import Receipt, commit, committed
from clifflab.scoring.generate import complete
from clifflab.scoring.job import ATTEMPTS, SCORES, TRACES, Folder, Job
from clifflab.scoring.kernel import Kernel
from clifflab.scoring.probes import load_probes
from clifflab.scoring.ready import traces_table
from clifflab.scoring.table import inputs_of, scored_table
from clifflab.scoring.types import NOT_FINITE, TOO_LONG, Prepared, Reject

MAX_ATTEMPTS = 5
_MANY = 100  # traces that a model must fail at before it is taken for broken


class BlockScorer:
    """Scores blocks with a model that is loaded once.

    Args:
        job: The job.
        root: Its output folder.
        fingerprint: The job's.
        threads: Threads on a CPU; 0 leaves them as they are.
        loaded: The model, if it is loaded already.
    """

    def __init__(
        self, job: Job, root: Path, fingerprint: str, threads: int = 0, loaded: LoadedModel | None = None
    ) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        self._job, self._folder, self._fingerprint = job, Folder(root), fingerprint
        self._loaded = loaded or load(job.model)
        self._probes = load_probes(job.probes, job.settings.probes)
        self._kernel = Kernel(self._loaded, self._probes, job.window, job.settings.token_budget)
        self._finite, self._broken = False, 0

    def __call__(self, prepared: Prepared) -> Receipt:
        """Score one block; a block that is committed already is left as it is.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
            InputError: The model yields nothing finite.
            WorkerError: Workers died at this block too often.
        """
        block, name = prepared.block, self._job.rows.name
        there = committed(self._folder, self._fingerprint, block.number)
        if there is not None:
            return {**there, "again": True}
        self._attempt(block.number)
        began = time.monotonic()
        ready, rejects = prepared.table, list(prepared.rejects)
        settings = self._job.settings
        if self._job.generate:
            ready, unfinished = complete(self._loaded, prepared, self._job.generate, self._job.seed, name, settings)
            rejects += unfinished
        found = self._kernel.score(*inputs_of(ready))
        self._check_finite([*found.problem, *(r.reason for r in rejects if r.reason == NOT_FINITE)])
        parts = {SCORES: scored_table(ready, found, self._probes, self._job.model.name, name)}
        good = pa.array([not problem for problem in found.problem], pa.bool_())
        if settings.keep_traces:
            generated = self._job.generate is not None
            parts[TRACES] = traces_table(ready.filter(good), self._job.model.name, name, generated=generated)
        rejects += _problems(ready, found.problem, prepared)
        rejects.sort(key=lambda reject: reject.row)
        about = {
            "read": prepared.read,
            "scored": pc.sum(good).as_py() or 0,
            "tokens": found.tokens,
            "padding": found.padding,
            "way": self._kernel.mode,
            "why": self._kernel.reason,
            "cut": pc.sum(pc.greater(ready.filter(good)["cut_tokens"], 0)).as_py() or 0,
        }
        receipt = commit(self._folder, self._fingerprint, block, parts, rejects, about)
        return {**receipt, "seconds": round(time.monotonic() - began, 3), "pid": os.getpid()}

    def _check_finite(self, problems: Sequence[str]) -> None:
        """Rows that are not finite are rejected one by one; a model that yields nothing else ends the job.

        Raises:
            InputError: No trace so far was finite, of many.
        """
        self._finite |= any(problem != NOT_FINITE for problem in problems)
        self._broken += len(problems)
        if not self._finite and self._broken >= _MANY:
            raise not_finite(self._loaded, f"in all of {self._broken} traces")

    def _attempt(self, block: int) -> None:
        """Note that the block is begun.

        A block at which workers keep dying would otherwise be tried for ever.
        """
        place = self._folder.work(ATTEMPTS)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for number in range(MAX_ATTEMPTS):
                with contextlib.suppress(FileExistsError):
                    (place / f"{block:08d}-{number}").touch(exist_ok=False)
                    return
        except OSError as error:
            raise output_error(place, error) from None
        raise WorkerError(
            f"score: block {block} was begun {MAX_ATTEMPTS} times and never finished: its workers died; look for a "
            "lack of memory, lower --token-budget, and run again: it continues"
        )


def _problems(ready: pa.Table, problems: Any, prepared: Prepared) -> list[Reject]:
    """Rejects of traces that the model could not score."""
    details = {NOT_FINITE: "the model yields numbers that are not finite", TOO_LONG: "does not fit into memory"}
    rows, names = ready["row"].to_pylist(), ready["id"].to_pylist()
    source, base = prepared.source, prepared.block.base
    return [
        Reject(row, source, row - base, name, problem, details.get(problem, problem))
        for row, name, problem in zip(rows, names, problems, strict=True)
        if problem
    ]
