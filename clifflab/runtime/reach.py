"""What a running cluster can do for a study, asked before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

from clifflab.config import Study
from clifflab.errors import InputError
from clifflab.runtime.local import start_ray
from clifflab.runtime.nodes import check_nodes, gpu_memory_mb, refuse_unseen
from clifflab.runtime.progress import Reporter
from clifflab.runtime.schedule import Failure

_PATIENCE = 60.0  # seconds for all machines to answer


def reach(study: Study, out: str, reporter: Reporter, package: str = "") -> tuple[list[Failure], int | None]:
    """Join the cluster of a study and ask every machine whether it sees the output, the models, and the same clifflab.

    Args:
        study: The study, prepared.
        out: Parent of its results: an absolute path, or an address.
        reporter: Told what a user should know.
        package: Folder of files that were sent with the study: every machine has its own copy.

    Returns:
        Models that some machine cannot see, and the memory of the smallest GPU in MiB.

    Raises:
        ClusterError: The cluster cannot be joined.
        OutputError: Some machine cannot see the output.
        InputError: Some machine has no clifflab, or another one, or a prompt file is nowhere to be seen there.
    """
    start_ray(study.runtime, reporter.note)
    import ray

    if sum(bool(node["Alive"]) for node in ray.nodes()) == 1:  # type: ignore[no-untyped-call]
        return [], gpu_memory_mb() if ray.cluster_resources().get("GPU") else None  # type: ignore[no-untyped-call]

    def theirs(path: str | None) -> bool:
        return bool(path) and os.path.isabs(path or "") and not (package and Path(path or "").is_relative_to(package))

    models = {spec.path: spec.name for spec in study.models if theirs(spec.path)}
    models |= {str(spec.adapter): spec.name for spec in study.models if not spec.repairs and theirs(spec.adapter)}
    named = [prompt_set.path for prompt_set in (*study.prompts, *study.repair.corpus)]
    named += [choices.path for choices in study.repair.evaluate.choices]
    files = [path for path in named if theirs(path)]
    reports = check_nodes(out, study.name, [*models, *files], _PATIENCE)
    unseen: dict[str, str] = {}
    for report in reports:
        for path in report.missing:
            if path in models:
                unseen.setdefault(path, report.where)
    refuse_unseen([report.without(set(unseen)) for report in reports], out)
    remedy = "put it where every machine sees it under this path"
    failures = [
        Failure(models[path], None, None, InputError("models.path", path, f"{where} cannot see it", remedy))
        for path, where in unseen.items()
    ]
    memory = [report.gpu_memory_mb for report in reports if report.gpus and report.gpu_memory_mb]
    return failures, min(memory, default=None)
