"""Fine-tuning on one or more workers, from a file of examples to an adapter; the same command goes on where it was."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clifflab.artifacts import code_version, file_hash, fingerprint, locked, package_versions, refuse_links
from clifflab.config import ModelSpec, RuntimeConfig, TuneConfig
from clifflab.data.files import check_source, source_hash
from clifflab.models.loading import absolute, fetch, load, load_renderer, model_identity, resolve_spec
from clifflab.runtime.events import Listener
from clifflab.runtime.progress import Reporter, Silent
from clifflab.runtime.status import Watcher, tell_whole
from clifflab.tuning.group import Alone, Group
from clifflab.tuning.loop import Listen
from clifflab.tuning.run import Order, check_finished, recipe, tune


@dataclass(frozen=True)
class _Body:
    """What each worker does; plain data, so that it crosses process borders."""

    spec: ModelSpec
    order: Order

    def __call__(self, group: Group, listen: Listen) -> dict[str, Any]:
        """Load the model and tune it."""
        return tune(load(self.spec), self.order, group, listen)


def fit(
    spec: ModelSpec,
    data: str,
    out: Path,
    settings: TuneConfig,
    seed: int = 0,
    *,
    runtime: str = "ray",
    ray: RuntimeConfig | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Tune a model on a file of examples.

    Args:
        spec: The model.
        data: The examples (see :func:`clifflab.tuning.examples.read_rows`).
        out: Folder for ``adapter/`` (or ``model/``), ``tuning.json``, and checkpoints until it is done.
        settings: The recipe.
        seed: Of the adapter's weights, the held-out groups and the order of the examples.
        runtime: ``ray`` for one or more workers, ``inline`` for this process.
        ray: Where Ray runs, or how it is started.
        reporter: Told of the progress.

    Returns:
        The content of ``tuning.json``.

    Raises:
        ClifflabError: A user's mistake, in one line.
    """
    reporter = reporter or Silent()
    check_source("--data", data)
    data, out = _absolute(data), out.absolute()  # workers have folders of their own
    spec = resolve_spec(absolute(spec))
    order = _order(spec, data, out, settings, seed)
    if (figures := check_finished(out, order.fingerprint)) is not None:
        reporter.note("everything is whole already: nothing to compute")
        tell_whole(out.name)
        return figures
    with locked(out):
        refuse_links(out)
        fetch(spec, reporter.note)
        load_renderer(spec)  # what is wrong with its thinking format shows here, before any worker starts
        place = out / ".work" / order.fingerprint[:16]
        for other in (out / ".work").glob("*"):
            if other != place:
                shutil.rmtree(other)
        watcher = Watcher(out, out.name)
        progress = Progress(reporter, spec.name, watcher.add)
        body = _Body(spec, order)
        try:
            if runtime == "inline":
                figures = body(Alone(place / "alone"), progress)
            else:
                figures = over_ray(body, place, settings, ray or RuntimeConfig(), progress, note=reporter.note)
            progress.close()
        except Exception as error:
            progress.fail(error)
            raise
        finally:
            reporter.abort()
            watcher.close()
        shutil.rmtree(out / ".work", ignore_errors=True)
    return figures


def over_ray(
    body: Any,
    place: Path,
    settings: TuneConfig,
    runtime: RuntimeConfig,
    listen: Listen,
    threads: int | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Let ``settings.workers`` workers do a tuning.

    Args:
        body: Called by each of them with its group and whom to tell of the progress.
        place: Folder of the checkpoints.
        settings: How many workers, and how many failures are too many.
        runtime: How Ray is started, unless it runs already.
        listen: Told of the progress.
        threads: Of each worker on a CPU; by default its share of the cores.
        note: Told, in a line, what there is to say of a Ray that was joined.
    """
    from clifflab.runtime.gang import Gang, run_gang

    workers = None if settings.workers == "auto" else settings.workers
    threads = threads or max(1, (os.cpu_count() or 1) // (workers or 1))
    return run_gang(body, Gang(place / "ray", workers, threads, settings.max_failures), runtime, listen, note)


def _absolute(path: str) -> str:
    """A path that is there, from the root; anything else (a hub id, ``organism:planted``) as it stands."""
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path


def _order(spec: ModelSpec, data: str, out: Path, settings: TuneConfig, seed: int) -> Order:
    base = model_identity(spec, file_hash)
    sha256 = source_hash(data)
    told = {"model": base, "data": sha256, "recipe": recipe(settings), "seed": seed}
    name = fingerprint({**told, "code": code_version(), "packages": package_versions()})
    return Order(data, sha256, out, settings, seed, base, name)


class Progress:
    """Turns what a training tells into a bar, into events, and into a line of text where it is tried again.

    Args:
        reporter: Who shows it.
        name: The model's name.
        listener: Told of it in the events of a run with one step, whose units are the optimizer's steps.
    """

    def __init__(self, reporter: Reporter, name: str, listener: Listener | None = None) -> None:
        self._reporter, self._title, self._started = reporter, f"tune {name}", False
        self._listener, self._step, self._last = listener, 0, time.time()

    def __call__(self, kind: str, entry: dict[str, Any]) -> None:
        """One message of the first worker."""
        if kind == "start":
            if self._started:
                self._reporter.note(f"a worker died: training goes on from step {entry['done']}")
                self._tell("worker_lost", reason="died")
            elif entry["done"]:
                self._reporter.note(f"training goes on from step {entry['done']}")
            if not self._started:
                self._reporter.start(self._title, entry["steps"], entry["done"])
                self._step = entry["done"]
                self._tell("run_start", steps=1)
                self._tell("step_start", units=entry["steps"], missing=entry["steps"] - entry["done"])
            self._started, self._last = True, time.time()
        elif kind == "step" and entry["step"] > self._step:  # steps may be done again after a failure
            self._step = entry["step"]
            self._reporter.advance(self._title)
            seconds, self._last = max(0.0, time.time() - self._last), time.time()
            self._tell("unit", unit=str(entry["step"]), seconds=seconds, tokens=entry["tokens"])
        elif kind == "validation":
            self._reporter.note(f"epoch {entry['epoch']}: held-out loss {entry['loss']:.4f}")

    def close(self) -> None:
        """It ended well."""
        if self._started:
            self._reporter.finish(self._title)
        self._tell("step_done")
        self._tell("run_done", state="done")

    def fail(self, error: Exception) -> None:
        """It ended by an error."""
        self._tell("run_done", state="failed", error=str(error))

    def _tell(self, event: str, **fields: Any) -> None:
        if self._listener is not None:
            self._listener({"time": time.time(), "event": event, "step": "tune", "model": None, **fields})
