"""Every node of a cluster, asked whether it can do the work: clifflab, the output, the paths, its GPUs.

Ray is connected. One task without any resource runs on each node; its code is sent by value, so that a node without
clifflab answers too.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clifflab.errors import InputError, OutputError, shorten, without_credentials
from clifflab.runtime.storage.check import check_output, left_probe

_DRIVER = "driver"
_SETTLE = 3.0  # seconds until a file on a network drive is seen by others


@dataclass(frozen=True)
class NodeReport:
    """What one node answered.

    Attributes:
        node: First 8 hexadecimal digits of its id.
        address: Its IP address.
        gpus: GPUs that Ray counts there.
        gpu_memory_mb: Memory of its smallest GPU; None where there is none, or it does not say.
        clifflab: Version of clifflab and its code there; None where it cannot be imported.
        sees_output: Whether it can write there, and sees what the driver writes there.
        missing: Paths that it cannot see.
        free_mb: Free space where the output is, or of its temporary folder.
        problem: Why it does not see the output, or did not answer; empty where all is well.
    """

    node: str
    address: str
    gpus: float
    gpu_memory_mb: int | None
    clifflab: str | None
    sees_output: bool
    missing: tuple[str, ...]
    free_mb: int
    problem: str = ""

    @property
    def where(self) -> str:
        """The node for a reader."""
        return f"node {self.address} ({self.node})"

    def without(self, paths: Collection[str]) -> NodeReport:
        """The report, where some paths do not count."""
        return replace(self, missing=tuple(path for path in self.missing if path not in paths))


def check_nodes(out: str, name: str, paths: Sequence[str], timeout: float) -> list[NodeReport]:
    """Ask every node that is alive; one that does not answer in time is reported as such.

    Args:
        out: Parent of the results: an absolute path, or an address.
        name: Folder of the results in it.
        paths: Absolute paths, globs or addresses that every node must see.
        timeout: Seconds for all nodes together.

    Raises:
        OutputError: The driver's own node cannot write there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    token = secrets.token_hex(8)
    with left_probe(out, name, token, _DRIVER):
        ask = ray.remote(num_cpus=0, max_retries=0)(_task())
        sent = {}
        for node in nodes:
            stay = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            sent[ask.options(scheduling_strategy=stay).remote(out, name, token, node["NodeID"], list(paths))] = node
        ready, late = ray.wait(list(sent), num_returns=len(sent), timeout=timeout)
        found = {sent[ref]["NodeID"]: _answer(ray, ref) for ref in ready}
        for ref in late:
            ray.cancel(ref, force=True)
            found[sent[ref]["NodeID"]] = {"problem": f"did not answer within {timeout:g} s"}
        return [_report(node, found[node["NodeID"]]) for node in nodes]


def refuse_unseen(reports: Sequence[NodeReport], out: str) -> None:
    """Fail where a node could not do the work.

    Raises:
        OutputError: Nodes cannot see the output.
        InputError: A node did not answer, has no clifflab or another one, or lacks a path.
    """
    silent = next((report for report in reports if report.problem and report.clifflab is None), None)
    if silent:
        raise InputError("cluster", silent.where, silent.problem, "install the same clifflab there, or take it out")
    blind = [report for report in reports if not report.sees_output]
    if blind:
        names, why = ", ".join(report.where for report in blind), blind[0].problem
        remedy = "give --out a folder that all nodes share, or a bucket such as s3://BUCKET/runs"
        raise OutputError("--out", without_credentials(out), f"{names} cannot see it ({why})", remedy)
    versions = {report.clifflab for report in reports}
    if len(versions) > 1:
        shown = ", ".join(f"{report.where} has {report.clifflab}" for report in reports)
        raise InputError(
            "cluster", f"{len(versions)} versions of clifflab", shown, "install the same one on every node"
        )
    lacking = next((report for report in reports if report.missing), None)
    if lacking:
        remedy = "put it where every node sees it under this path"
        raise InputError("path", lacking.missing[0], f"{lacking.where} cannot see it", remedy)


def look(out: str, name: str, token: str, node: str, paths: Sequence[str]) -> dict[str, Any]:
    """What a node tells of itself; runs there."""
    from clifflab.artifacts import code_version

    return {
        "clifflab": code_version(),
        "problem": sees_output(out, name, token, node),
        "missing": [path for path in paths if not sees(path)],
        "free_mb": _free_mb(out),
        "gpu_memory_mb": gpu_memory_mb(),
    }


def sees(path: str) -> bool:
    """Whether a path, a glob or an address leads to something on this machine."""
    if "://" not in path:
        return os.path.exists(path) or (
            glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None
        )
    from clifflab.errors import ClifflabError
    from clifflab.scoring.sources import find_sources

    try:
        return bool(find_sources(path))
    except ClifflabError:
        return False


def sees_output(out: str, name: str, token: str, node: str) -> str:
    """Write, read and delete a file in the output, and look for the driver's; returns why that failed, or nothing.

    Called while the driver holds its own file there (:func:`~clifflab.runtime.storage.check.left_probe`).
    """
    until = time.monotonic() + _SETTLE
    try:
        while _DRIVER not in check_output(out, name, token, node):
            if time.monotonic() > until:
                return "what the head node writes there is not seen"
            time.sleep(0.2)
    except OutputError as error:
        return error.problem
    return ""


def _task() -> Callable[..., dict[str, Any]]:
    """The function that runs on a node. It is made here, so that Ray sends its code and not its name."""

    def ask(out: str, name: str, token: str, node: str, paths: list[str]) -> dict[str, Any]:
        try:
            from clifflab.runtime.nodes import look
        except ImportError as error:
            return {"problem": f"clifflab cannot be imported there ({error})"}
        return look(out, name, token, node, paths)

    return ask


def _answer(ray: Any, ref: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = ray.get(ref)
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"problem": f"failed the check: {shorten(lines[-1] if lines else error)}"}
    return answer


def _report(node: dict[str, Any], answer: dict[str, Any]) -> NodeReport:
    problem = str(answer.get("problem", ""))
    return NodeReport(
        node=node["NodeID"][:8],
        address=node["NodeManagerAddress"],
        gpus=float(node["Resources"].get("GPU", 0)),
        gpu_memory_mb=answer.get("gpu_memory_mb"),
        clifflab=answer.get("clifflab"),
        sees_output=not problem,
        missing=tuple(answer.get("missing", ())),
        free_mb=int(answer.get("free_mb", 0)),
        problem=problem,
    )


def _free_mb(out: str) -> int:
    place = Path(out) if "://" not in out else Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108
    place = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(place).free >> 20


def gpu_memory_mb() -> int | None:
    """Memory of the smallest GPU, as the driver tells it: a task without GPUs sees none through CUDA."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()  # noqa: S603
        return min((int(size) for size in found), default=None)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
