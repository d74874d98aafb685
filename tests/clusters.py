"""A Ray cluster of several nodes on this machine, as ``ray start`` makes it: with a token, and simulated GPUs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_QUICK = {  # a lost node is noticed in seconds
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
_STORE = str(100 << 20)


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        address: ``host:port`` of the head.
        env: What a process that joins it has in its environment.
        folder: Ray's temporary folder.
    """

    address: str
    env: dict[str, str]
    folder: Path
    _nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, cpus: int, gpus: int, *more: str) -> int:
        """Start a node; the first is the head. Returns its number."""
        ray = str(Path(sys.executable).parent / "ray")
        role = [f"--address={self.address}"]
        if not self._nodes:
            port = self.address.partition(":")[2]
            role = ["--head", f"--port={port}", f"--temp-dir={self.folder}", "--node-ip-address=127.0.0.1"]
            role += [] if "--include-dashboard=true" in more else ["--include-dashboard=false"]
        command = [ray, "start", *role, *more, "--block", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        command += [f"--object-store-memory={_STORE}", "--disable-usage-stats"]
        with (self.folder.parent / f"{self.folder.name}-{len(self._nodes)}.log").open("wb") as log:
            env = {**os.environ, **self.env, **_QUICK}
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        self._nodes.append(process)
        self._wait(log.name)
        return len(self._nodes) - 1

    def _wait(self, log: str) -> None:
        deadline = time.monotonic() + 60
        while b"Ray runtime started" not in Path(log).read_bytes():
            assert self._nodes[-1].poll() is None, Path(log).read_text()
            assert time.monotonic() < deadline, Path(log).read_text()
            time.sleep(0.1)

    def kill(self, number: int) -> None:
        """End a node at once, with all its workers."""
        process = self._nodes[number]
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for one in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()

    def close(self) -> None:
        """End all nodes, the head last."""
        for number in reversed(range(len(self._nodes))):
            self.kill(number)
        shutil.rmtree(self.folder, ignore_errors=True)
        for log in self.folder.parent.glob(f"{self.folder.name}-*.log"):
            log.unlink()


@contextmanager
def cluster(nodes: Sequence[tuple[int, int]]) -> Iterator[Cluster]:
    """A cluster of nodes with so many cores and simulated GPUs each."""
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: sockets lie in it
    token = folder.parent / f"{folder.name}-token.log"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    found = Cluster(f"127.0.0.1:{port}", env, folder)
    try:
        for cpus, gpus in nodes:
            found.start(cpus, gpus)
        yield found
    finally:
        found.close()
