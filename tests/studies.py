"""Small studies that several tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clifflab import Study
from clifflab.studyfile import parse_study

# Steps that a study runs between "truncation" and "report".
SEARCH = ("head_estimates", "heads", "head_sets", "ablated", "ablation")
NO_HEADS = {"heads": {"traces": 0}, "ablation": {"traces": 0}}  # the search for heads has studies of its own
FEW = {"refits": 4, "folds": 3, "shuffles": 3}  # controls that cost little


def small_study(**changes: Any) -> dict[str, Any]:
    """The planted model on a few prompts: enough for a probe, seconds of work."""
    sets = {"benign": ("benign", 48), "harmful": ("harmful", 48), "wrapped_strong": ("harmful", 48)}
    data: dict[str, Any] = {
        "name": "small",
        "models": [{"name": "planted", "path": "organism:planted"}],
        "prompts": [
            {"name": name, "path": f"organism:{name}", "label": label, "limit": limit}
            for name, (label, limit) in sets.items()
        ],
        "traces": {"max_new_tokens": 112, "batch_size": 24},
        "cliff": {"bootstrap": 200},
        "probe": {"min_examples": 12, **FEW},
        "truncation": {"traces": 4},
        **NO_HEADS,
        "report": {"figures": False},  # drawing takes longer than all the rest
    }
    return {**data, **changes}


def ablation_study(**changes: Any) -> dict[str, Any]:
    """A small study that searches few traces for heads and removes what it finds."""
    return small_study(
        **{
            "name": "ablated",
            "truncation": {"traces": 0},
            "heads": {"traces": 8, "controls": 4, "positions": ["closing"], "random_directions": 0, "candidates": 2},
            "ablation": {"traces": 8, "fractions": [0.0, 0.03], "random_draws": 4, "perplexity_traces": 8},
            **changes,
        }
    )


def parse(data: dict[str, Any]) -> Study:
    return parse_study(data)


def events(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def tables_of(root: Path, model: str) -> dict[str, pa.Table]:
    return {path.stem: pq.read_table(path) for path in sorted((root / model).glob("*.parquet"))}


def assert_same_tables(one: dict[str, pa.Table], other: dict[str, pa.Table], tolerance: float) -> float:
    """Everything exactly equal but floats, which agree to ``tolerance``; returns the largest difference."""
    largest = 0.0
    assert one.keys() == other.keys()
    for name, left in one.items():
        right = other[name]
        assert left.schema == right.schema
        for column in left.schema.names:
            a, b = left[column].combine_chunks(), right[column].combine_chunks()
            while pa.types.is_list(a.type):
                assert a.value_lengths().equals(b.value_lengths()), (name, column)
                a, b = a.flatten(), b.flatten()
            if pa.types.is_floating(a.type):
                assert a.is_null().equals(b.is_null()), (name, column)
                x, y = (np.asarray(v.drop_null(), dtype=float) for v in (a, b))
                if len(x):
                    largest = max(largest, float(np.abs(x - y).max()))
                assert largest <= tolerance, (name, column, largest)
            else:
                assert a.equals(b), (name, column)
    return largest
