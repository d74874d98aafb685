"""Running a study from its first missing piece to its report."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clifflab.artifacts import (
    HashCache,
    code_version,
    file_hash,
    locked,
    package_versions,
    read_json,
    remove,
    write_json,
    write_text,
)
from clifflab.config import Study
from clifflab.models.loading import fetch
from clifflab.runtime.events import EventLog
from clifflab.runtime.prepare import check_format
from clifflab.runtime.prepare import prepare as prepare
from clifflab.runtime.progress import Reporter, Silent
from clifflab.runtime.work import Job, Result
from clifflab.stages import STEPS, Context, Identities
from clifflab.stages.base import Pair, ordered, upstream
from clifflab.studyfile import dump_study


class Runtime(Protocol):
    """Does jobs somewhere."""

    workers: int

    def run(self, jobs: list[Job]) -> Iterator[Result]:
        """Results as they come."""
        ...

    def lost(self) -> list[dict[str, object]]:
        """Workers lost since the last call."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


@dataclass(frozen=True)
class StudyResult:
    """Where a finished study lies, and what it found.

    Attributes:
        root: Its folder.
        metrics: The content of ``metrics.json``.
        warnings: What a reader of the numbers must know; not empty where a probe could not be trained.
    """

    root: Path
    metrics: dict[str, Any]
    warnings: list[str]


def run(
    study: Study, out: Path | str = "runs", *, runtime: str | None = None, reporter: Reporter | None = None
) -> StudyResult:
    """Run a study, or what is missing of it.

    Args:
        study: What to measure.
        out: Parent folder; results go to ``out/<study.name>/``.
        runtime: ``ray`` or ``inline``; the study's own setting by default.
        reporter: Told of the progress.

    Raises:
        ClifflabError: A user's mistake, in one line.
    """
    reporter = reporter or Silent()
    study = prepare(study)
    root = (Path(out) / study.name).absolute()
    with locked(root):
        context = identify(study, root)
        write_text(root / "study.yaml", dump_study(study))
        todo = plan(context)
        log = EventLog(root / "events.jsonl")
        kind = runtime or study.runtime.kind
        log.write("run_start", driver_pid=os.getpid(), runtime=kind, code=code_version(), steps=len(todo))
        _sweep(context, todo)
        if todo:
            for index, spec in enumerate(context.study.models):  # once, here, before several workers want it
                fetch(spec, reporter.note)
                if ("traces", spec.name) in todo:
                    check_format(index, spec)
            (root / "manifest.json").unlink(missing_ok=True)
            for name, model in todo:  # what is about to be computed anew, or follows from it, is no longer whole
                context.layout.manifest(name, model).unlink(missing_ok=True)
            _carry_out(context, todo, _start(kind, context), log, reporter)
        else:
            reporter.note("everything is whole already: nothing to compute")
        manifest = _manifest(context)
        if read_json(root / "manifest.json") != manifest:
            write_json(root / "manifest.json", manifest)
        shutil.rmtree(root / ".work", ignore_errors=True)
        log.write("run_done")
    metrics = read_json(root / "metrics.json")
    warnings = [f"{name}: {m['probe']['reason']}" for name, m in metrics["models"].items() if m["probe"].get("reason")]
    return StudyResult(root, metrics, warnings)


def identify(study: Study, root: Path) -> Context:
    """The driver's context of a prepared study: its fingerprints are computed here and nowhere else."""
    hashes = HashCache(root / ".steps" / "hashes.json")
    context = Context(study, root, Identities.of(study, STEPS, hashes))
    if root.is_dir():
        hashes.save()
    return context


def plan(context: Context) -> list[Pair]:
    """The steps to run, in order: ``(step, model)``; models one after the other.

    These are the steps that are not whole, and all that follow from them.
    """
    pairs, missing = ordered(context.study, STEPS), set[Pair]()
    for name, model in pairs:
        reads = upstream(context.study, STEPS, name, model)
        stale = any(pair in missing and not STEPS[pair[0]].transient for pair in reads)
        if stale or not _whole(context, name, model):
            missing.add((name, model))
    return [pair for pair in pairs if pair in missing and _needed(pair, missing)]


def _needed(pair: Pair, missing: set[Pair]) -> bool:
    """A transient step runs only for a step that is missing."""
    name, model = pair
    return not STEPS[name].transient or any((reader, model) in missing for reader in _readers(name))


def _readers(name: str) -> list[str]:
    return [step.name for step in STEPS.values() if name in step.inputs]


def _carry_out(context: Context, todo: list[Pair], runtime: Runtime, log: EventLog, reporter: Reporter) -> None:
    try:
        log.write("workers", count=runtime.workers)
        for name, model in todo:
            step = STEPS[name]
            jobs = [Job(name, model, unit) for unit in step.plan(context, model)]
            missing = [job for job in jobs if job.unit and not context.part(job.unit).exists()]
            reporter.start(f"{name} {model or ''}".strip(), len(jobs), len(jobs) - len(missing))
            log.write("step_start", step=name, model=model, units=len(jobs), missing=len(missing))
            _do(runtime, missing, log, reporter)
            merged = _do(runtime, [Job(name, model)], log, reporter)[0]
            _finish_step(context, name, model, merged.counts)
            log.write("step_done", step=name, model=model, **merged.counts)
            reporter.finish()
    finally:
        reporter.abort()
        runtime.close()


def _do(runtime: Runtime, jobs: list[Job], log: EventLog, reporter: Reporter) -> list[Result]:
    results: list[Result] = []
    try:
        for result in runtime.run(jobs):
            log.result(result)
            if result.error:
                raise result.error
            results.append(result)
            if result.job.unit:
                reporter.advance()
    finally:
        for loss in runtime.lost():
            log.write("worker_lost", **loss)
            reporter.note(
                f"a worker died at {loss['step']} {loss['unit']} (try {loss['attempt']}): done again elsewhere"
            )
    return results


def _finish_step(context: Context, name: str, model: str | None, counts: dict[str, Any]) -> None:
    """Write the step's manifest, then delete the unit files that nothing reads any more."""
    step, layout = STEPS[name], context.layout
    manifest = {
        "fingerprint": context.identity(name, model),
        "outputs": {str(path.relative_to(layout.root)): file_hash(path) for path in step.outputs(layout, model)},
        "counts": counts,
        "clifflab": code_version(),
        "python": platform.python_version(),
        "packages": package_versions(every=True),
    }
    write_json(layout.manifest(name, model), manifest)
    done = [] if step.transient else [name]
    done += [i for i in step.inputs if STEPS[i].transient and all(_whole(context, r, model) for r in _readers(i))]
    for finished in done:
        shutil.rmtree(layout.all_parts(finished, model), ignore_errors=True)


def _sweep(context: Context, todo: list[Pair]) -> None:
    """Remove what a killed run left: temporary files, and unit files of steps that will not run."""
    root = context.layout.root
    for path in list(root.rglob(".*.tmp")):
        remove(path)
    wanted = {context.layout.parts(name, model, context.identity(name, model)) for name, model in todo}
    for folder in root.glob(".work/*/*/*"):
        if folder not in wanted:
            shutil.rmtree(folder, ignore_errors=True)


def _whole(context: Context, name: str, model: str | None) -> bool:
    """Whether a step's manifest has today's fingerprint and its files are what it says, byte for byte."""
    layout, step = context.layout, STEPS[name]
    manifest = read_json(layout.manifest(name, model))
    if not manifest or step.transient or manifest["fingerprint"] != context.identity(name, model):
        return False
    files = {layout.root / path: digest for path, digest in manifest["outputs"].items()}
    return all(path.is_file() and file_hash(path) == digest for path, digest in files.items())


def _start(kind: str, context: Context) -> Runtime:
    study, root, identities = context.study, context.layout.root, context.identities
    if kind == "inline":
        from clifflab.runtime.inline import InlineRuntime

        return InlineRuntime(study, root, identities)
    from clifflab.runtime.actors import ActorRuntime

    return ActorRuntime(study, root, identities)


def _manifest(context: Context) -> dict[str, Any]:
    """Everything that a result can be traced to, as it was when each step was computed. Written last."""
    study, identities = context.study, context.identities
    pairs = ordered(study, STEPS)
    read = {f"{m or '_study'}/{n}": read_json(context.layout.manifest(n, m)) for n, m in pairs}
    steps = {name: manifest for name, manifest in read.items() if manifest}
    return {
        "study": study.name,
        "seed": study.seed,
        "config": {k: v for k, v in study.model_dump(mode="json").items() if k != "runtime"},
        "models": identities.models,
        "reads": identities.reads,
        "sources": {p.name: digest for p, digest in zip(study.prompts, identities.sources, strict=True)},
        "files": {path: digest for manifest in steps.values() for path, digest in manifest["outputs"].items()},
        "steps": {name: {k: v for k, v in manifest.items() if k != "outputs"} for name, manifest in steps.items()},
    }
