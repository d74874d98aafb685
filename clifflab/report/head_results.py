"""What the steps on heads wrote, in the form in which the report shows it.

This is the only place of the report that knows the names in ``heads.json`` and ``ablation.json``, and the only one of
clifflab that reads a model's ``ground_truth.json``: no stage is told which heads were planted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clifflab.artifacts import read_json, read_parquet
from clifflab.config import ModelSpec
from clifflab.config.heads import parse_head
from clifflab.science.stats import Floats

Head = tuple[int, int]
Rows = list[dict[str, Any]]
EXACT = "exact"
_METHODS = (EXACT, "attribution", "direct")  # what ranks, in the order of trust


def head_name(head: Head) -> str:
    """``layer.head``, as the settings name it."""
    return f"{head[0]}.{head[1]}"


@dataclass(frozen=True)
class GroundTruth:
    """What a model's folder says of its own heads.

    Attributes:
        heads: The planted heads; empty for a model into which none was planted.
        problem: Why the file could not be read; the heads are then unknown and not shown.
    """

    heads: frozenset[Head]
    problem: str = ""


def ground_truth_file(spec: ModelSpec) -> Path | None:
    """The model's ``ground_truth.json``, where its folder has one."""
    from clifflab.models.loading import resolve_path

    file = Path(resolve_path(spec)) / "ground_truth.json"
    return file if file.is_file() else None


def ground_truth(spec: ModelSpec) -> GroundTruth | None:
    """The planted heads of a model, ``None`` where its folder does not say."""
    file = ground_truth_file(spec)
    if file is None:
        return None
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"))["planted_heads"]
        heads = frozenset((int(layer), int(head)) for layer, head in pairs)
    except (OSError, ValueError, KeyError, TypeError):
        return GroundTruth(frozenset(), "ground_truth.json is there, and names no heads that could be read")
    return GroundTruth(heads)


@dataclass(frozen=True)
class HeadsFound:
    """What the search for suppression heads found.

    Attributes:
        about: ``heads.json``.
        rows: ``heads.parquet``.
        planted: What the model's folder says of its heads, where it does.
        sets: ``head_sets.json``.
    """

    about: Mapping[str, Any]
    rows: Rows
    planted: GroundTruth | None
    sets: Mapping[str, Any] | None = None

    @property
    def reason(self) -> str:
        """Why nothing was looked for; empty where something was."""
        return str(self.about.get("reason") or "")

    @cached_property
    def ranked_by(self) -> str:
        """The method that ranks: that of the study; exact effects where both kinds were made."""
        method = self.about.get("method")
        return str(method) if method in ("direct", "attribution") else EXACT

    @property
    def positions(self) -> tuple[str, ...]:
        """Where heads were changed, the ranking place first; direct contributions are read at the final position."""
        return ("final",) if self.ranked_by == "direct" else tuple(self.about["positions"])

    @property
    def gap(self) -> Mapping[str, Any]:
        """Refusal log-odds of plain minus attacked prompts: ``mean``, ``low``, ``high``, and a ``reason`` for none."""
        return dict(self.about["gap"])

    @property
    def total(self) -> int:
        """Heads of the model."""
        return int(self.about["total"])

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Layers, and the most heads of any layer."""
        counts = self.about["heads_per_layer"]
        return len(counts), max(counts)

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, Head], dict[str, Any]]:
        return {(row["method"], row["positions"], (row["layer"], row["head"])): row for row in self.rows}

    def row(self, method: str, positions: str, head: Head) -> dict[str, Any] | None:
        """The row of a head, where it has one."""
        return self._by_key.get((method, positions, head))

    def has(self, method: str, positions: str, column: str) -> bool:
        """Whether any head has such a number."""
        return any(
            finite(row[column]) is not None
            for row in self.rows
            if (row["method"], row["positions"]) == (method, positions)
        )

    def grid(self, method: str, positions: str, column: str, sign: float = 1.0) -> Floats:
        """A column of every head as ``[L, H]``; NaN where there is none."""
        grid = np.full(self.shape, math.nan)
        for row in self.rows:
            value = finite(row[column])
            if (row["method"], row["positions"]) == (method, positions) and value is not None:
                grid[row["layer"], row["head"]] = sign * value
        return grid

    def suppression(self, positions: str) -> list[Head]:
        """Suppression heads, largest effect on the ranking half first."""
        mine = [r for r in self.rows if (r["method"], r["positions"]) == (self.ranked_by, positions)]
        return [(r["layer"], r["head"]) for r in sorted(mine, key=_place) if r["suppression"]]

    def ranking(self, method: str, positions: str) -> list[Head]:
        """Heads in the order of a method's rank; those without a number are left out."""
        size = "ranking_logit" if method == "direct" else "ranking_log_odds"
        mine = [r for r in self.rows if (r["method"], r["positions"]) == (method, positions) and r[size] is not None]
        return [(r["layer"], r["head"]) for r in sorted(mine, key=_place)]

    def top(self, positions: str) -> dict[Head, dict[str, Any]]:
        """The top list of ``heads.json``, which has what the table has not."""
        return {parse_head(entry["head"]): entry for entry in self.about["found"].get(positions, {}).get("top", [])}

    def no_verdict(self, positions: str) -> str:
        """Why no head could pass at these positions; empty where heads were judged."""
        found = self.about["found"]
        # Direct effects have no positions of their own.
        entry: Mapping[str, Any] = found.get(positions) or next(iter(found.values()), {})
        return str(entry.get("reason") or "")

    def promoting(self, positions: str) -> list[Head]:
        """Heads whose removal lowers refusal, by the same measure as suppression heads."""
        return [parse_head(name) for name in self.about["found"].get(positions, {}).get("promoting", [])]

    def correlations(self) -> list[dict[str, Any]]:
        """``method``, ``reading`` (``logit``, ``log_odds``), ``positions``, ``rho`` with the exact effects, ``n``."""
        out = []
        for positions, entries in self.about["correlations"].items():
            for key, found in entries.items():
                method, reading = key.split("_", 1)
                out.append({"method": method, "reading": reading, "positions": positions, **found})
        return out


def _place(row: Mapping[str, Any]) -> tuple[float, int, int]:
    return (math.inf if row["rank"] is None else row["rank"], row["layer"], row["head"])


def read_heads(folder: Path, spec: ModelSpec) -> HeadsFound | None:
    """What the search for suppression heads wrote; ``None`` where it was not part of the study.

    Args:
        folder: The model's folder in the study.
        spec: The model, whose own folder may hold a ground truth.
    """
    about = read_json(folder / "heads.json")
    if not about:
        return None
    file = folder / "heads.parquet"
    rows = read_parquet(file).to_pylist() if file.is_file() else []
    return HeadsFound(about, rows, ground_truth(spec), read_json(folder / "head_sets.json"))


def finite(value: Any) -> float | None:
    """A finite number, or nothing."""
    return float(value) if value is not None and math.isfinite(value) else None
