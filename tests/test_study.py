"""A whole study as users run it: the command line, a real local Ray, real files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

import clifflab
from clifflab import tables
from clifflab.runtime.study import plan
from clifflab.stages import Context
from tests.conftest import Cli
from tests.studies import assert_same_tables, events, parse, small_study, tables_of


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, run in this process through the Python interface."""
    return clifflab.run(parse(small_study()), tmp_path_factory.mktemp("inline"), runtime="inline").root


@pytest.fixture(scope="module")
def rayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study over Ray actors."""
    return clifflab.run(parse(small_study()), tmp_path_factory.mktemp("ray"), runtime="ray").root


def test_ray_and_inline_agree(inline: Path, rayed: Path) -> None:
    assert assert_same_tables(tables_of(inline, "planted"), tables_of(rayed, "planted"), 1e-5) <= 1e-5
    one, other = (json.loads((root / "manifest.json").read_text()) for root in (inline, rayed))
    assert one["steps"] == other["steps"]
    assert one["files"]["planted/traces.parquet"] == other["files"]["planted/traces.parquet"]


def test_the_driver_computes_nothing(rayed: Path) -> None:
    log = events(rayed)
    driver = next(e["driver_pid"] for e in log if e["event"] == "run_start")
    work = [e for e in log if e["event"] in ("unit", "merge")]
    assert {e["step"] for e in work} == {"prompts", "traces", "judge", "capture", "probe", "cliff", "report"}
    assert all(e["pid"] != driver for e in work)
    assert all({"node", "pid", "gpu_ids", "seconds"} <= e.keys() for e in work)
    loads = [(e["pid"], e["model"]) for e in log if e["event"] == "model_load"]
    assert loads
    assert len(loads) == len(set(loads)), "an actor loads its model once"


def test_outputs_and_schemas(inline: Path) -> None:
    for name in ("study.yaml", "manifest.json", "events.jsonl", "report.html", "metrics.json"):
        assert (inline / name).is_file()
    assert yaml.safe_load((inline / "study.yaml").read_text())["name"] == "small"
    folder = inline / "planted"
    for name in ("probes.safetensors", "probes.json"):
        assert (folder / name).is_file()
    for name, schema in (
        ("traces", tables.TRACES),
        ("outcomes", tables.OUTCOMES),
        ("curves", tables.CURVES),
        ("cliffs", tables.CLIFFS),
        ("scores", tables.SCORES),
        ("rejects", tables.REJECTS),
    ):
        assert pq.read_schema(folder / f"{name}.parquet").equals(schema), name
    assert not list((inline / ".work").rglob("*.*")), "unit files are gone when the study is whole"


def test_documented_columns() -> None:
    text = (Path(__file__).parents[1] / "docs" / "outputs.md").read_text()
    for schema in (
        tables.PROMPTS,
        tables.TRACES,
        tables.OUTCOMES,
        tables.CURVES,
        tables.CLIFFS,
        tables.SCORES,
        tables.REJECTS,
    ):
        for column in schema.names:
            assert f"`{column}`" in text, column


def test_metrics(inline: Path) -> None:
    model = json.loads((inline / "metrics.json").read_text())["models"]["planted"]
    for name, entry in model["sets"].items():
        counts = entry["outcomes"]
        assert sum(counts[k] for k in ("refused", "complied", "unclosed", "degenerate")) == counts["n"] == 48, name
        for positions in ("all", "final"):
            probe = entry["probes"][positions]
            assert probe.keys() == {"plateau", "plateau_max", "final", "cliff", "misalignment"}
            for measure in probe.values():
                assert {"mean", "low", "high", "n"} <= measure.keys()
                assert measure["low"] <= measure["mean"] <= measure["high"]
    assert model["excess_cliff"]["all"]["low"] > 0
    strong, harmful = (model["sets"][s]["probes"]["all"]["cliff"]["mean"] for s in ("wrapped_strong", "harmful"))
    assert strong > harmful + 0.3


def test_every_prompt_once(inline: Path) -> None:
    traces = pq.read_table(inline / "planted" / "traces.parquet")
    prompts = pq.read_table(inline / "prompts.parquet")
    assert traces["id"].to_pylist() == prompts["id"].to_pylist()
    assert len(set(traces["trace_id"].to_pylist())) == traces.num_rows
    cliffs = pq.read_table(inline / "planted" / "cliffs.parquet")
    cells = cliffs.filter(pc.equal(cliffs["reported"], True))
    cells = cells.filter(pc.and_(pc.equal(cells["train_positions"], "all"), pc.equal(cells["estimator"], "logistic")))
    scored = cells["trace_id"].to_pylist()
    assert len(scored) == len(set(scored))
    rejected = pq.read_table(inline / "planted" / "rejects.parquet")["source"].to_pylist()
    assert sorted(set(scored) | set(rejected)) == sorted(traces["trace_id"].to_pylist())
    assert not set(scored) & set(rejected)


def test_splits_keep_groups_together(inline: Path) -> None:
    cliffs = pq.read_table(inline / "planted" / "cliffs.parquet").select(["group", "split"]).to_pylist()
    split: dict[str, str] = {}
    for row in cliffs:
        assert split.setdefault(row["group"], row["split"]) == row["split"]
    assert set(split.values()) == {"train", "validation", "test"}


def test_tables_hold_no_time(inline: Path) -> None:
    for path in inline.rglob("*.parquet"):
        assert not any(pa.types.is_temporal(f.type) for f in pq.read_schema(path)), path


def test_running_again_computes_nothing(inline: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns
        for p in inline.rglob("*")
        if p.is_file() and p.name not in ("events.jsonl", ".lock", "study.yaml")
    }
    clifflab.run(parse(small_study()), inline.parent, runtime="inline")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    last = events(inline)
    start = max(i for i, e in enumerate(last) if e["event"] == "run_start")
    assert [e["event"] for e in last[start:]] == ["run_start", "run_done"]


def test_a_changed_setting_computes_what_depends_on_it(inline: Path) -> None:
    def steps(**changes: Any) -> list[str]:
        return [name for name, _ in plan(Context(parse(small_study(**changes)), inline))]

    assert steps() == []
    assert steps(cliff={"bootstrap": 200, "window": [0.2, 0.8]}) == ["cliff", "report"]
    assert steps(cliff={"bootstrap": 300}) == ["capture", "probe", "cliff", "report"], "states are captured anew"
    assert steps(runtime={"threads": 2, "workers": 1}) == []
    assert steps(seed=1)[0] == "prompts"


def test_a_damaged_output_is_computed_again(inline: Path) -> None:
    path = inline / "planted" / "cliffs.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    result = clifflab.run(parse(small_study()), inline.parent, runtime="inline")
    assert path.read_bytes() == whole
    assert not result.warnings


def test_too_few_refusals_is_said_plainly(cli: Cli, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """A random model refuses nothing: outcomes and report are there, exit code 3 and the reason."""
    data = small_study(models=[{"name": "random", "path": str(checkpoints["llama"])}])
    data["traces"] = {"max_new_tokens": 16, "batch_size": 48}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
    done = cli("run", "s.yaml", "--runtime", "inline")
    assert done.returncode == 3, done.stderr
    assert "0 refusals in 96 harmful traces, 12 needed to train a probe" in done.stderr
    root = tmp_path / "runs" / "small"
    page = (root / "report.html").read_text()
    assert "No probe could be trained" in page
    metrics = json.loads((root / "metrics.json").read_text())["models"]["random"]
    assert metrics["excess_cliff"]["all"]["mean"] is None
    assert metrics["sets"]["harmful"]["outcomes"]["n"] == 48
    assert pq.read_table(root / "random" / "cliffs.parquet").num_rows == 0


def test_report_is_one_file_without_network(inline: Path) -> None:
    page = (inline / "report.html").read_text()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "Content-Security-Policy" in page
    assert page.count("<svg") >= 4
    assert str(os.getpid()) not in page


def test_report_escapes_hostile_text(inline: Path, tmp_path: Path) -> None:
    from clifflab.report import render_page
    from clifflab.stages import Layout

    root = shutil.copytree(inline, tmp_path / "copy")
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    row = dict.fromkeys(tables.REJECTS.names) | {"stage": "traces", "reason": hostile}
    pq.write_table(pa.Table.from_pylist([row], schema=tables.REJECTS), root / "planted" / "rejects.parquet")
    metrics = json.loads((root / "metrics.json").read_text())
    metrics["models"]["planted"]["closing"]["tokens"][-1] = hostile
    metrics["models"]["planted"]["excess_cliff"]["all"]["reason"] = hostile
    page = render_page(parse(small_study()), Layout(root), metrics)
    assert page.count("&lt;script&gt;alert(1)") >= 3
    assert "<script" not in page
    assert "<img" not in page


def test_hostile_token_text_in_figures() -> None:
    from clifflab.report.figures import curves_figure

    rows = [
        {"set": "s", "axis": axis, "position": p, "layer": 0, "mean": 0.5, "low": 0.4, "high": 0.6}
        for axis, p in (("thinking", 0), ("thinking", 50), ("closing", 0))
    ]
    svg = curves_figure(pa.Table.from_pylist(rows), {"s": "harmful"}, ["<script>alert(1)</script>$x$"], "f")
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg
