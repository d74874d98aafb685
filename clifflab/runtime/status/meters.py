"""What workers tell Ray's metrics: rows, tokens, units and busy seconds, by step and model.

A node's metrics are read where Ray exports them for Prometheus, under the names of :data:`COUNTERS` with ``ray_`` in
front. They are for watching: the event log is what is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

ROWS, TOKENS, UNITS, BUSY = (
    "clifflab_rows_total",
    "clifflab_tokens_total",
    "clifflab_units_total",
    "clifflab_busy_seconds_total",
)
COUNTERS = {
    ROWS: "Rows that units finished.",
    TOKENS: "Tokens that went through a model.",
    UNITS: "Units of work finished.",
    BUSY: "Seconds that workers spent on units.",
}
TAGS = ("step", "model")


def record(step: str, model: str | None, counts: Mapping[str, Any], seconds: float) -> None:
    """Count one finished unit; nothing is done where this process is part of no Ray.

    Args:
        step: The step's name.
        model: The model's; ``None`` for work on the study as a whole.
        counts: What the unit counted; ``rows`` and ``tokens`` of it are used.
        seconds: How long it took.
    """
    ray = sys.modules.get("ray")  # never imported for this alone
    if ray is None or not ray.is_initialized():
        return
    tags = {"step": step, "model": model or ""}
    amounts = {ROWS: counts.get("rows"), TOKENS: counts.get("tokens"), UNITS: 1, BUSY: seconds}
    for name, amount in amounts.items():
        if isinstance(amount, int | float) and amount > 0:
            _counters()[name].inc(float(amount), tags=tags)


@lru_cache(maxsize=1)
def _counters() -> dict[str, Any]:
    """This process's counters, made once: Ray sums what all processes of a node tell."""
    from ray.util.metrics import Counter

    return {name: Counter(name, description=about, tag_keys=TAGS) for name, about in COUNTERS.items()}
