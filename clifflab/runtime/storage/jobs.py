"""What a job reads of a remote output, and doing it between a pull and a push."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from clifflab.config import Study
    from clifflab.runtime.storage import Store
    from clifflab.runtime.work import Job
    from clifflab.stages.base import Context

T = TypeVar("T")


def mirror_job(
    store: Store, reads: Sequence[Path], work: Callable[[], T], went_well: Callable[[T], bool] = lambda result: True
) -> T:
    """Pull what a job reads, do it, and push what it wrote; what it deleted is deleted there too.

    Args:
        store: The output.
        reads: Files and folders that it reads (see :func:`reads_of`).
        work: Does it.
        went_well: Whether a result is one; what a failed job wrote is dropped, since another process may do it again.

    Raises:
        OutputError: The output cannot be read or written.
    """
    if not store.remote:
        return work()
    store.pull(reads)
    store.let_go(reads)
    before = store.files()
    try:
        result = work()
        if went_well(result):
            for place in _topmost(before.keys() - store.files().keys(), store.root):
                store.remove(place)
            store.push()
    finally:
        store.drop(before)
    return result


def reads_of(context: Context, job: Job) -> list[Path]:
    """The files and folders that a job may read, as far as they are there.

    These are the results of the study as a whole and of the models that the job is about: its own, the one that is
    compared with it, the one whose repair makes it, or all for a step of the whole study that reads models' results;
    weights only of the repair that makes the job's model; and the unit files of transient inputs. A merge reads its
    step's unit files too, and its outputs of before, some of which it may delete; so does a step that a group of
    workers does, whose checkpoints lie with its unit file.

    Args:
        context: What the worker knows.
        job: The job.
    """
    from clifflab.stages import STEPS
    from clifflab.stages.base import REPAIR, GangStep, upstream

    study, layout, own, model = context.study, context.layout, STEPS[job.step], job.model
    models = _models(study, job.step, model)
    found: list[Path] = []
    for step in STEPS.values():
        for name in models if step.per_model else [None]:
            if step.applies(study, study.model(name) if name else None):
                folder = layout.folder(name, REPAIR)
                found += [p for p in step.outputs(layout, name) if p.parent == folder or folder not in p.parents]
    for read, name in upstream(study, STEPS, job.step, model):
        if STEPS[read].transient:
            found.append(layout.parts(read, name, context.identity(read, name)))
    if job.unit is None or isinstance(own, GangStep):
        found.append(layout.parts(job.step, model, context.identity(job.step, model)))
        found += outputs_of(context, job.step, model)
    if model and (base := study.model(model).repairs):
        found.append(layout.folder(base, REPAIR))
    return sorted(set(found))


def outputs_of(context: Context, step: str, model: str | None) -> list[Path]:
    """The files and folders that a step's merge leaves, also those whose number depends on the data."""
    from clifflab.stages import STEPS
    from clifflab.stages.base import REPAIR

    layout = context.layout
    known = STEPS[step].outputs(layout, model)
    more = {"tune": layout.folder(model, REPAIR), "report": layout.root / "figures"}
    return [*known, more[step]] if step in more else known


def _models(study: Study, step: str, model: str | None) -> list[str]:
    """The models that a step is about: its own, and those of all that it follows from."""
    from clifflab.stages import STEPS
    from clifflab.stages.base import upstream

    pairs = {(step, model)}
    todo = [*pairs]
    while todo:
        fresh = set(upstream(study, STEPS, *todo.pop())) - pairs
        pairs |= fresh
        todo += fresh
    return sorted({name for _, name in pairs if name})


def _topmost(gone: set[Path], root: Path) -> list[Path]:
    """Files that are gone, or the folders that went with them."""
    found = set[Path]()
    for path in gone:
        for folder in reversed(path.relative_to(root).parents[:-1]):
            if not (root / folder).exists():
                found.add(root / folder)
                break
        else:
            found.add(path)
    return sorted(found)
