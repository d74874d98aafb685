"""Scored corpora as files, for tests: random scores with many ties, traces of the planted language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clifflab import tables
from clifflab.organism.corpus import corpus_rows
from clifflab.science.judges import judge

MEASURES = ("plateau", "plateau_max", "final", "cliff", "misalignment")


def trace(row: int, text: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A row of ``tables.TRACES`` with placeholders for tokens."""
    base = {
        "row": row,
        "model": "planted",
        "trace_id": f"corpus/{text['id']}#0",
        "id": text["id"],
        "sample": 0,
        "set": text["set"],
        "label": text["label"],
        "group": text["group"],
        "prompt": text["prompt"],
        "thinking": text["thinking"],
        "response": text["response"],
        "token_ids": [1] * (10 + row % 7),
        "prefix_end": 2,
        "thinking_start": 2,
        "closing_start": 6,
        "response_start": 8,
        "closed": True,
        "finish_reason": "stop",
        "source": "generated",
    }
    return {**base, **changes}


def cliff(row: dict[str, Any], outcome: str, probe: str, scores: dict[str, float | None]) -> dict[str, Any]:
    """A row of ``tables.CLIFFS``."""
    names = ("row", "model", "trace_id", "id", "sample", "set", "label", "group")
    key = {"train_positions": probe, "estimator": "logistic", "layer": 3, "reported": True}
    rest = {"cluster": row["group"], "split": "corpus", "outcome": outcome, "thinking_tokens": 4, "closing_tokens": 2}
    return {**{name: row[name] for name in names}, **rest, **key, **scores}


def random_scores(rng: np.random.Generator) -> dict[str, float | None]:
    """Scores on a coarse grid, some saturated, a few missing; logits on a coarser one."""
    if rng.random() < 0.01:
        return {name: None for measure in MEASURES for name in (measure, f"{measure}_logit")}
    plateau, final = (float(value) for value in np.round(rng.beta(0.3, 0.3, 2), 2))
    highest = min(1.0, plateau + float(rng.integers(0, 3)) / 1000)
    values = dict(zip(MEASURES, (plateau, highest, final, plateau - final, highest - final), strict=True))
    return {**values, **{f"{name}_logit": float(rng.integers(-3, 4)) for name in MEASURES}}


def make_corpus(folder: Path, rows: int, files: int = 3, seed: int = 0) -> tuple[list[dict], list[dict], list[dict]]:
    """Write ``traces-*``, ``outcomes`` and ``cliffs-*`` of a corpus, scores in no order; returns their rows."""
    rng = np.random.default_rng(seed)
    traces = [trace(row, text) for row, text in enumerate(corpus_rows(rows, seed))]
    for row in rng.choice(rows, rows // 50, replace=False):
        traces[row] |= {"closed": False, "response": ""}
    outcomes = [judge(t["response"], t["closed"]).outcome for t in traces]
    scored = [i for i in rng.permutation(rows) if traces[i]["closed"]]
    cliffs = [cliff(traces[i], outcomes[i], probe, random_scores(rng)) for i in scored for probe in ("all", "final")]
    other = {**cliffs[0], "reported": False, "layer": 5}  # rows of other layers are none of ours
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema, table in (("traces", tables.TRACES, traces), ("cliffs", tables.CLIFFS, [*cliffs, other])):
        for place, part in enumerate(np.array_split(np.arange(len(table)), files)):
            write(folder / f"{name}-{place}.parquet", [table[i] for i in part], schema)
    verdicts = [
        {"row": t["row"], "trace_id": t["trace_id"], "judge": "rules", "outcome": o, "outcome_reason": ""}
        for t, o in zip(traces, outcomes, strict=True)
    ]
    write(folder / "outcomes.parquet", verdicts, tables.OUTCOMES)
    return traces, verdicts, cliffs


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def whole(folder: Path, name: str) -> pa.Table:
    """A table of several files."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob(f"{name}*.parquet"))])
