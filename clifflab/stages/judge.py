"""Stage ``judge``: outcome of every trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clifflab import tables
from clifflab.artifacts import read_parquet, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.science.judges import Exchange, RuleJudge
from clifflab.stages.base import Context, Layout, Step, Unit, chunks

_ROWS = 2048


class JudgeStep(Step):
    """The rule judge over all responses.

    Args:
        branch: Whose traces: those of the study, or those of its ``corpus``.
    """

    loads = False

    def __init__(self, branch: str = "") -> None:
        self.branch = branch
        self.name = f"{branch}_judge" if branch else "judge"
        self.inputs = (f"{branch}_traces" if branch else "traces",)

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """A corpus is judged where its traces are wanted."""
        return not self.branch or (model is not None and study.repairs(model))

    def settings(self, study: Study) -> Any:
        """Which judge."""
        return study.judge.model_dump(mode="json", include={"kind"})

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """Outcomes, row for row with the traces."""
        return [layout.folder(model, self.branch) / "outcomes.parquet"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Runs of consecutive traces."""
        total = pq.read_metadata(context.layout.folder(model, self.branch) / "traces.parquet").num_rows
        return chunks(total, _ROWS, self.name, model)

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Judge one run of traces."""
        start, stop = unit.payload["start"], unit.payload["stop"]
        traces = context.table(context.layout.folder(unit.model, self.branch) / "traces.parquet")
        rows = traces.select(["row", "trace_id", "response", "closed"]).slice(start, stop - start).to_pylist()
        judge = RuleJudge()
        verdicts = judge.judge([Exchange("", row["response"], closed=row["closed"]) for row in rows])
        columns = {
            "row": [row["row"] for row in rows],
            "trace_id": [row["trace_id"] for row in rows],
            "judge": [judge.name] * len(rows),
            "outcome": [verdict.outcome for verdict in verdicts],
            "outcome_reason": [verdict.reason for verdict in verdicts],
        }
        write_parquet(context.part(unit), pa.table(columns, schema=tables.OUTCOMES))
        return {"rows": len(rows)}

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the runs."""
        parts = [read_parquet(context.part(unit)) for unit in self.plan(context, model)]
        table = pa.concat_tables(parts) if parts else tables.OUTCOMES.empty_table()
        write_parquet(self.outputs(context.layout, model)[0], table)
        return {"traces": table.num_rows}
