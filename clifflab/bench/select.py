"""``clifflab bench select``: the streaming top-k against a sort of the whole table, over the same files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from clifflab import tables
from clifflab.bench.records import UnequalResultsError, timed
from clifflab.config import SelectConfig
from clifflab.repair.columns import NEEDED, PROBE, probe_rows
from clifflab.repair.corpus import Corpus
from clifflab.repair.reading import read_here
from clifflab.repair.select import choose
from clifflab.repair.stream import Plan, fold, reduce_scores
from clifflab.science.cliff import MEASURES
from clifflab.science.selection import TIE, budget_count, parts_of


@dataclass(frozen=True)
class SelectBench:
    """What to run.

    Attributes:
        rows: Rows of the score table, one a trace.
        files: Files that it comes in.
        budget: A count, or a share of the rows.
        repeats: Timed rounds.
        seed: Of the table.
    """

    rows: int = 1_000_000
    files: int = 10
    budget: float = 0.017
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class SelectRecord:
    """One method's figures.

    Attributes:
        bench: Name of the benchmark.
        method: ``plain`` or ``stream``.
        rows: Rows of the table.
        chosen: Harmful examples that were chosen.
        repeats: Timed runs, after an untimed one.
        seconds_median: Median seconds of a run.
        rows_per_second: Rows in these seconds.
        ratio_to_plain: The plain way's seconds over this method's.
        differences: Ids that differ from the plain way's, in order; always 0.
        peak_memory_bytes: Peak memory of this process during the runs.
    """

    bench: str
    method: str
    rows: int
    chosen: int
    repeats: int
    seconds_median: float
    rows_per_second: float
    ratio_to_plain: float
    differences: int
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench_select(settings: SelectBench, note: Callable[[str], None]) -> list[SelectRecord]:
    """Run the benchmark.

    Args:
        settings: What to run.
        note: Told of the progress.

    Raises:
        UnequalResultsError: The two ways choose other traces, or in another order.
    """
    with TemporaryDirectory(prefix="clifflab-bench-") as folder:
        note(f"writing {settings.rows:,} rows in {settings.files} files")
        files = write_scores(Path(folder), settings.rows, settings.files, settings.seed)
        config = SelectConfig(beside=(), budget=settings.budget)
        count = parts_of(budget_count(config.budget, settings.rows), config.benign)[0]
        ways: dict[str, Callable[[], list[str]]] = {
            "plain": lambda: sort_all(files, count),
            "stream": lambda: stream(files, config, settings.rows, settings.seed),
        }
        found = {name: way() for name, way in ways.items()}
        differences = sum(a != b for a, b in zip(found["plain"], found["stream"], strict=False))
        if found["plain"] != found["stream"]:
            raise UnequalResultsError(f"bench select: {differences} of {count} choices differ from the sort of all")
        times = timed(ways, settings.repeats, torch.device("cpu"), note)
    return [
        SelectRecord(
            bench="select",
            method=name,
            rows=settings.rows,
            chosen=len(found[name]),
            repeats=settings.repeats,
            seconds_median=time.median,
            rows_per_second=settings.rows / time.median,
            ratio_to_plain=times["plain"].median / time.median,
            differences=differences,
            peak_memory_bytes=time.peak,
        )
        for name, time in times.items()
    ]


def stream(files: Sequence[str], config: SelectConfig, total: int, seed: int) -> list[str]:
    """Ids of the harmful examples, best first: the product's way, in this process."""
    plan = Plan(config, *parts_of(budget_count(config.budget, total), config.benign), seed)
    part = fold(read_here(files, [*NEEDED, *PROBE], lambda scores: reduce_scores(scores, plan)), plan)
    return choose(Corpus.checked(part.table, total), config.by, config.budget, config, seed).ids("harmful")


def sort_all(files: Sequence[str], count: int) -> list[str]:
    """The same by Arrow's sort of all eligible rows, nothing shared with the product's way."""
    table = probe_rows(pa.concat_tables(pq.read_table(file, columns=[*NEEDED, *PROBE]) for file in files), "all")
    whole = pc.is_in(table["outcome"], value_set=pa.array(["refused", "complied"]))
    table = table.filter(pc.and_(whole, pc.equal(table["label"], "harmful")))
    for name in ("final", "misalignment"):
        table = table.filter(pc.and_(pc.is_valid(table[name]), pc.is_valid(table[f"{name}_logit"])))
    bucket = pc.round(pc.divide(table["misalignment"].cast(pa.float64()), TIE), round_mode="half_to_even")
    keys = pa.table({"bucket": bucket, "logit": table["misalignment_logit"], "id": table["trace_id"]})
    order = pc.sort_indices(keys, sort_keys=[("bucket", "descending"), ("logit", "descending"), ("id", "ascending")])
    return list(table["trace_id"].take(order[:count]).to_pylist())


def write_scores(folder: Path, rows: int, files: int, seed: int) -> list[str]:
    """Write a random score table: saturated scores, many ties down to the logit, nulls, all outcomes and labels."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(rows)
    written = []
    for place, mine in enumerate(np.array_split(numbers, files)):
        written.append(str(folder / f"cliffs-{place:03d}.parquet"))
        pq.write_table(score_rows(mine, rng), written[-1], row_group_size=100_000)
    return written


def score_rows(numbers: np.ndarray[Any, Any], rng: np.random.Generator) -> pa.Table:
    """Rows of ``tables.CLIFFS`` with these numbers as names and random scores."""
    total = len(numbers)
    final = np.where(rng.random(total) < 0.3, rng.random(total) ** 6, 1 - rng.random(total) ** 6)
    plateau = 1 - rng.random(total) ** 4
    highest = np.minimum(1, plateau + 0.1 * rng.random(total))
    logits = np.round(rng.normal(0, 4, (5, total)), 1)  # coarse: equal logits are common
    none = rng.random(total) < 0.002
    measures = [plateau, highest, final, plateau - final, highest - final]
    columns: dict[str, Any] = {
        **{name: pa.array(value.astype(np.float32), mask=none) for name, value in zip(MEASURES, measures, strict=True)},
        **{
            f"{name}_logit": pa.array(value.astype(np.float32), mask=none)
            for name, value in zip(MEASURES, logits, strict=True)
        },
        "row": numbers,
        "model": ["bench"] * total,
        "trace_id": [f"corpus/{number:09d}#0" for number in numbers],
        "id": [f"{number:09d}" for number in numbers],
        "sample": np.zeros(total, np.int32),
        "set": rng.choice(["plain", "wrapped", "asked"], total),
        "label": rng.choice(["harmful", "benign"], total, p=[0.6, 0.4]),
        "group": [f"group-{number // 4}" for number in numbers],
        "outcome": rng.choice(["refused", "complied", "degenerate"], total, p=[0.5, 0.49, 0.01]),
        "train_positions": ["all"] * total,
        "estimator": ["logistic"] * total,
        "layer": np.full(total, 7, np.int32),
        "reported": np.ones(total, dtype=bool),
        "thinking_tokens": rng.integers(10, 500, total).astype(np.int32),
        "closing_tokens": np.full(total, 4, np.int32),
    }
    lacking = {part.name: pa.nulls(total, part.type) for part in tables.CLIFFS if part.name not in columns}
    return pa.table({**columns, **lacking}).select(tables.CLIFFS.names).cast(tables.CLIFFS)
