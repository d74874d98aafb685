"""Blocks over Ray Data: tasks read and prepare them, a pool of actors scores, writes and commits them."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clifflab.config import RuntimeConfig
from clifflab.errors import ClifflabError, ConfigError, WorkerError, shorten
from clifflab.runtime.status.meters import record
from clifflab.scoring.commit import Receipt
from clifflab.scoring.job import WORK, Job
from clifflab.scoring.layout import SourceIndex
from clifflab.scoring.task import Corpus, UnitPreparer
from clifflab.scoring.types import Block, Source
from clifflab.scoring.wire import failed, failed_receipt, pack, receipt_of, receipt_row, unpack
from clifflab.scoring.worker import BlockScorer

# On a CPU an actor asks for less than its core, so that the tasks that feed it find a place beside it.
_ACTOR_CPUS, _TASK_CPUS, _GPU_ACTOR_CPUS = 0.75, 0.25, 0.5
_INIT_DEATHS = 20
_MESSAGES = "ray.log"
_MOST_TASKS = 4096
_IDLE_MS = 600_000


class InlinePool:
    """Everything in this process, block after block.

    Args:
        settings: Threads.
    """

    def __init__(self, settings: RuntimeConfig) -> None:
        self._settings = settings

    def index(self, one: Callable[[Source], SourceIndex], sources: Sequence[Source]) -> list[SourceIndex]:
        """Index every source, in order."""
        return [one(source) for source in sources]

    def run(
        self, job: Job, root: Path, fingerprint: str, corpus: Corpus, units: Sequence[list[Block]]
    ) -> Iterator[Receipt]:
        """Receipts in the order of the input."""
        scorer, prepare = BlockScorer(job, root, fingerprint, self._settings.threads), UnitPreparer(corpus)
        for unit in units:
            for prepared in prepare(unit):
                yield scorer(prepared)


class RayPool:
    """A Ray Dataset whose rows are blocks.

    Args:
        settings: Where Ray runs or how it is started, how many actors there are at most.
        least: Fewest actors; as many as there are at most by default.
        note: Told, in a line, what there is to say of a Ray that was joined.
    """

    def __init__(
        self, settings: RuntimeConfig, least: int | None = None, note: Callable[[str], None] | None = None
    ) -> None:
        self._settings, self._least, self._note = settings, least, note
        self._started = False

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            from clifflab.runtime.local import stop_ray

            stop_ray()

    def start(self) -> RayPool:
        """Join or start Ray, unless it is ready."""
        import torch

        from clifflab.runtime.local import start_ray

        settings = self._settings
        # Where a Ray is started on GPUs, workers are GPUs, and tasks need cores beside them.
        if settings.address is None and torch.cuda.is_available():
            settings = settings.model_copy(update={"workers": "auto"})
        # Else Ray ends a worker that waits for a second, where there are more than cores: the next task would import
        # the tokenizer's library anew, which takes longer than the task.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(_IDLE_MS))
        self._started |= start_ray(settings, self._note)
        return self

    def index(self, one: Callable[[Source], SourceIndex], sources: Sequence[Source]) -> list[SourceIndex]:
        """Index every source, in order; large inputs of many files by several tasks at once."""
        import ray

        if len(sources) == 1:
            return [one(sources[0])]
        task: Any = ray.remote(num_cpus=1)(_Indexed(one).__call__)
        try:
            found: list[Any] = ray.get([task.remote(source) for source in sources])
        except ray.exceptions.RayError as error:
            raise WorkerError(f"score: reading the ids failed ({_last_line(error)}); run again") from error
        for index in found:
            if isinstance(index, ClifflabError):
                raise index
        return found

    def run(
        self, job: Job, root: Path, fingerprint: str, corpus: Corpus, units: Sequence[list[Block]]
    ) -> Iterator[Receipt]:
        """Receipts as they come.

        Raises:
            ClifflabError: What a task or an actor met.
        """
        import ray

        from clifflab.runtime.local import native_messages_in

        rows = self._dataset(job, root, fingerprint, corpus, units)
        poison: WorkerError | None = None
        try:
            with native_messages_in(root / WORK / _MESSAGES):
                for row in rows.iter_rows():
                    try:
                        yield receipt_of(row)
                    except WorkerError as error:  # one block that cannot be done: the others can
                        poison = poison or error
        except ray.exceptions.RayError as error:
            where = root / WORK / _MESSAGES
            problem = f"score: the pipeline failed ({_last_line(error)}); Ray's messages are in {where}"
            raise WorkerError(f"{problem}; run again: it continues") from error
        finally:
            # A dataset that failed keeps its actors until it is collected.
            del rows
            gc.collect()
        if poison:
            raise poison

    def _dataset(self, job: Job, root: Path, fingerprint: str, corpus: Corpus, units: Sequence[list[Block]]) -> Any:
        """Units to prepared blocks in tasks, to receipts in actors; nothing runs before it is read."""
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(resources.get("GPU", 0))
        each = _gpus_of_one(job) if gpus else 0
        cores = resources.get("CPU", 1)
        # Beside actors on GPUs, which share cores, the tasks that feed them need a part of one.
        beside = max(1, int((cores - _TASK_CPUS) / _GPU_ACTOR_CPUS))
        places = min(int(gpus / each), beside) if gpus else max(1, int(cores))
        most = places if self._settings.workers == "auto" else min(self._settings.workers, places)
        if self._least and self._least > most:
            raise ConfigError("--min-workers", self._least, f"Ray has places for {most}", f"give at most {most}")
        most = max(1, min(most, sum(len(unit) for unit in units)))
        least = min(self._least or most, most)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a row of the dataset is a block of the corpus, and travels alone
        context.max_consecutive_actor_init_deaths = _INIT_DEATHS
        cpus = int(resources.get("CPU", 1))
        items = [{"unit": json.dumps([asdict(block) for block in unit])} for unit in units]
        rows: Any = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_TASKS))
        # Beside GPUs a task has a core, where there are more of them than actors.
        task_cpus = 1 if gpus and cpus >= 2 * gpus else _TASK_CPUS
        prepared = rows.map_batches(_Prepare(corpus), batch_size=1, num_cpus=task_cpus)
        return prepared.map_batches(
            _Score,
            fn_constructor_args=(job, str(root), fingerprint, 0 if gpus else self._settings.threads),
            batch_size=1,
            num_cpus=_GPU_ACTOR_CPUS if gpus else _ACTOR_CPUS,
            num_gpus=each,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
        )


def _gpus_of_one(job: Job) -> float:
    """GPUs of one scoring actor, on a machine that has as many."""
    import ray
    import torch

    from clifflab.models.fit import gpus_needed

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    largest = max(int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"])
    memory = torch.cuda.get_device_properties(0).total_memory >> 20 if torch.cuda.is_available() else None
    return gpus_needed(job.model, memory, largest)


class _Indexed:
    """Indexing in a task: a user's mistake comes back as a value, since Ray would print all of its stack."""

    def __init__(self, one: Callable[[Source], SourceIndex]) -> None:
        self._one = one

    def __call__(self, source: Source) -> SourceIndex | ClifflabError:
        try:
            return self._one(source)
        except ClifflabError as error:
            return error


class _Prepare:
    """Reads units and prepares their blocks, one row a block."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # every task has a core, or a part of one
        prepare = UnitPreparer(self._corpus)
        for text in rows["unit"].tolist():
            try:
                for prepared in prepare([Block(**block) for block in json.loads(text)]):
                    yield {name: [value] for name, value in pack(prepared).items()}
            except ClifflabError as error:
                yield {name: [value] for name, value in failed(error).items()}


class _Score:
    """The actor: its model stays loaded from block to block."""

    def __init__(self, job: Job, root: str, fingerprint: str, threads: int) -> None:
        self._node, self._error, self._model = _node(), "", job.model.name
        try:
            self._scorer = BlockScorer(job, Path(root), fingerprint, threads)
        except ClifflabError as error:
            self._error = failed_receipt(error)["error"]
        except Exception as error:  # noqa: BLE001 - Ray would try again and again: one line, and the end
            problem = f"score: the model cannot be made ready ({shorten(str(error) or type(error).__name__)})"
            self._error = failed_receipt(ClifflabError(problem))["error"]

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        for number in range(len(rows["error"])):
            row = {name: column[number] for name, column in rows.items()}
            try:
                if self._error:
                    found = {"receipt": "", "error": self._error}
                else:
                    receipt = self._scorer(unpack(row))
                    if not receipt.get("again"):  # else an earlier worker did it, and counted it
                        record("score", self._model, {**receipt, "rows": receipt["read"]}, receipt["seconds"])
                    found = receipt_row({**receipt, "node": self._node})
            except ClifflabError as error:
                found = failed_receipt(error)
            yield {name: [value] for name, value in found.items()}


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[-1])


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
