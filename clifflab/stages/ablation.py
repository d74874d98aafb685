"""Stage ``ablation``: what removing heads does to attacks, and what it costs (SPEC sections 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import read_json, read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.engines.guard import guard_identity
from clifflab.science.judges import Exchange
from clifflab.stages.ablation_figures import ablation_figures
from clifflab.stages.base import GUARD, Context, Layout, Step, Unit, chunks
from clifflab.stages.duplicates import group_clusters
from clifflab.stages.guard import write_verdicts


class AblationStep(Step):
    """The study's guard over what the changed model wrote, and the figures; a unit is one batch of exchanges.

    The guard reads closed, non-degenerate answers to harmful prompts, each distinct one once: where a condition left a
    trace as it was, the verdict of the step ``guard`` stands. Without a guard there are no units, and harm is judged by
    rules.
    """

    name = "ablation"
    inputs = ("prompts", "duplicates", "traces", "guard", "ablated")

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """Not to a model that a repair makes, unless the repair asks for it."""
        return model is not None and study.searches(model)

    def settings(self, study: Study) -> Any:
        """How the guard is asked, and the resamples of the intervals."""
        guard = study.judge.guard
        how = guard.model_dump(mode="json", exclude={"path", "revision", "template"}) if guard else None
        return {"guard": how, "bootstrap": study.cliff.bootstrap, **study.ablation.model_dump(mode="json")}

    def reads(self, study: Study, file_hash: Callable[[Path], str]) -> Any:
        """The guard's files, by content."""
        return guard_identity(study.judge.guard, file_hash) if study.judge.guard else None

    def needs(self, context: Context, unit: Unit | None, model: str | None) -> str | None:
        """The guard."""
        return GUARD if unit else None

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """The table of all conditions, the figures, and the guard's verdicts."""
        return [layout.folder(model) / name for name in ("ablation.parquet", "ablation.json", "ablation_guard.parquet")]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of distinct exchanges; none without a guard."""
        assert model is not None
        guard = context.study.judge.guard
        return chunks(len(_questions(context, model)[0]), guard.batch_size, self.name, model) if guard else []

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Ask the guard about one batch."""
        assert unit.model is not None
        rows = _questions(context, unit.model)[0][unit.payload["start"] : unit.payload["stop"]]
        folder = context.layout.folder(unit.model)
        prompts = _column(context, folder / "traces.parquet", "prompt")
        asked = context.table(folder / "ablation_traces.parquet").take(pa.array(rows, pa.int64())).to_pylist()
        guard = context.guard()
        verdicts = guard.judge([Exchange(prompts[r["trace_id"]], r["response"], r["thinking_text"]) for r in asked])
        return write_verdicts(context.part(unit), guard.name, asked, verdicts)

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Give every row its verdict, and sum up."""
        assert model is not None
        folder, study = context.layout.folder(model), context.study
        out, out_json, out_guard = self.outputs(context.layout, model)
        verdicts = self._verdicts(context, model)
        write_parquet(out_guard, pa.Table.from_pylist(verdicts, schema=tables.GUARD))
        written = read_parquet(folder / "ablation_traces.parquet")
        read = read_parquet(folder / "ablation_perplexity.parquet")
        rows, figures = ablation_figures(
            study,
            model,
            read_json(folder / "ablation_conditions.json"),
            written.drop_columns(["thinking_text", "response"]).to_pylist(),
            read.to_pylist(),
            group_clusters(context),
            {row["row"]: row["verdict"] for row in verdicts} if study.judge.guard else None,
        )
        write_parquet(out, pa.Table.from_pylist(rows, schema=tables.ABLATION))
        write_json(out_json, figures)
        return {"conditions": len(rows), "judged": len(verdicts)}

    def _verdicts(self, context: Context, model: str) -> list[dict[str, Any]]:
        """The guard's answer for every row that it can judge, in the order of the rows."""
        if not context.study.judge.guard:
            return []
        _, answered_by = _questions(context, model)
        parts = [read_parquet(context.part(unit)).to_pylist() for unit in self.plan(context, model)]
        asked = {row["row"]: row for part in parts for row in part}
        earlier = read_parquet(context.layout.folder(model) / "guard.parquet").to_pylist()
        known = {row["trace_id"]: row for row in earlier}
        return [
            {**(known[source] if isinstance(source, str) else asked[source]), "row": row}
            for row, source in answered_by.items()
        ]


def _questions(context: Context, model: str) -> tuple[list[int], dict[int, int | str]]:
    """What to ask the guard: rows of ``ablation_traces.parquet`` with distinct exchanges.

    And for every row that can be judged whose verdict it has: that of a row that is asked, or of a trace that the guard
    has read in the step ``guard``.
    """
    folder = context.layout.folder(model)
    path, known = folder / "ablation_traces.parquet", folder / "guard.parquet"
    columns = ["row", "trace_id", "label", "outcome", "as_before", "response", "thinking_text"]

    def find() -> tuple[list[int], dict[int, int | str]]:
        seen = set(context.table(known)["trace_id"].to_pylist())
        first: dict[tuple[str, str, str], int] = {}
        sources: dict[int, int | str] = {}
        for row in context.table(path).select(columns).to_pylist():
            if row["label"] != "harmful" or row["outcome"] not in ("refused", "complied"):
                continue
            if row["as_before"] and row["trace_id"] in seen:
                sources[row["row"]] = row["trace_id"]
            else:
                exchange = (row["trace_id"], row["response"], row["thinking_text"])
                sources[row["row"]] = first.setdefault(exchange, row["row"])
        return list(first.values()), sources

    return context.once(f"ablation_guard:{model}", [path, known], find)


def _column(context: Context, path: Path, name: str) -> dict[str, str]:
    """One column of the traces, by trace."""
    table = context.table(path)
    pairs = zip(table["trace_id"].to_pylist(), table[name].to_pylist(), strict=True)
    return context.once(f"{name}:{path}", [path], lambda: dict(pairs))
