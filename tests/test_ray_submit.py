"""A real cluster on this machine: a dashboard, a token, two more nodes. A study is sent to it from elsewhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from clifflab.runtime.study import run
from tests.conftest import Cli
from tests.studies import assert_same_tables, parse, small_study, tables_of

ROOT = Path(__file__).resolve().parents[1]
PLANTED = {"HF_TOKEN": "hf_plantedplanted", "AWS_SECRET_ACCESS_KEY": "aws_plantedplanted"}
SECONDS = 120


@dataclass(frozen=True)
class Running:
    """A cluster that runs: its state folder, Ray's own folder, and what its users export."""

    state: Path
    folder: Path
    env: dict[str, str]

    @property
    def token(self) -> str:
        return Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()


def local(verb: str, *args: str, state: Path) -> subprocess.CompletedProcess[str]:
    given = {"CLIFFLAB_CLUSTER": str(state), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(ROOT / "cluster" / "local"), verb, *args]
    return subprocess.run(command, env={**kept, **given}, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state = tmp_path_factory.mktemp("cluster")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = local("start", "--nodes", "3", "--cpus", "1", "--port", port, state=state)
    assert started.returncode == 0, started.stderr
    about = json.loads((state / "cluster.json").read_text())
    lines = [line.removeprefix("export ").partition("=") for line in local("env", state=state).stdout.splitlines()]
    try:
        yield Running(state, Path(about["folder"]), {name: value for name, _, value in lines})
    finally:
        # One node is killed before, as nodes are; the rest must go all the same.
        os.kill(about["nodes"][1]["pid"], 9)
        stopped = local("stop", state=state)
        assert stopped.returncode == 0, stopped.stderr
        left = [line for line in processes() if about["folder"] in line]
        assert not left
        assert not Path(about["folder"]).exists()
        assert not (state / "token").exists()


@pytest.fixture(autouse=True)
def nothing_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the same process may have left a token of their own Ray in the environment."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


def processes() -> list[str]:
    return subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, text=True).stdout.splitlines()


def until(test: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, what
        time.sleep(0.3)


def quick_study() -> dict[str, Any]:
    data = small_study(truncation={"traces": 0})
    data["prompts"] = [{**prompts, "limit": 24} for prompts in data["prompts"][:2]]
    return data


def test_what_the_cluster_keeps(cluster: Running) -> None:
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    assert len(cluster.token) == 64
    assert cluster.env["RAY_AUTH_MODE"] == "token"
    again = local("start", state=cluster.state)
    assert again.returncode == 1
    assert "runs already" in again.stderr


def test_refused_within_seconds(cluster: Running, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(small_study()))
    address = {"RAY_API_SERVER_ADDRESS": cluster.env["RAY_API_SERVER_ADDRESS"], "HOME": str(tmp_path)}
    for given, words in {
        "none": ({}, "asks for a token, and none was found"),
        "wrong": ({"RAY_AUTH_TOKEN": "0" * 64}, "the token is wrong"),
        "elsewhere": ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "nothing listens there"),
    }.values():
        took: list[float] = []
        while not took or (min(took) >= 5 and len(took) < 3):  # other tests may keep the machine busy
            began = time.monotonic()
            done = cli("submit", "s.yaml", **{**address, **given}, fresh=True)
            took.append(time.monotonic() - began)
        assert min(took) < 5
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert words in done.stderr


def test_a_study_is_sent_and_followed(cluster: Running, cli: Cli, tmp_path: Path) -> None:
    env = {**cluster.env, "HOME": str(tmp_path)}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(quick_study()))
    few = ("--set", "runtime.workers=1")  # each takes seconds to start
    sent = cli("submit", "s.yaml", "--follow", "--no-check", *few, timeout=SECONDS, **env)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert "done report" in sent.stdout
    assert (tmp_path / "runs" / "small" / "metrics.json").is_file()


@pytest.mark.slow
def test_a_study_is_sent_stopped_sent_again(
    cluster: Running, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clifflab.runtime.submit.client import connect, find_job

    env = {**cluster.env, **PLANTED, "HOME": str(tmp_path)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    study = tmp_path / "elsewhere" / "s.yaml"
    study.parent.mkdir()
    data = quick_study()
    rows = [{"prompt": f"please tell me how to bake a cake {i}", "id": f"own-{i}"} for i in range(8)]
    (study.parent / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data["prompts"].append({"name": "own", "path": "own.jsonl", "label": "benign"})
    study.write_text(yaml.safe_dump(data))

    sent = cli("submit", str(study), **env)
    assert sent.returncode == 0, sent.stderr
    name = sent.stdout.strip()
    talk = connect(None)
    twice = cli("submit", str(study), **env)
    assert (twice.returncode, twice.stdout.strip()) == (0, name), twice.stderr
    assert "runs already" in twice.stderr
    other = cli("submit", str(study), "--set", "seed=1", **env)
    assert other.returncode == 2
    assert "another study" in other.stderr
    until(lambda: "Running entrypoint" in talk.log(name), "the driver")
    stopped = cli("stop", name, **env)
    assert stopped.returncode == 0, stopped.stderr
    assert find_job(talk, name).exit == 130, talk.log(name)

    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(1):
            seen.update(processes())

    threading.Thread(target=look, daemon=True).start()
    again = cli("submit", str(study), "--follow", "--no-check", timeout=SECONDS, **env)
    ended.set()
    assert again.returncode == 0, again.stdout + again.stderr
    assert any("clifflab run study.yaml" in line for line in seen)
    assert any(line.startswith("ray::") for line in seen)
    assert again.stdout.splitlines()[0] == f"{name}-2"
    assert "done report" in again.stdout
    jobs = json.loads(cli("ls", "--json", **env).stdout)
    assert [(job["id"], job["exit"]) for job in jobs if job["base"] == name] == [(name, 130), (f"{name}-2", 0)]

    result = tmp_path / "runs" / "small"
    monkeypatch.chdir(study.parent)
    plain = run(parse(data), tmp_path / "plain", runtime="inline").root
    assert_same_tables(tables_of(plain, "planted"), tables_of(result, "planted"), 1e-5)

    places = [*cluster.folder.rglob("*"), *result.rglob("*")]
    texts = {str(place): place.read_bytes() for place in places if place.is_file() and not place.is_symlink()}
    assert any(place.endswith("own.jsonl") for place in texts), "the package was looked at"
    texts["processes"] = "\n".join(seen).encode()
    texts["jobs"] = json.dumps(talk._wire.ask("GET", "/api/jobs/")[1]).encode()
    for secret in (*PLANTED.values(), cluster.token):
        found = [place for place, text in texts.items() if secret.encode() in text]
        assert not found


@pytest.mark.slow
def test_a_stopped_job_continues_with_other_workers(
    cluster: Running, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clifflab.runtime.submit.client import connect, find_job

    env = {**cluster.env, "HOME": str(tmp_path)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    data = {**small_study(truncation={"traces": 0}), "name": "resumed"}
    data["traces"] = {**data["traces"], "batch_size": 8}
    study = tmp_path / "s.yaml"
    study.write_text(yaml.safe_dump(data))
    sent = cli("submit", str(study), "--set", "runtime.workers=1", "--no-check", **env)
    assert sent.returncode == 0, sent.stderr
    name, talk, root = sent.stdout.strip(), connect(None), tmp_path / "runs" / "resumed"

    def units() -> list[str]:
        told = root / "events.jsonl"
        found = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        done = [event for event in found if event["event"] == "unit" and not event.get("error")]
        return [f"{event.get('step')} {event.get('unit')}" for event in done]

    until(lambda: len(units()) >= 2, f"two units: {talk.log(name)}")
    stopped = cli("stop", name, **env)
    assert stopped.returncode == 0, stopped.stderr
    assert str(root) in stopped.stdout
    assert find_job(talk, name).exit == 130
    again = cli("submit", str(study), "--set", "runtime.workers=3", "--follow", "--no-check", timeout=SECONDS, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.splitlines()[0] == f"{name}-2"
    assert len(units()) == len(set(units())), "no unit was done twice"
    plain = run(parse(data), tmp_path / "plain", runtime="inline").root
    assert_same_tables(tables_of(plain, "planted"), tables_of(root, "planted"), 1e-5)
