"""Six checkpoints on four simulated GPUs of two nodes: what the event log shows, and the same results through chaos."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from clifflab.runtime.audit import audit
from tests.clusters import Cluster, cluster
from tests.strengths import STRENGTHS, broken, checkpoints, entries, nan
from tests.studies import ablation_study, events

pytestmark = pytest.mark.slow

IDLE_BOUND = 10.0  # seconds that a GPU may stand idle while units wait: twice runtime.patience_seconds
KILLS, DRIVER_AT, NODE_AT = 10, (0.25, 0.6), 0.4
LIMIT = 1500.0


def write_study(folder: Path, models: list[dict[str, Any]]) -> Path:
    data = ablation_study(name="six", models=models)
    data["traces"] = {"max_new_tokens": 112, "batch_size": 12}
    data["runtime"] = {"max_attempts": 12, "backoff_seconds": 0.2}
    file = folder / "six.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def start(file: Path, out: Path, there: Cluster) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clifflab", "run", str(file), "--out", str(out), "--address", there.address]
    env = {**os.environ, **there.env, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(root: Path) -> dict[str, bytes]:
    """Every table of the six models."""
    files = [path for name in STRENGTHS for path in (root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return entries(checkpoints(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def undisturbed(models: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    with cluster([(4, 2), (4, 2)]) as there:
        process = start(write_study(out, models), out, there)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    return out / "six"


def test_the_log_shows_who_did_what(undisturbed: Path) -> None:
    log = events(undisturbed)
    found = audit(log)
    print(f"\nlongest idle {found.longest_idle:.2f} s; lost {len(found.lost)}; loads {found.loads}")
    assert found.problems(IDLE_BOUND) == []
    started = {event["worker"]: event for event in log if event["event"] == "worker_start"}
    gpus = {(event["node"], gpu) for event in started.values() for gpu in event["gpu_ids"]}
    assert len(gpus) == 4
    assert len({node for node, _ in gpus}) == 2
    loads = [event for event in log if event["event"] == "model_load"]
    assert {event["model"] for event in loads} == set(STRENGTHS)
    assert all(started[event["worker"]]["kind"] == "model" for event in loads), "a model was loaded beside the GPUs"
    assert all(len(started[event["worker"]]["gpu_ids"]) == 1 for event in loads)
    assert all(pq.read_metadata(undisturbed / name / "heads.parquet").num_rows for name in ("full", "strong"))


def test_the_cliff_follows_the_strength(undisturbed: Path) -> None:
    """The models differ as they were made to."""
    found = json.loads((undisturbed / "metrics.json").read_text())["models"]
    complied = [found[name]["sets"]["wrapped_strong"]["outcomes"]["complied"] for name in STRENGTHS]
    assert complied == sorted(complied, reverse=True)
    assert complied[0] > 10 * max(1, complied[-1])


class Havoc:
    """Kills workers at random moments, then a node, and twice the driver.

    Args:
        root: The run's folder.
        there: The cluster.
        units: Units of the undisturbed run.
    """

    def __init__(self, root: Path, there: Cluster, units: int) -> None:
        self._root, self._there, self._units = root, there, units
        self._random = random.Random(7)
        self._left_drivers, self._node_left, self.kills = list(DRIVER_AT), True, 0
        self._next = 0.05

    def share(self) -> float:
        return sum(event["event"] == "unit" for event in self._log()) / self._units

    def _log(self) -> list[dict[str, Any]]:
        try:
            lines = (self._root / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def look(self, driver: subprocess.Popen[str]) -> bool:
        """Do what is due; whether the driver was killed."""
        share = self.share()
        if self._left_drivers and share >= self._left_drivers[0]:
            self._left_drivers.pop(0)
            driver.kill()
            driver.wait()
            return True
        if self._node_left and share >= NODE_AT:
            self._node_left = False
            self._there.kill(1)
        elif self.kills < KILLS and share >= self._next:
            self._next += 0.85 / KILLS
            self._kill_worker()
        return False

    def _kill_worker(self) -> None:
        log = self._log()
        begun = max(place for place, event in enumerate(log) if event["event"] == "run_start")
        stopped = {event["worker"] for event in log if event["event"] in ("worker_stop", "worker_lost")}
        alive = [e["pid"] for e in log[begun:] if e["event"] == "worker_start" and e["worker"] not in stopped]
        alive = [pid for pid in alive if Path(f"/proc/{pid}").exists()]
        if alive:
            os.kill(self._random.choice(alive), signal.SIGKILL)
            self.kills += 1


@pytest.fixture(scope="module")
def after_havoc(
    models: list[dict[str, Any]], undisturbed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, int, str, Havoc]]:
    out = tmp_path_factory.mktemp("havoc")
    damaged = entries({"broken": broken(out / "broken"), "nan": nan(out / "nan")})
    file = write_study(out, [damaged[0], *models, damaged[1]])
    units = sum(event["event"] == "unit" for event in events(undisturbed))
    end = time.monotonic() + LIMIT
    with cluster([(4, 2), (4, 2)]) as there:
        havoc = Havoc(out / "six", there, units)
        process = start(file, out, there)
        while process.poll() is None:
            assert time.monotonic() < end, "takes too long"
            if havoc.look(process):
                process = start(file, out, there)
            time.sleep(0.2)
        _, errors = process.communicate()
        yield out / "six", process.returncode, errors, havoc


def test_the_same_results_through_chaos(after_havoc: tuple[Path, int, str, Havoc], undisturbed: Path) -> None:
    root, code, errors, havoc = after_havoc
    found = audit(events(root))
    print(f"\n{havoc.kills} workers killed; lost {len(found.lost)}; twice {len(found.twice)}; again {len(found.again)}")
    assert havoc.kills == KILLS
    assert code == 4, errors
    assert [run["state"] for run in found.runs].count("unfinished") == len(DRIVER_AT), "the driver was killed twice"
    assert any(event["event"] == "node_lost" for event in events(root))
    assert found.problems() == []
    expected, given = contents(undisturbed), contents(root)
    assert {name for name in expected if expected[name] != given.get(name)} == set()
    assert given.keys() == expected.keys()
    mine, other = (json.loads((place / "metrics.json").read_text()) for place in (root, undisturbed))
    assert sorted(failure["model"] for failure in mine.pop("failed")) == ["broken", "nan"]
    assert mine == other
    assert "clifflab: partial: 6 of 8 models are done" in errors
    assert "Traceback" not in errors
