"""kill -9 in the middle of ``traces``: running again gives every prompt exactly once and the undisturbed table."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import clifflab
from tests.forkserver import Command, Server
from tests.studies import events, parse, small_study


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = small_study(name="crash")
    data["traces"] = {"max_new_tokens": 112, "batch_size": 6}
    path = tmp_path_factory.mktemp("crash") / "crash.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def start(study_file: Path, tmp_path: Path, forkserver: Server) -> Callable[[], Command]:
    """``clifflab run`` into the test's folder, from this one."""
    return lambda: forkserver.start(["run", str(study_file), "--out", str(tmp_path)], Path.cwd(), os.environ)


def wait_for_parts(out: Path, count: int, process: Command) -> None:
    """Wait until some, but not all, batches of traces are there."""
    parts = out / "crash" / ".work" / "planted" / "traces"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(parts.rglob("0*.parquet"))) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no batches appeared")


@pytest.fixture(scope="module")
def undisturbed(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study in one process, start to end."""
    study = parse(yaml.safe_load(study_file.read_text()))
    return clifflab.run(study, tmp_path_factory.mktemp("undisturbed"), runtime="inline").root


def assert_equal_results(root: Path, undisturbed: Path) -> None:
    traces = pq.read_table(root / "planted" / "traces.parquet")
    ids = traces["trace_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 144
    for name in ("traces", "outcomes", "cliffs", "curves", "rejects"):
        file = f"planted/{name}.parquet"
        assert (root / file).read_bytes() == (undisturbed / file).read_bytes(), name
    assert json.loads((root / "metrics.json").read_text()) == json.loads((undisturbed / "metrics.json").read_text())


def test_killed_driver(start: Callable[[], Command], undisturbed: Path, tmp_path: Path) -> None:
    process = start()
    wait_for_parts(tmp_path, 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    root = tmp_path / "crash"
    assert not (root / "planted" / "traces.parquet").exists(), "killed too late to show anything"
    again = start()
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert_equal_results(root, undisturbed)
    resumed = [e for e in events(root) if e["event"] == "step_start" and e["step"] == "traces"]
    assert resumed[-1]["missing"] < resumed[0]["missing"] == 24, "batches that were there are not computed again"


def test_killed_worker(start: Callable[[], Command], undisturbed: Path, tmp_path: Path) -> None:
    process = start()
    wait_for_parts(tmp_path, 3, process)
    root = tmp_path / "crash"
    pids = {e["pid"] for e in events(root) if e["event"] == "unit" and e["step"] == "traces"}
    assert process.pid not in pids
    os.kill(pids.pop(), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    log = events(root)
    assert [e["step"] for e in log if e["event"] == "worker_lost"] == ["traces"]
    assert any(e.get("attempt") == 2 for e in log if e["event"] == "unit")
    assert_equal_results(root, undisturbed)


def test_two_runs_of_one_output(start: Callable[[], Command], tmp_path: Path) -> None:
    first = start()
    wait_for_parts(tmp_path, 1, first)
    second = start()
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "another run is writing there" in errors
    assert len(errors.strip().splitlines()) == 1
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "the same command continues" in errors
