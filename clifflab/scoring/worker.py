"""What one worker does with a prepared block: score it, write its files, commit it."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab.errors import WorkerError
from clifflab.models.loading import LoadedModel, load
from clifflab.scoring.commit import Receipt, commit, committed
from clifflab.scoring.job import ATTEMPTS, SCORES, TRACES, Folder, Job
from clifflab.scoring.kernel import Kernel
from clifflab.scoring.prepare import complete, spans_of_ready, traces_table
from clifflab.scoring.probes import load_probes
from clifflab.scoring.table import scored_table
from clifflab.scoring.types import Prepared, Reject

MAX_ATTEMPTS = 5


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

    def __call__(self, prepared: Prepared) -> Receipt:
        """Score one block; a block that is committed already is left as it is.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
            WorkerError: Workers died at this block too often.
        """
        block, name = prepared.block, self._job.rows.name
        there = committed(self._folder, self._fingerprint, block.number)
        if there is not None:
            return {**there, "again": True}
        self._attempt(block.number)
        began = time.monotonic()
        ready, rejects = prepared.table, list(prepared.rejects)
        if self._job.generate:
            ready, unfinished = complete(self._loaded, ready, self._job.generate, self._job.seed, name)
            rejects += unfinished
        spans = spans_of_ready(ready)
        ids = ready["token_ids"].to_pylist()
        found = self._kernel.score(ids, spans)
        table = scored_table(ready, found, self._probes, self._job.model.name, name)
        rejects += _problems(ready, found.problem, prepared)
        rejects.sort(key=lambda reject: reject.row)
        good = pa.array([not problem for problem in found.problem], pa.bool_())
        parts = {SCORES: table}
        if self._job.settings.keep_traces:
            parts[TRACES] = traces_table(ready.filter(good), self._job.model.name, name)
        about = {
            "read": prepared.read,
            "scored": sum(good.to_pylist()),
            "tokens": found.tokens,
            "padding": found.padding,
            "cut": int(pa.compute.sum(pa.compute.greater(ready["cut_tokens"], 0)).as_py() or 0),
        }
        receipt = commit(self._folder, self._fingerprint, block, parts, rejects, about)
        return {**receipt, "seconds": round(time.monotonic() - began, 3), "pid": os.getpid()}

    def _attempt(self, block: int) -> None:
        """Note that the block is begun.

        A block at which workers keep dying would otherwise be tried for ever.
        """
        place = self._folder.work(ATTEMPTS)
        place.mkdir(parents=True, exist_ok=True)
        begun = len(list(place.glob(f"{block:08d}-*")))
        if begun >= MAX_ATTEMPTS:
            raise WorkerError(
                f"score: block {block} was begun {begun} times and never finished: its workers died; look for a lack "
                "of memory, lower --token-budget, and run again: it continues"
            )
        (place / f"{block:08d}-{uuid.uuid4().hex[:12]}").touch()


def _problems(ready: pa.Table, problems: Any, prepared: Prepared) -> list[Reject]:
    """Rejects of traces that the model could not score."""
    details = {"not_finite": "the model yields numbers that are not finite", "too_long": "does not fit into memory"}
    rows, names = ready["row"].to_pylist(), ready["id"].to_pylist()
    source, base = prepared.source, prepared.block.base
    return [
        Reject(row, source, row - base, name, problem, details.get(problem, problem))
        for row, name, problem in zip(rows, names, problems, strict=True)
        if problem
    ]
