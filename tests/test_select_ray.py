"""Selecting over Ray Data: the same examples as in this process, and a table of a million rows in little memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clifflab.bench.select import sort_all, write_scores
from clifflab.config import RuntimeConfig, SelectConfig, TargetsConfig
from clifflab.errors import InputError
from clifflab.repair.columns import NEEDED, PROBE
from clifflab.repair.corpus import Corpus
from clifflab.repair.files import Sources, select_files
from clifflab.repair.reading import read_here
from clifflab.repair.select import choose
from clifflab.repair.stream import Plan, fold, reduce_scores
from clifflab.runtime.select import RayReader
from clifflab.science.selection import parts_of
from tests.corpora import make_corpus


@pytest.fixture(scope="module")
def over_ray() -> Iterator[RayReader]:
    with RayReader(RuntimeConfig(workers=2), small=0) as reader:
        yield reader


def test_over_ray_the_same_is_chosen(tmp_path: Path, over_ray: RayReader) -> None:
    make_corpus(tmp_path, 3_000, files=3)
    files = Sources(*(sorted(map(str, tmp_path.glob(f"{name}-*.parquet"))) for name in ("cliffs", "traces")))
    config = SelectConfig(budget=0.03, stratify="set", max_tokens=14)

    def scores_over_ray(files: Any, columns: Any, reduce: Any) -> Iterator[Any]:
        return (over_ray if "cliffs" in files[0] else read_here)(files, columns, reduce)

    here, there = (select_files(files, config, TargetsConfig(), 0, read) for read in (read_here, scores_over_ray))
    assert here.summary["left_out"]["too_long"] > 100
    assert there.table.equals(here.table)
    assert there.targets.rows == here.targets.rows
    assert there.summary == here.summary


def test_a_users_mistake_comes_back_from_a_task(tmp_path: Path, over_ray: RayReader) -> None:
    make_corpus(tmp_path, 50, files=1)

    def fail(table: pa.Table) -> None:
        raise InputError("field", table.num_rows, "wrong", "mend it")

    with pytest.raises(InputError, match="field: 50: wrong; mend it"):
        list(over_ray([str(tmp_path / "traces-0.parquet")], ["trace_id"], fail))


def memory() -> int:
    """Bytes of this process and all that it started, shared pages once (proportional set sizes)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    family, total = {os.getpid()}, 0
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


@pytest.mark.slow
def test_a_million_rows_are_ranked_exactly_in_little_memory(
    tmp_path: Path, over_ray: RayReader, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 1_000_000
    files = write_scores(tmp_path, rows, 10, seed=0)
    config = SelectConfig(beside=("final", "plateau", "random", "rules"))
    harmful, benign = parts_of(17_000, config.benign)
    plan = Plan(config, harmful, benign, 0)
    columns = [*NEEDED, *PROBE]
    sum(over_ray(files, ["trace_id"], lambda table: table.num_rows))  # starts Ray and its workers
    before, peak, done = memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    part: Any = fold(over_ray(files, columns, lambda scores: reduce_scores(scores, plan)), plan)
    chosen = choose(Corpus.checked(part.table, rows), "misalignment", config.budget, config, 0)
    done.set()
    watcher.join()
    with capsys.disabled():
        above = f"{(peak - before) / 2**20:,.0f} MiB above Ray's own {before / 2**20:,.0f} MiB"
        print(f"\n{rows:,} rows, {harmful:,} chosen by each of {len(plan.selectors)} selectors: {above}")
    assert peak > before
    assert peak - before < 1 << 30
    assert chosen.ids("harmful") == sort_all(files, harmful)
    assert sum(part.stats.outcomes.values()) == rows
