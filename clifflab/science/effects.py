"""Statistics of head effects: halves of the groups, paired intervals, false discoveries, verdicts (SPEC section 4).

Shape suffixes: N traces, C clusters, H heads, R random draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from decimal import Decimal

HALVES = ("ranking", "reporting")


def halves(kinds: Mapping[str, str], seed: int) -> dict[str, str]:
    """Half of every cluster: ``ranking`` or ``reporting``, equal shares of each kind, in the order of a seeded hash.

    Heads are chosen on one half and described on the other, so that no effect is flattered by having been chosen.

    Args:
        kinds: What to balance over the halves, by cluster (its label).
        seed: Seed of the study.
    """

    def order(cluster: str) -> tuple[str, str, str]:
        return kinds[cluster], hashlib.sha256(f"halves:{seed}:{cluster}".encode()).hexdigest(), cluster

    return {cluster: HALVES[place % 2] for place, cluster in enumerate(sorted(kinds, key=order))}


def top_count(fraction: float, total: int) -> int:
    """How many heads a fraction of all is: ``ceil(fraction x total)`` in decimal arithmetic, so that 3% of 100 is 3."""
    return min(total, math.ceil(Decimal(str(fraction)) * total))
