"""Columns of a scored corpus, and whether a table has them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from clifflab.errors import InputError
from clifflab.science.cliff import MEASURES

SCORES = (*MEASURES, *(f"{name}_logit" for name in MEASURES))
# Of one row a trace; a score table may hold further text columns, which can stratify.
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("model", "trace_id", "id", "set", "label", "group", "outcome")),
        *((name, pa.string()) for name in ("cluster", "category", "verdict", "finish_reason")),
        *((name, pa.int32()) for name in ("thinking_tokens", "closing_tokens", "tokens")),
        ("has_target", pa.bool_()),
        *((name, pa.float32()) for name in SCORES),
    ]
)
CODE = "code"  # of the trace's id
_MAY_LACK = {"cluster", "category", "verdict", "finish_reason", "has_target", "tokens", "closing_tokens"}
NEEDED = tuple(name for name in COLUMNS.names if name not in _MAY_LACK)
PROBE = ("train_positions", "estimator", "reported")
# Text columns of a score table that cannot stratify: they name single traces, or are the same in every row.
_NAMES = {"model", "trace_id", "id", "verdict", "finish_reason", *PROBE}


def probe_rows(cliffs: pa.Table, probe: str) -> pa.Table:
    """Rows of the reported logistic probe of one kind."""
    mine = pc.and_(pc.equal(cliffs["train_positions"], probe), pc.equal(cliffs["estimator"], "logistic"))
    return cliffs.filter(pc.and_(mine, cliffs["reported"]))


def candidates_of(scores: pa.Table, probe: str) -> pa.Table:
    """Rows of a batch of a score table as rows of a corpus, for one probe."""
    table = in_full(probe_rows(scores, probe).drop_columns(list(PROBE)))
    label = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(table["label"], "")))
    return table.set_column(table.schema.get_field_index("label"), "label", label)


def check_columns(schema: pa.Schema, source: str) -> None:
    """Whether a table is one of scores.

    Raises:
        InputError: It lacks columns.
    """
    lacking = [name for name in (*NEEDED, *PROBE) if name not in schema.names]
    if any(name in lacking for name in SCORES):
        problem = f"holds no scores: no column {lacking[0]}"
        raise InputError("scores", source, problem, "give a cliffs.parquet, as a study or `clifflab score` writes it")
    if lacking:
        raise InputError("scores", source, f"has no column {lacking[0]}", "give a cliffs.parquet")


def check_models(models: Sequence[str | None]) -> None:
    """Whether all scores are of one model.

    Raises:
        InputError: They are not.
    """
    if len(models) > 1:
        names = ", ".join(sorted(map(str, models)))
        raise InputError("scores", names, f"of {len(models)} models in one selection", "give the traces of one model")


def check_stratify(column: str, schema: pa.Schema) -> None:
    """Whether a column can share the budget.

    Raises:
        InputError: There is no such column of text; lists those that there are.
    """
    text = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    there = [name for name in text if name not in _NAMES]
    if column not in there:
        raise InputError("stratify", column, "no such column", f"choose from {', '.join(there)}")


def in_full(table: pa.Table) -> pa.Table:
    """All columns of a corpus in their types, and further text columns."""
    columns = {}
    for name, kind in zip(COLUMNS.names, COLUMNS.types, strict=True):
        there = name in table.schema.names
        columns[name] = table[name].cast(kind) if there else pa.nulls(table.num_rows, kind)
    for part in table.schema:
        if part.name not in columns and (pa.types.is_string(part.type) or pa.types.is_large_string(part.type)):
            columns[part.name] = table[part.name].cast(pa.string())
    return pa.table(columns)
