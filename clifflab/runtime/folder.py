"""A study's folder as the driver keeps it: what is whole, what is missing, and the manifests that say so."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clifflab.artifacts import HashCache, code_version, file_hash, package_versions, read_json, write_json
from clifflab.config import Study
from clifflab.runtime.storage import Store
from clifflab.runtime.work import Job
from clifflab.stages import STEPS, Context, Identities
from clifflab.stages.base import Pair, ordered, upstream


def identify(study: Study, root: Path, failed: list[dict[str, Any]] | None = None) -> Context:
    """The driver's context of a prepared study: its fingerprints are computed here and nowhere else.

    Args:
        study: The study, resolved.
        root: Its folder.
        failed: Models that were left out of it, for the report.
    """
    hashes = HashCache(root / ".steps" / "hashes.json")
    context = Context(study, root, Identities.of(study, STEPS, hashes, failed or []))
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
        if stale or not whole(context, name, model):
            missing.add((name, model))
    return [pair for pair in pairs if pair in missing and _needed(pair, missing)]


def _needed(pair: Pair, missing: set[Pair]) -> bool:
    """A transient step runs only for a step that is missing."""
    name, model = pair
    return not STEPS[name].transient or any((reader, model) in missing for reader in _readers(name))


def _readers(name: str) -> list[str]:
    return [step.name for step in STEPS.values() if name in step.inputs]


def whole(context: Context, name: str, model: str | None) -> bool:
    """Whether a step's manifest has today's fingerprint and its files are what it says, byte for byte."""
    layout, step = context.layout, STEPS[name]
    manifest = read_json(layout.manifest(name, model))
    if not manifest or step.transient or manifest["fingerprint"] != context.identity(name, model):
        return False
    files = {layout.root / path: digest for path, digest in manifest["outputs"].items()}
    return all(path.is_file() and file_hash(path) == digest for path, digest in files.items())


class StudyFiles:
    """What a schedule asks of the folder.

    Args:
        context: The driver's.
        store: The folder.
    """

    def __init__(self, context: Context, store: Store) -> None:
        self._context, self._store = context, store
        self.shared = not store.remote

    def begin(self, todo: list[Pair], spared: set[str]) -> None:
        """Remove what a killed run left, and the manifests of what is about to be computed anew.

        Args:
            todo: Steps to do.
            spared: Models that take no part this time: what they have stays.
        """
        root, layout, context = self._store.root, self._context.layout, self._context
        for path in list(root.rglob(".*.tmp")):
            self._store.remove(path)
        wanted = {layout.parts(name, model, context.identity(name, model)) for name, model in todo}
        kept = {root / Path(*path.relative_to(root).parts[:4]) for path in self._store.present(root / ".work")}
        for folder in kept | set(root.glob(".work/*/*/*")):
            if folder not in wanted and folder.parts[-3] not in spared:
                self._store.remove(folder)
        if todo:
            self._store.remove(root / "manifest.json")
        for name, model in todo:  # what is about to be computed anew, or follows from it, is no longer whole
            self._store.remove(layout.manifest(name, model))

    def open(self, pair: Pair) -> None:
        """Bring here what planning a step reads."""
        if self._store.remote:
            self._store.pull(STEPS[pair[0]].plan_reads(self._context, pair[1]))

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The units of a step whose files are not there."""
        if not jobs:
            return []
        first = jobs[0]
        identity = self._context.identity(first.step, first.model)
        there = self._store.present(self._context.layout.parts(first.step, first.model, identity))
        return [job for job in jobs if job.unit and self._context.part(job.unit) not in there]

    def finish(self, pair: Pair, counts: dict[str, Any]) -> None:
        """Write the step's manifest, then delete the unit files that nothing reads any more."""
        name, model = pair
        context, step, layout = self._context, STEPS[name], self._context.layout
        self._store.pull()
        manifest = {
            "fingerprint": context.identity(name, model),
            "outputs": {str(path.relative_to(layout.root)): file_hash(path) for path in step.outputs(layout, model)},
            "counts": counts,
            "clifflab": code_version(),
            "python": platform.python_version(),
            "packages": package_versions(every=True),
        }
        write_json(layout.manifest(name, model), manifest)
        self._store.push()
        context.forget()
        done = [] if step.transient else [name]
        done += [i for i in step.inputs if STEPS[i].transient and all(whole(context, r, model) for r in _readers(i))]
        for finished in done:
            self._store.remove(layout.all_parts(finished, model))

    def end(self, failed: list[dict[str, Any]]) -> None:
        """Write the run's manifest, last of all; with all models there, nothing else is left behind."""
        root, manifest = self._store.root, _manifest(self._context)
        if failed:
            manifest["failed"] = failed
        if read_json(root / "manifest.json") != manifest:
            write_json(root / "manifest.json", manifest)
        if not failed:
            self._store.remove(root / ".work")
            shutil.rmtree(root / ".work", ignore_errors=True)
        self._store.push()


def _manifest(context: Context) -> dict[str, Any]:
    """Everything that a result can be traced to, as it was when each step was computed."""
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
