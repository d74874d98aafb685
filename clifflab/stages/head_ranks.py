"""The ranked heads of a model, as the steps that remove heads read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clifflab.artifacts import read_json
from clifflab.models.heads import Head
from clifflab.science.effects import halves
from clifflab.stages.base import Context


@dataclass(frozen=True)
class Ranked:
    """Heads in the order of their effect on the ranking half of the groups, at ``heads.positions[0]``.

    Attributes:
        suppression: All ranked heads, largest effect first: removing the first ones raises refusal most.
        promoting: The same, smallest effect first: removing the first ones lowers refusal most.
        total: Heads of the model, of which fractions count.
        reason: Why there is no ranking; empty where there is one.
    """

    suppression: list[Head]
    promoting: list[Head]
    total: int
    reason: str


def ranked_heads(context: Context, model: str) -> Ranked:
    """Read the ranking that the step ``heads`` made.

    Heads without a number (above the probe's layer in a direct ranking) come last in both lists. After
    ``screen-then-exact`` the swept heads lead ``suppression`` and the rest follows by its estimate; ``promoting`` is
    then by the estimate alone.
    """
    folder = context.layout.folder(model)
    files = [folder / "heads.parquet", folder / "heads.json"]
    return context.once(f"ranked:{model}", files, lambda: _read(context, model))


def _read(context: Context, model: str) -> Ranked:
    folder, settings = context.layout.folder(model), context.study.heads
    about = read_json(folder / "heads.json")
    if about["reason"]:
        return Ranked([], [], about["total"], about["reason"])
    rows = context.table(folder / "heads.parquet").to_pylist()
    estimate = "direct" if settings.method == "direct" else "attribution"
    exact = _sizes(rows, "exact", settings.positions[0])
    estimated = _sizes(rows, estimate, "final" if estimate == "direct" else settings.positions[0])
    if settings.method == "exact":
        return Ranked(_ordered(exact, -1), _ordered(exact, 1), about["total"], "")
    swept = _ordered(exact, -1)
    rest = [head for head in _ordered(estimated, -1) if head not in exact]
    return Ranked([*swept, *rest], _ordered(estimated, 1), about["total"], "")


def _sizes(rows: list[dict[str, Any]], method: str, positions: str) -> dict[Head, float | None]:
    """What ranks each head: its effect on the refusal log-odds, or minus its direct write on the probe logit."""
    mine = [row for row in rows if (row["method"], row["positions"]) == (method, positions)]
    if method == "direct":
        return {
            (row["layer"], row["head"]): None if row["ranking_logit"] is None else -row["ranking_logit"] for row in mine
        }
    return {(row["layer"], row["head"]): row["ranking_log_odds"] for row in mine}


def _ordered(sizes: dict[Head, float | None], sign: int) -> list[Head]:
    """Heads by size, descending for ``sign`` -1; ties by layer and head, heads without a size last."""
    return sorted(sizes, key=lambda head: (sizes[head] is None, sign * (sizes[head] or 0.0), head))


def cluster_halves(context: Context) -> dict[str, str]:
    """Half of every cluster of the study, ``ranking`` or ``reporting``: equal shares of each mix of prompt sets."""
    path = context.layout.root / "clusters.parquet"

    def assign() -> dict[str, str]:
        sets: dict[str, set[str]] = {}
        for row in context.table(path).select(["cluster", "label", "set"]).to_pylist():
            sets.setdefault(row["cluster"], set()).add(f"{row['label']}:{row['set']}")
        return halves({cluster: " ".join(sorted(mix)) for cluster, mix in sets.items()}, context.study.seed)

    return context.once("halves", [path], assign)
