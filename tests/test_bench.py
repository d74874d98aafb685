"""``clifflab bench``: records, their meaning, and that unequal results are no benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from clifflab.bench.sweep import SweepBench, UnequalResultsError, bench_sweep
from clifflab.cli.bench import command
from clifflab.errors import InputError

KEYS = [
    "bench", "model", "dtype", "method", "tokens", "repeats", "seconds_median", "tokens_per_second", "ratio_to_plain",
    "max_abs_diff", "peak_memory_bytes",
]  # fmt: skip


def test_bench_sweep_writes_records_and_prints_a_table(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    ways = ["closing", "all", "direct", "attribution"]
    args = ["sweep", "--model", "geometry:tiny", "--tokens", "30", "--closing", "3", "--traces", "2", "--repeats", "2"]
    args += [part for way in ways for part in ("--method", way)]
    result = CliRunner().invoke(command, [*args, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    records = json.loads(file.read_text())
    assert [record["method"] for record in records] == ["plain", *ways]
    for record in records:
        assert list(record) == KEYS
        assert (record["bench"], record["model"], record["dtype"]) == ("sweep", "geometry:tiny", "float32")
        assert (record["tokens"], record["repeats"]) == (33, 2)
        assert record["max_abs_diff"] <= 1e-4
        assert record["peak_memory_bytes"] > 1 << 20
        swept = 3 if record["method"] == "plain" else 16  # plain: a few heads, the others all
        assert record["tokens_per_second"] == pytest.approx(2 * 33 * (swept + 1) / record["seconds_median"])
        full_pass = records[0]["seconds_median"] / 4  # three heads, and the unchanged model
        assert record["ratio_to_plain"] == pytest.approx(full_pass * (swept + 1) / record["seconds_median"])
    assert "ratio to" in result.stdout


def test_half_precision_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from clifflab.sweep import Swept, sweep

    ways = ("closing", "all", "direct", "attribution")
    settings = SweepBench(model="geometry:tiny", dtype="bfloat16", tokens=20, traces=2, repeats=1, methods=ways)
    records = bench_sweep(settings, lambda line: None)
    assert {record.dtype for record in records} == {"bfloat16"}

    def nothing(*args: Any, **kwargs: Any) -> Swept:
        found = sweep(*args, **kwargs)
        return Swept(found.clean, np.broadcast_to(found.clean, found.changed.shape))

    monkeypatch.setattr("clifflab.bench.sweep.sweep", nothing)
    with pytest.raises(UnequalResultsError, match=r"no number where plain has one|differs from plain"):
        bench_sweep(settings, lambda line: None)


def test_a_wrong_result_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from clifflab.sweep import Swept, sweep

    def wrong(*args: Any, **kwargs: Any) -> Swept:
        found = sweep(*args, **kwargs)
        return Swept(found.clean, found.changed + 0.01)

    monkeypatch.setattr("clifflab.bench.sweep.sweep", wrong)
    settings = SweepBench(model="geometry:tiny", tokens=20, traces=1, repeats=1, methods=("closing",))
    with pytest.raises(UnequalResultsError, match=r"closing differs from plain by 0\.01, more than"):
        bench_sweep(settings, lambda line: None)


def test_bad_options_are_one_line() -> None:
    with pytest.raises(InputError, match="--model: geometry:none: no such geometry; choose from smollm2-135m"):
        bench_sweep(SweepBench(model="geometry:none"), lambda line: None)
    with pytest.raises(InputError, match="--tokens: 9000: the model reads 2048 tokens; give at most 2044"):
        bench_sweep(SweepBench(model="geometry:tiny", tokens=9000), lambda line: None)


def test_bench_score_writes_records_and_prints_tables(tmp_path: Path) -> None:
    file = tmp_path / "score.json"
    args = ["score", "--traces", "5", "--shortest", "16", "--longest", "90", "--repeats", "2", "--json", str(file)]
    for model in ("geometry:tiny", "organism:planted"):
        args += ["--model", model]
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0
    records = json.loads(file.read_text())
    assert [(record["model"], record["method"]) for record in records] == [
        (model, method) for model in ("geometry:tiny", "organism:planted") for method in ("plain", "limit", "kernel")
    ]
    for first, record in [(records[i // 3 * 3], record) for i, record in enumerate(records)]:
        assert list(record)[: len(KEYS)] == KEYS
        assert (record["bench"], record["dtype"], record["traces"], record["repeats"]) == ("score", "float32", 5, 2)
        assert record["layer"] == int(22 / 30 * (4 if record["model"] == "geometry:tiny" else 8))
        assert record["max_abs_diff"] <= 1e-4
        assert record["padding_share"] == 0
        assert record["peak_share"] is None
        assert record["ratio_to_plain"] == pytest.approx(record["tokens_per_second"] / first["tokens_per_second"])
    assert records[0]["tokens"] == 53
    assert records[2]["seconds_median"] * records[2]["tokens_per_second"] == pytest.approx(5 * 53)
    assert result.stdout.count("bench score: ") == 2


def test_wrong_scores_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from clifflab.bench.score import PipelineRun, ScoreBench, Timing, bench_score
    from clifflab.scoring.kernel import Kernel

    settings = ScoreBench(models=("geometry:tiny",), dtype="bfloat16", traces=3, longest=80, repeats=1)
    through = PipelineRun(Timing((2.0, 1.0, 4.0), 7), traces=10, tokens=500, padding_share=0.0, max_abs_diff=0.01)
    records = bench_score(settings, lambda line: None, lambda *given: through)
    assert [record.method for record in records] == ["plain", "limit", "kernel", "pipeline"]
    assert records[-1].tokens_per_second == 250
    assert records[-1].tokens == 50
    assert 0 < records[2].max_abs_diff_float32 < 0.1  # type: ignore[operator]
    exact = ScoreBench(models=("geometry:tiny",), dtype="float32", traces=3, longest=80, repeats=1)
    with pytest.raises(UnequalResultsError, match=r"pipeline differs from plain by 0\.01, more than 0\.0001"):
        bench_score(exact, lambda line: None, lambda *given: through)
    with pytest.raises(InputError, match="--layer: 4: the model has layers 0 to 3"):
        bench_score(ScoreBench(models=("geometry:tiny",), layer=4), lambda line: None)

    score = Kernel.score

    def wrong(self: Any, *args: Any) -> Any:
        found = score(self, *args)
        found.measures[1, 0, 2] += 0.2
        return found

    monkeypatch.setattr(Kernel, "score", wrong)
    with pytest.raises(UnequalResultsError, match=r"kernel differs from plain by 0\.2"):
        bench_score(settings, lambda line: None)
