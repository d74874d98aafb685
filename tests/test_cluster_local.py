"""The script that starts a cluster on this machine: what it refuses, and that it ends nothing that is not its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "cluster" / "local"
Local = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def local(tmp_path: Path) -> Local:
    def call(*args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "CLIFFLAB_CLUSTER": str(tmp_path / "state")}
        return subprocess.run([sys.executable, SCRIPT, *args], env=env, capture_output=True, text=True, timeout=60)

    return call


def test_nothing_runs(local: Local, tmp_path: Path) -> None:
    assert local("stop").stderr == "nothing runs\n"
    asked = local("env")
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "no cluster runs" in asked.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        begun = local("start", "--port", str(port))
    assert begun.returncode == 1
    assert begun.stderr.strip() == (
        f"cluster/local: port {port} is taken: give another --port, or stop what listens there"
    )
    assert local("start", "--nodes", "0").returncode == 1
    for port in (0, 99999):
        assert local("start", "--port", str(port)).stderr == f"cluster/local: port {port}: give one from 1 to 65535\n"
    assert not (tmp_path / "state" / "token").exists()


def test_a_number_that_another_process_has_now(local: Local, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    ours = subprocess.Popen(["sleep", "60"], start_new_session=True)
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(ours.pid)], capture_output=True, text=True)
        nodes = [
            {"pid": ours.pid, "began": asked.stdout.strip()},
            {"pid": other.pid, "began": "Thu Jan  1 00:00:00 1970"},
        ]
        about = {"port": 8265, "folder": str(tmp_path / "not-ray"), "nodes": nodes}
        (tmp_path / "not-ray").mkdir()
        (tmp_path / "state" / "cluster.json").write_text(json.dumps(about))
        assert "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265" in local("env").stdout
        assert "runs already" in local("start").stderr
        assert local("stop").stderr == "1 node stopped\n"
        assert ours.wait(10) == -15
        assert other.poll() is None
        assert (tmp_path / "not-ray").exists(), "only folders of its own are removed"
    finally:
        for process in (ours, other):
            process.kill()
            process.wait(10)
