"""Asking a cluster, before anything is sent, whether it can do a job; what is wrong becomes one line."""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import clifflab
from clifflab.artifacts import code_version
from clifflab.errors import ClusterError, ConfigError, InputError, OutputError, shorten
from clifflab.runtime.nodes import NodeReport, refuse_unseen
from clifflab.runtime.submit.check import PREFIX
from clifflab.runtime.submit.client import Cluster
from clifflab.runtime.submit.plan import Plan

SECONDS = 90.0  # for the whole check; a node has a third of it
_MODULE = "clifflab.runtime.submit.check"


@dataclass(frozen=True)
class Findings:
    """What the check brought.

    Attributes:
        unseen: Paths that may have to be uploaded, since some node does not see them.
        notes: What a user should know, a line each.
    """

    unseen: frozenset[str]
    notes: tuple[str, ...]


def examine(cluster: Cluster, plan: Plan, env: Mapping[str, str], python: str) -> Findings:
    """Run the check on a cluster.

    Args:
        cluster: Where.
        plan: What is to be sent.
        env: Environment of the job.
        python: Its interpreter.

    Raises:
        ClusterError: clifflab is not there, is another version, or the check does not end.
        OutputError: A node cannot see the output.
        InputError: A node cannot see a path that is not uploaded, or did not answer.
        ConfigError: No node has the GPUs that a model asks for.
    """
    found = _ask(cluster, request(plan), env, python)
    if error := found.get("error"):
        raise OutputError(*error)
    _same_version(cluster, found)
    names = {field.name for field in fields(NodeReport)}
    reports = [NodeReport(**{k: v for k, v in node.items() if k in names}) for node in found["nodes"]]
    unseen = frozenset(path for report in reports for path in report.missing)
    refuse_unseen([report.without(report.missing) for report in reports], plan.out)  # some paths can be uploaded
    failing = _check_paths(plan, reports)
    _enough_gpus(plan, reports)
    return Findings(unseen, (*failing, *_notes(cluster, found, reports)))


def request(plan: Plan) -> dict[str, Any]:
    """What the check is asked: JSON that holds paths and addresses, and no secret."""
    paths = [*plan.needed, *(shared.path for shared in plan.shared)]
    parent, _, name = plan.place.rpartition("/")
    return {"out": parent or "/", "name": name, "paths": sorted(set(paths)), "seconds": SECONDS / 3}


def _ask(cluster: Cluster, asked: dict[str, Any], env: Mapping[str, str], python: str) -> dict[str, Any]:
    job = f"clifflab-check-{secrets.token_hex(6)}"
    entry = shlex.join([python, "-m", _MODULE, json.dumps(asked)])
    cluster.send(job, entry, archive=None, env=env, metadata={})
    try:
        until = time.monotonic() + SECONDS
        while (status := cluster.state(job)) in ("pending", "running"):
            if time.monotonic() > until:
                problem = f"the check did not end within {SECONDS:g} s (it is {status})"
                raise ClusterError("cluster", cluster.head.address, problem, "see ray status, or give --no-check")
            time.sleep(0.25)
        log = cluster.log(job)
    finally:
        if cluster.state(job) in ("pending", "running"):
            cluster.stop(job, seconds=5)
        cluster.delete(job)
    line = next((line for line in log.splitlines() if line.startswith(PREFIX)), None)
    if line is None:
        raise _silent(cluster, log, python)
    found: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
    return found


def _silent(cluster: Cluster, log: str, python: str) -> ClusterError:
    """Why the check printed nothing."""
    remedy = "install the same clifflab on every node, or name its interpreter by --python PATH"
    lines = [line.strip() for line in log.splitlines() if line.strip() and "Running entrypoint" not in line]
    last = lines[-1] if lines else "it printed nothing"
    if "No module named 'clifflab.runtime" in log or "No module named clifflab.runtime" in log:
        return ClusterError("--python", python, "another clifflab is installed on the cluster", remedy)
    if "No module named" in last or "not found" in last or "No such file" in last:
        return ClusterError("--python", python, f"finds no clifflab on the cluster ({shorten(last, 100)})", remedy)
    return ClusterError("cluster", cluster.head.address, f"the check failed there ({shorten(last)})", "see ray status")


def _same_version(cluster: Cluster, found: Mapping[str, Any]) -> None:
    if found["version"] != clifflab.__version__:
        problem = f"has clifflab {found['version']}, and this is clifflab {clifflab.__version__}"
        raise ClusterError("cluster", cluster.head.address, problem, "install the same version in both places")


def _check_paths(plan: Plan, reports: list[NodeReport]) -> list[str]:
    """Notes on models that will fail; anything else that is not seen, and all models, is refused."""
    where = {path: report.where for report in reversed(reports) for path in report.missing if path in plan.needed}
    lost = {plan.models[path] for path in where if path in plan.models}
    fatal = [path for path in where if path not in plan.models or lost >= plan.names]
    if fatal:
        remedy = "put it where every node sees it under this path"
        raise InputError(plan.needed[fatal[0]], fatal[0], f"{where[fatal[0]]} cannot see it", remedy)
    return [
        f"{plan.models[path]}: {path}: {node} cannot see it, so this model will fail" for path, node in where.items()
    ]


def _enough_gpus(plan: Plan, reports: list[NodeReport]) -> None:
    largest = max((report.gpus for report in reports), default=0)
    for model, gpus in plan.gpus.items():
        if gpus > largest:
            problem = f"{model} asks for {gpus:g} GPUs, and the largest node has {largest:g}"
            raise ConfigError("models.gpus", f"{gpus:g}", problem, "ask for fewer, or gpus: auto")


def _notes(cluster: Cluster, found: Mapping[str, Any], reports: list[NodeReport]) -> list[str]:
    notes = []
    if not found["token"]:
        notes.append(f"{cluster.head.address} asks for no token: whoever reaches it can run code there")
    if found["code"] != code_version():
        notes.append(f"the cluster's clifflab ({found['code']}) is not quite this one ({code_version()})")
    gpus, free = sum(report.gpus for report in reports), found["free"]
    if gpus and free["GPU"] < 1:
        notes.append(f"all {gpus:g} GPUs are busy: the job waits for them")
    elif not gpus and free["CPU"] < 1:
        notes.append("all CPU cores are busy: the job waits for them")
    if tight := next((report for report in reports if report.free_mb < 1024), None):
        notes.append(f"{tight.where} has {tight.free_mb} MB free")
    return notes
