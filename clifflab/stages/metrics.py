"""``metrics.json``: what every stage found, joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clifflab.artifacts import read_json, read_parquet
from clifflab.config import Study
from clifflab.errors import one_line
from clifflab.science.asr import attack_success
from clifflab.stages.base import Layout

# What a step says of a model, by the file that it writes; a step that does not apply to a model writes none.
_FOUND_BY = ("controls", "truncation", "agreement", "ablation", "evaluation", "curve")
_REPAIR = ("selection", "tuning")


def study_metrics(study: Study, layout: Layout, failed: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The content of ``metrics.json``.

    Args:
        study: The study.
        layout: Where its files are.
        failed: Models that could not be finished: ``model``, ``step`` and ``error`` of each. They are named under
            ``failed``, and nothing else is told of them.
    """
    gone = {entry["model"] for entry in failed}
    told = [{**{key: e.get(key) for key in ("model", "step")}, "error": one_line(e.get("error") or "")} for e in failed]
    return {
        "study": study.name,
        "seed": study.seed,
        "duplicates": read_json(layout.root / "duplicates.json"),
        "models": {
            model.name: model_metrics(study, layout, model.name) for model in study.models if model.name not in gone
        },
        **({"failed": told} if told else {}),
    }


def model_metrics(study: Study, layout: Layout, name: str) -> dict[str, Any]:
    """One model's part of it."""
    folder = layout.folder(name)
    found = {part: read_json(folder / f"{part}.json") for part in _FOUND_BY}
    if heads := read_json(folder / "heads.json"):
        found["heads"] = {**heads, "sets": read_json(folder / "head_sets.json")}
    repair = {part: read_json(folder / "repair" / f"{part}.json") for part in _REPAIR}
    found["repair"] = {part: about for part, about in repair.items() if about is not None} or None
    return {
        **read_json(folder / "summary.json"),
        **{part: about for part, about in found.items() if about is not None},
        "attacks": _attacks(study, layout.root, folder),
    }


def _attacks(study: Study, root: Path, folder: Path) -> dict[str, Any]:
    """Attack success and over-refusal of each set, with what a broken model would hide (SPEC section 5)."""
    traces = read_parquet(folder / "traces.parquet").select(["trace_id", "set", "label", "group"]).to_pylist()
    outcomes = read_parquet(folder / "outcomes.parquet")["outcome"].to_pylist()
    clusters = read_parquet(root / "clusters.parquet")
    cluster = dict(zip(clusters["group"].to_pylist(), clusters["cluster"].to_pylist(), strict=True))
    verdicts: Mapping[str, str] | None = None
    if study.judge.guard:
        table = read_parquet(folder / "guard.parquet")
        verdicts = dict(zip(table["trace_id"].to_pylist(), table["verdict"].to_pylist(), strict=True))
    rows = [
        {**trace, "group": cluster[trace["group"]], "outcome": outcome}
        for trace, outcome in zip(traces, outcomes, strict=True)
    ]
    return {
        prompt_set.name: attack_success(
            [row for row in rows if row["set"] == prompt_set.name],
            verdicts,
            resamples=study.cliff.bootstrap,
            seed=study.seed,
        )
        for prompt_set in study.prompts
    }
