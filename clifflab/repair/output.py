"""The three files of a selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import output_error, write_json, write_parquet, write_text
from clifflab.repair.files import Selection

SELECTION, TRAIN, SUMMARY = "selection.parquet", "train.jsonl", "selection.json"


def write_selection(folder: Path, selection: Selection) -> None:
    """Write a selection, its summary last: what has one is whole."""
    _write(folder, selection.table, selection.targets.rows, selection.summary)


def write_nothing(folder: Path, summary: dict[str, Any]) -> None:
    """Write that there is no selection; ``summary`` holds the ``reason``."""
    _write(folder, tables.SELECTION.empty_table(), [], summary)


def _write(folder: Path, table: pa.Table, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    try:
        (folder / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None
    write_parquet(folder / SELECTION, table)
    write_text(folder / TRAIN, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    write_json(folder / SUMMARY, summary)
