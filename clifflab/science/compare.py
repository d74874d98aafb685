"""Two runs of one study: do the figures of the second lie within the intervals of the first?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What tells a list's items apart.
_NAMES = ("trained", "read", "kept", "bin", "kind", "fraction", "heads", "selector", "budget", "measure")


@dataclass(frozen=True)
class Pair:
    """One figure of both runs.

    Attributes:
        path: Where it stands in ``metrics.json``, dotted.
        mean: Its value in the first run.
        low: Lower end of its interval there.
        high: Upper end.
        other: Its value in the second run.
    """

    path: str
    mean: float
    low: float
    high: float
    other: float

    @property
    def inside(self) -> bool:
        """Whether the second value lies within the first interval."""
        return self.low <= self.other <= self.high

    @property
    def part(self) -> str:
        """The part of the model's metrics that it belongs to."""
        return self.path.split(".")[2]


def paired_figures(first: Any, second: Any) -> list[Pair]:
    """All figures that have an interval in the first run and a value in the second, by their place in the metrics.

    Args:
        first: Content of one run's ``metrics.json``.
        second: Content of another's.
    """
    other = dict(_figures(second, ""))
    return [
        Pair(path, entry["mean"], entry["low"], entry["high"], other[path]["mean"])
        for path, entry in _figures(first, "")
        if entry.get("low") is not None and path in other
    ]


def _figures(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("mean") is not None and "low" in node and "high" in node:
            yield path, node
            return
        for key, child in node.items():
            yield from _figures(child, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _figures(child, f"{path}.{_name(child, index)}")


def _name(child: Any, index: int) -> str:
    """Name of a list's item by what identifies it, so that lists of different length pair up rightly."""
    if isinstance(child, dict):
        names = [str(child[key]) for key in _NAMES if key in child]
        if names:
            return "-".join(names)
    return str(index)
