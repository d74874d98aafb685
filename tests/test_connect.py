"""Joining a Ray that runs already: what keeps a process out is said in one line, within seconds."""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clifflab.config import RuntimeConfig
from clifflab.errors import ClusterError
from clifflab.runtime import connect
from clifflab.runtime.local import start_ray
from tests.conftest import Cli
from tests.test_bad_input import one_line

LIMIT = 5.0
_JOIN = """
import os, sys
from clifflab.config import RuntimeConfig
from clifflab.runtime.local import start_ray
notes = []
assert start_ray(RuntimeConfig(address=sys.argv[1]), notes.append)
assert not start_ray(RuntimeConfig(address=sys.argv[1]), notes.append), "it is joined already"
import ray
there = ray.get(ray.remote(num_cpus=1)(lambda: os.getpid()).remote(), timeout=30)
print(there != os.getpid(), int(ray.cluster_resources()["CPU"]))
print(ray.get_runtime_context().gcs_address, len(ray.nodes()), os.environ.get("RAY_AUTH_MODE"), *notes)
ray.shutdown()
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, no address and no recorded cluster of whoever runs the tests."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def refusal(address: str) -> ClusterError:
    began = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        connect.find(address)
    assert time.monotonic() - began < LIMIT
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("ray://head:10001", "Ray Client"),
        ("http://head:8265", "dashboard"),
        ("head", "is not host:port"),
        ("head:port", "is not host:port"),
        ("head:6379/x", "is not host:port"),
        ("127.0.0.1:9", "nothing listens there"),
        ("no-such-host.invalid:6379", "no machine of that name"),
    ],
)
def test_addresses_that_cannot_be(address: str, problem: str) -> None:
    error = refusal(address)
    assert problem in str(error)
    assert error.value == address


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
def test_something_else_listens(answer: bytes) -> None:
    """A server that says nothing, and one that speaks another protocol."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if answer:
            code = "import socket,sys; s=socket.socket(fileno=int(sys.argv[1]))\n"
            code += f"while True: c=s.accept()[0]; c.sendall({answer!r}); c.close()"
            other = subprocess.Popen([sys.executable, "-c", code, str(server.fileno())], pass_fds=[server.fileno()])
        try:
            assert "does not answer as a Ray head" in str(refusal(address))
        finally:
            if answer:
                other.kill()
                other.wait()


def test_auto_without_a_ray_starts_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", _Places(set()))
    assert "no Ray runs on this machine; start one with" in str(refusal("auto"))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")  # of a head that is gone
    assert "no Ray runs on this machine" in str(refusal("auto"))
    monkeypatch.setenv("RAY_ADDRESS", "local")  # would start one
    assert "RAY_ADDRESS: local: is not host:port" in str(refusal("auto"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "127.0.0.1:9: nothing listens" in str(refusal("auto"))
    one_line(cli("run", "quickstart", "--address", "127.0.0.1:9"), "address: 127.0.0.1:9", "nothing listens there")
    one_line(cli("run", "quickstart", "--address", "auto", "--runtime", "inline"), "--address", "inline")


class _Places:
    """Stands for the list of the Rays that run here."""

    def __init__(self, found: set[str]) -> None:
        self._found = found

    def __call__(self) -> set[str]:
        return self._found

    def cache_clear(self) -> None:
        pass


@contextmanager
def open_head() -> Iterator[str]:
    """What answers as a head that asks for no token: two calls of its service, without the seconds that Ray takes."""
    from concurrent.futures import ThreadPoolExecutor
    from importlib import import_module

    import grpc
    import ray

    messages, services = (import_module(f"ray.core.generated.gcs_service_{kind}") for kind in ("pb2", "pb2_grpc"))

    class Values(services.InternalKVGcsServiceServicer):  # type: ignore[misc]
        def InternalKVGet(self, request: Any, context: Any) -> Any:  # noqa: N802
            about = {"ray_version": ray.__version__, "python_version": platform.python_version()}
            return messages.InternalKVGetReply(value=json.dumps(about).encode())

    class Nodes(services.NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def GetAllNodeInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
            reply = messages.GetAllNodeInfoReply()
            reply.node_info_list.add(node_id=b"\xab" * 28)
            return reply

    server = grpc.server(ThreadPoolExecutor(2))
    services.add_InternalKVGcsServiceServicer_to_server(Values(), server)
    services.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_a_head_that_is_open_to_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"ab" * 28})
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with open_head() as address:
        with socket.create_server(("127.0.0.1", 0)) as other:
            both = {address, f"127.0.0.1:{other.getsockname()[1]}"}
            monkeypatch.setattr("ray._private.services.find_gcs_addresses", _Places(both))
            assert "2 Rays run on this machine" in str(refusal("auto"))
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", _Places({address}))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # whoever insists on a token wants one to be sent
        assert "RAY_AUTH_MODE=token is set here, and none was found" in str(refusal("auto"))
        monkeypatch.delenv("RAY_AUTH_MODE")
        joined: list[dict[str, Any]] = []
        notes: list[str] = []
        monkeypatch.setattr("ray.init", lambda **how: joined.append(how))
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        assert start_ray(RuntimeConfig(address="auto"), notes.append)
    assert [how["address"] for how in joined] == [address]
    assert notes == [connect.OPEN_TO_ALL.format(address=address)]
    assert "RAY_AUTH_MODE" not in os.environ
    assert "RAY_AUTH_TOKEN" not in os.environ


@dataclass(frozen=True)
class Head:
    """A Ray that was started with ``ray start``."""

    address: str
    token: str
    temporary: str


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head that asks for a token, on the loopback address."""
    with _started(secrets.token_hex(16)) as found:
        yield found


@contextmanager
def _started(token: str) -> Iterator[Head]:
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="cl", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "token" if token else "disabled", "RAY_AUTH_TOKEN": token}
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=2"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        with open(Path(temporary) / "log", "w") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield _when_up(Head(f"127.0.0.1:{port}", token, temporary), process)
        finally:
            process.send_signal(signal.SIGTERM)  # it ends what it started
            process.wait(timeout=60)  # a node that was used is drained first, for half a minute at most


def _when_up(head: Head, process: subprocess.Popen[bytes]) -> Head:
    for _ in range(300):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HOME", head.temporary)
                patch.setenv("RAY_AUTH_TOKEN", head.token)
                connect.find(head.address)
        except ClusterError:
            assert process.poll() is None, (Path(head.temporary) / "log").read_text()
            time.sleep(0.1)
        else:
            return head
    raise AssertionError((Path(head.temporary) / "log").read_text())


def test_a_real_head_says_what_is_wrong(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = refusal(head.address)
    assert "asks for a token, and none was found; put it in RAY_AUTH_TOKEN" in str(found)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    assert "the token is wrong" in str(refusal(head.address))
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled" in str(refusal(head.address))
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert connect.find(head.address) == connect.Joinable(head.address, asks_token=True)
    monkeypatch.setattr("ray.__version__", "2.61.0")
    assert "and this is Ray 2.61.0; use the same environment" in str(refusal(head.address))
    monkeypatch.undo()
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setattr("platform.python_version", lambda: "3.10.1")
    assert "and this is Python 3.10.1" in str(refusal(head.address))
    monkeypatch.undo()
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    monkeypatch.setattr("ray._private.services.find_node_ids", set)  # as on a machine beside the cluster
    assert "none of its 1 nodes is this machine" in str(refusal(head.address))


def join(head: Head, address: str, **env: str) -> list[str]:
    """Lines of a process that joins, runs a task and leaves."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    base |= {"RAY_TMPDIR": head.temporary, **env}
    done = subprocess.run([sys.executable, "-c", _JOIN, address], env=base, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not head.token or head.token not in done.stdout
    return done.stdout.splitlines()


def test_a_real_head_is_joined(head: Head, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "token"
    secret.write_text(head.token + "\n")
    found = join(head, "auto", RAY_AUTH_TOKEN_PATH=str(secret))
    assert found == ["True 2", f"{head.address} 1 token"]
    wrong = cli("run", "quickstart", "--address", head.address, RAY_AUTH_TOKEN="00" * 16)
    one_line(wrong, "address", "the token is wrong")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "RAY_AUTH_TOKEN_PATH" in str(refusal(head.address))
