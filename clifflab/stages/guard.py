"""Stage ``guard``: a guard model's verdict on every answer, and what every judge of the study is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clifflab import tables
from clifflab.artifacts import read_parquet, write_json, write_parquet
from clifflab.config import ModelSpec, Study
from clifflab.data.files import source_hash
from clifflab.data.labels import Labels, read_labels
from clifflab.engines.guard import guard_identity, guard_name
from clifflab.science.agreement import Agreement
from clifflab.science.judges import Exchange, RuleJudge, Verdict, answers
from clifflab.stages.base import GUARD, Context, Layout, Step, Unit, chunks

_LABELS = "labels"
_UNMEASURED = "not measured: set judge.labels"


class GuardStep(Step):
    """The guard over all closed, non-degenerate traces, benign ones as a control; a unit is one batch.

    Where labels are configured too, the guard reads the labelled responses in units of their own, and
    ``agreement.json`` says how well each judge agrees with them.

    Args:
        branch: Whose traces: those of the study, or those of its ``corpus``, without labels.
    """

    def __init__(self, branch: str = "") -> None:
        self.branch = branch
        prefix = f"{branch}_" if branch else ""
        self.name = f"{prefix}guard"
        self.inputs = (branch or "prompts", f"{prefix}traces", f"{prefix}judge")

    def applies(self, study: Study, model: ModelSpec | None) -> bool:
        """A corpus is judged where its traces are wanted."""
        return not self.branch or (model is not None and study.repairs(model))

    def settings(self, study: Study) -> Any:
        """How the guard is asked; what it is, is in :meth:`reads`."""
        guard = study.judge.guard
        how = guard.model_dump(mode="json", exclude={"path", "revision", "template"}) if guard else None
        return {"guard": how, "labels": bool(study.judge.labels) and not self.branch}

    def reads(self, study: Study, file_hash: Callable[[Path], str]) -> Any:
        """The guard's files and the labels, by content."""
        guard, labels = study.judge.guard, study.judge.labels if not self.branch else None
        if not guard and not labels:
            return None
        return {
            "guard": guard_identity(guard, file_hash) if guard else None,
            "labels": source_hash(labels) if labels else None,
        }

    def needs(self, context: Context, unit: Unit | None, model: str | None) -> str | None:
        """The guard."""
        return GUARD if unit else None

    def outputs(self, layout: Layout, model: str | None) -> list[Path]:
        """The guard's verdicts, and the judges' agreement with labels."""
        verdicts = layout.folder(model, self.branch) / "guard.parquet"
        return [verdicts] if self.branch else [verdicts, layout.folder(model) / "agreement.json"]

    def plan(self, context: Context, model: str | None) -> list[Unit]:
        """Batches of judgeable traces, then of labelled responses; none without a guard."""
        assert model is not None
        guard = context.study.judge.guard
        if not guard:
            return []
        units = chunks(len(_judgeable(context, model, self.branch)), guard.batch_size, self.name, model)
        labels = None if self.branch else _labels(context)
        if labels:
            units += [
                Unit(self.name, model, f"{_LABELS}-{unit.key}", {**unit.payload, _LABELS: True})
                for unit in chunks(len(labels.rows), guard.batch_size, self.name, model)
            ]
        return units

    def compute(self, context: Context, unit: Unit) -> dict[str, Any]:
        """Ask the guard about one batch."""
        assert unit.model is not None
        start, stop = unit.payload["start"], unit.payload["stop"]
        if unit.payload.get(_LABELS):
            labels = _labels(context)
            assert labels is not None
            rows: list[dict[str, Any]] = [
                {"row": row, "trace_id": f"{_LABELS}#{row}", "exchange": labels.rows[row].exchange}
                for row in range(start, stop)
            ]
        else:
            table = context.table(context.layout.folder(unit.model, self.branch) / "traces.parquet")
            columns = ["row", "trace_id", "prompt", "response", "thinking"]
            chosen = pa.array(_judgeable(context, unit.model, self.branch)[start:stop], pa.int64())
            rows = [
                {**row, "exchange": Exchange(row["prompt"], row["response"], row["thinking"])}
                for row in table.select(columns).take(chosen).to_pylist()
            ]
        guard = context.guard()
        verdicts = guard.judge([row["exchange"] for row in rows])
        return write_verdicts(context.part(unit), guard.name, rows, verdicts)

    def merge(self, context: Context, model: str | None) -> dict[str, Any]:
        """Join the batches, and measure the judges."""
        units = self.plan(context, model)
        parts = {False: [tables.GUARD.empty_table()], True: [tables.GUARD.empty_table()]}
        for unit in units:
            parts[bool(unit.payload.get(_LABELS))].append(read_parquet(context.part(unit)))
        traces, labelled = pa.concat_tables(parts[False]), pa.concat_tables(parts[True])
        out, *agreement = self.outputs(context.layout, model)
        write_parquet(out, traces)
        for path in agreement:
            write_json(path, _agreements(context, labelled))
        unreadable = pc.sum(pc.equal(traces["verdict"], "unreadable")).as_py() or 0
        cut = pc.sum(pc.greater(traces["cut_tokens"], 0)).as_py() or 0
        return {"judged": traces.num_rows, "unreadable": unreadable, "cut": cut}


def write_verdicts(
    path: Path, guard: str, rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Write the unit file of a guard's batch; returns its counts.

    Args:
        path: The file.
        guard: Name of the guard.
        rows: What was asked about, with ``row`` and ``trace_id``.
        verdicts: The answers.
    """
    columns = {
        "row": [row["row"] for row in rows],
        "trace_id": [row["trace_id"] for row in rows],
        "guard": [guard] * len(rows),
        "verdict": [verdict.outcome for verdict in verdicts],
        "categories": [list(verdict.categories) for verdict in verdicts],
        "refused": [verdict.refused for verdict in verdicts],
        "answer": [verdict.reason for verdict in verdicts],
        "cut_tokens": [verdict.cut_tokens for verdict in verdicts],
    }
    write_parquet(path, pa.table(columns, schema=tables.GUARD))
    return {"rows": len(rows), "cut": sum(verdict.cut_tokens > 0 for verdict in verdicts)}


def _judgeable(context: Context, model: str, branch: str) -> list[int]:
    """Indices of the traces that a guard can judge: the rule judge found them closed and not degenerate."""
    path = context.layout.folder(model, branch) / "outcomes.parquet"
    outcomes = context.table(path)["outcome"]

    def choose() -> list[int]:
        judged = pc.is_in(outcomes, pa.array(["refused", "complied"]))
        return [int(i) for i in pc.indices_nonzero(judged).to_pylist()]

    return context.once(f"judgeable:{model}/{branch}", [path], choose)


def _labels(context: Context) -> Labels | None:
    path = context.study.judge.labels
    return context.once("judge.labels", [], lambda: read_labels(path, field="judge.labels")) if path else None


def _agreements(context: Context, labelled: pa.Table) -> dict[str, Any]:
    """``agreement.json``: for each judge its figures, or why there are none."""
    guard, labels = context.study.judge.guard, _labels(context)
    names = [RuleJudge.name, *([guard_name(guard)] if guard else [])]
    if labels is None:
        return {"labels": None, "judges": [{"judge": name, "reason": _UNMEASURED} for name in names]}
    rows = [row.exchange for row in labels.rows]
    verdicts = {RuleJudge.name: RuleJudge().judge(rows)}
    if guard:
        verdicts[names[1]] = [
            Verdict(row["verdict"], row["answer"], refused=row["refused"]) for row in labelled.to_pylist()
        ]
    judges: list[dict[str, Any]] = []
    for name, given in verdicts.items():
        found = answers(given, labels.kind)
        if found is None:
            judges.append({"judge": name, "reason": f"not measured: the labels speak of {labels.kind} and it does not"})
            continue
        truth, groups = [row.truth for row in labels.rows], [row.group for row in labels.rows]
        agreement = Agreement(truth, found, groups, seed=context.study.seed)
        judges.append({"judge": name, **agreement.summary()})
    source = str(context.study.judge.labels)
    return {
        "labels": source if source.startswith("organism:") else Path(source).name,
        "kind": labels.kind,
        "broken": labels.broken,
        "judges": judges,
    }
