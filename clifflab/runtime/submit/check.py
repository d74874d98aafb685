"""The check before a job: runs on the cluster as a short job of its own, and prints one line of JSON.

``python -m clifflab.runtime.submit.check REQUEST``; REQUEST is JSON (:func:`clifflab.runtime.submit.examine.request`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from typing import Any

PREFIX = "::clifflab-check:: "


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """What this cluster is: versions, nodes, what is free, whether it asks for a token; and whether a run is at it."""
    import ray

    import clifflab
    from clifflab.artifacts import code_version
    from clifflab.errors import ClifflabError
    from clifflab.runtime.nodes import check_nodes
    from clifflab.runtime.storage.check import refuse_held

    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    found: dict[str, Any] = {
        "version": clifflab.__version__,
        "code": code_version(),
        "token": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        "free": {kind: free.get(kind, 0.0) for kind in ("CPU", "GPU")},
        "nodes": [],
    }
    try:
        refuse_held(request["out"], request["name"])
    except ClifflabError as error:
        return {**found, "error": _parts(error)}
    try:
        reports = check_nodes(request["out"], request["name"], request["paths"], request["seconds"])
        found["nodes"] = [asdict(report) for report in reports]
    except ClifflabError as error:
        field, value, problem, remedy = _parts(error)
        found["error"] = [field, value, f"on the head node: {problem}", remedy]
    return found


def _parts(error: Exception) -> list[str]:
    return [str(getattr(error, part, "")) for part in ("field", "value", "problem", "remedy")]


def main() -> None:
    """Entry point on the cluster."""
    found = examine(json.loads(sys.argv[1]))
    sys.stdout.write(f"{PREFIX}{json.dumps(found, default=str)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
