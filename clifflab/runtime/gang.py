"""Work that a group of workers does together, over Ray Train: after a death it goes on from the last checkpoint.

The work itself is a function of a :class:`~clifflab.tuning.group.Group`, the same that one process runs alone.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clifflab.artifacts import read_json, write_json
from clifflab.config import RuntimeConfig
from clifflab.errors import ClifflabError, InputError, WorkerError, shorten
from clifflab.runtime.local import start_ray, stop_ray
from clifflab.tuning.group import FirstWorkerError, Group, WriteFolder, writing
from clifflab.tuning.loop import Listen, NonFiniteLossError

Body = Callable[[Group, Listen], dict[str, Any]]
_LOOPBACK = Path("/sys/class/net/lo")


@dataclass(frozen=True)
class Gang:
    """How a group works.

    Attributes:
        folder: Absolute path for checkpoints and messages, on a disk that all workers see. The same folder goes on from
            its last checkpoint.
        workers: How many; ``None`` is one per GPU, or one.
        threads: Threads of each on a CPU.
        max_failures: How often it begins again when a worker dies.
        cpus: Cores of each worker beside a GPU.
    """

    folder: Path
    workers: int | None
    threads: int
    max_failures: int
    cpus: float = 1.0


def run_gang(
    body: Body, gang: Gang, runtime: RuntimeConfig, listen: Listen, note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Let a group do the work; Ray is joined or started here unless it is ready.

    Args:
        body: Called by every worker with its group; what the first one returns is the result, plain data.
        gang: How many they are, and where they keep checkpoints.
        runtime: Where Ray runs, or how it is started.
        listen: Told of what the first worker says. A step may come twice, when it was done again after a failure.
        note: Told, in a line, what there is to say of a Ray that was joined.

    Raises:
        ClifflabError: A user's error that some worker met: never tried again.
        WorkerError: Workers died more often than allowed.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if _LOOPBACK.exists() and runtime.address is None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # inherited by the workers of a Ray that is started here
    more = gang.workers is not None and gang.workers > (os.cpu_count() or 1)  # the user's choice
    started = start_ray(runtime.model_copy(update={"workers": gang.workers if more else "auto"}), note)
    import ray

    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(resources.get("GPU", 0))
        wanted = gang.workers if gang.workers is not None else gpus or 1
        places = gpus or int(resources.get("CPU", 0))
        if wanted > places:
            unit = "GPUs" if gpus else "CPU cores"
            problem = f"Ray has {places} {unit}, and each worker takes one"
            raise InputError("tune.workers", wanted, problem, f"give at most {places}, or auto")
        gang.folder.mkdir(parents=True, exist_ok=True)
        for file in gang.folder.glob("*-*.json*"):
            file.unlink()
        post = _Post(gang.folder, secrets.token_hex(4))
        _fit(body, gang, wanted, bool(gpus), post, listen)
    finally:
        if started:
            stop_ray()
    result: dict[str, Any] = read_json(post.result)
    return result


@dataclass(frozen=True)
class _Post:
    """Files by which workers speak to the driver; workers of a driver that was killed have others.

    Attributes:
        folder: Where they are.
        name: Of this run.
    """

    folder: Path
    name: str

    @property
    def result(self) -> Path:
        """What the first worker returned."""
        return self.folder / f"result-{self.name}.json"

    @property
    def error(self) -> Path:
        """A user's error."""
        return self.folder / f"error-{self.name}.json"

    @property
    def events(self) -> Path:
        """What the first worker told of its progress."""
        return self.folder / f"events-{self.name}.jsonl"


def _fit(body: Body, gang: Gang, workers: int, use_gpu: bool, post: _Post, listen: Listen) -> None:
    """Train in a thread of its own, so that this one hears of the progress and of an interrupt."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={"body": body, "post": post, "threads": gang.threads},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": gang.cpus, "GPU": 1} if use_gpu else None
        ),
        run_config=RunConfig(
            name=gang.folder.name,
            storage_path=str(gang.folder.parent),
            failure_config=FailureConfig(max_failures=gang.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    heard = _Tail(post.events, listen)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        heard.read()
    heard.read()
    if error := read_json(post.error):
        raise _told(error)
    if failed:
        if isinstance(failed[0], TrainingFailedError) and (dead := _deaths(failed[0])):
            raise WorkerError(
                f"tune: its workers died more often than tune.max_failures = {gang.max_failures} allows "
                f"({shorten(dead[0])}); look for a lack of memory, or lower tune.micro_tokens, and run again: "
                "it continues"
            ) from failed[0]
        raise failed[0]


def _deaths(error: Any) -> list[str]:
    """Why workers died, where some did; the others then fail too, in the middle of an exchange. A bug kills none."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    found = []
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "health_check_failure", failure)
        if isinstance(cause, RayActorError | OutOfMemoryError | NodeDiedError | WorkerCrashedError):
            found.append((str(cause).strip() or type(cause).__name__).splitlines()[-1])
    return found


def _work(config: dict[str, Any]) -> None:
    """What each worker runs, again after every failure."""
    import torch

    post: _Post = config["post"]
    if post.error.exists():  # an error of the user's ended the attempt before: there is nothing to try again
        return
    torch.set_num_threads(config["threads"])
    group = RayGroup(post.folder)

    def listen(kind: str, entry: dict[str, Any]) -> None:
        with post.events.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"kind": kind, "pid": os.getpid(), **entry}) + "\n")

    try:
        result = config["body"](group, listen)
    except FirstWorkerError:
        raise  # the first worker says what it met
    except ClifflabError as error:
        write_json(post.error, {"text": str(error), "exit_code": error.exit_code})
        if group.size > 1 and not isinstance(error, NonFiniteLossError):
            raise  # the others may wait for this one
        return
    if group.rank == 0:
        write_json(post.result, result)


class RayGroup:
    """The workers of one Ray Train run, as one of them sees them.

    Args:
        folder: Where checkpoints are put together.
    """

    def __init__(self, folder: Path) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self._folder = folder

    def wrap(self, model: Any) -> Any:
        """The model in DistributedDataParallel."""
        from ray.train.torch import prepare_model

        return prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})

    def apart(self, wrapped: Any) -> AbstractContextManager[Any]:
        """Gradients are not exchanged within it."""
        found: AbstractContextManager[Any] = wrapped.no_sync() if self.size > 1 else nullcontext()
        return found

    def total(self, values: Any) -> Any:
        """Sum over all workers."""
        import torch.distributed as dist

        if self.size > 1:
            dist.all_reduce(values)
        return values

    def save(self, write: WriteFolder, step: int) -> None:
        """Report a checkpoint to Ray Train, which copies it to the folder and deletes the one before."""
        import ray.train

        with writing(self._folder), tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=self._folder) as scratch:
            checkpoint = None
            if self.rank == 0:
                write(Path(scratch))
                checkpoint = ray.train.Checkpoint.from_directory(scratch)
            ray.train.report({"step": step}, checkpoint=checkpoint)

    def restore(self) -> Path | None:
        """The last checkpoint that was reported, by this run or by one before in the same folder."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        return Path(checkpoint.path) if checkpoint else None


class _Tail:
    """Passes on what is appended to a file of JSON lines."""

    def __init__(self, path: Path, listen: Listen) -> None:
        self._path, self._listen, self._place = path, listen, 0

    def read(self) -> None:
        """Tell what is new since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._place)
            lines = handle.read()
        whole = lines.rfind(b"\n") + 1
        self._place += whole
        for line in lines[:whole].splitlines():
            entry = json.loads(line)
            self._listen(entry.pop("kind"), entry)


def _told(error: dict[str, Any]) -> ClifflabError:
    """A worker's error of the user's, with its line and exit code."""
    found = ClifflabError(error["text"])
    found.exit_code = error["exit_code"]
    return found
