"""The command line in processes of their own that need not import torch anew: importing takes most of a short command.

A server imports what other people wrote, nothing of clifflab, and forks. Each child then is what ``python -m clifflab``
would be: its own pid, folder, environment, output, signals, exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READ_AT_IMPORT = ("HF_HOME", "HF_HUB_", "OMP_", "PYTHON", "TRANSFORMERS_")  # a forked process would learn them too late
HEAVY = (
    "torch",
    "scipy.stats",
    "sklearn.linear_model",
    "pyarrow.parquet",
    "rich.progress",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "matplotlib.figure",
)


class Command:
    """A running ``clifflab ARGS``, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, server: Server, pid: int, args: Sequence[str], files: list[Path]) -> None:
        self.pid, self.args, self.files = pid, list(args), files
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or ``None`` while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; the text of its output and of its errors."""
        self.wait(timeout)
        out, err = (file.read_text() for file in self.files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """The client's end of the server, which ends with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._outputs = tempfile.TemporaryDirectory()
        self._count = 0

    def start(self, args: Sequence[str], folder: Path, env: Mapping[str, str]) -> Command:
        """Begin ``clifflab ARGS`` in a folder."""
        self._count += 1
        files = [Path(self._outputs.name) / f"{self._count}.{name}" for name in ("out", "err")]
        pid = self.ask({"args": list(args), "folder": str(folder), "env": dict(env), "files": list(map(str, files))})
        return Command(self, pid, args, files)

    def ask(self, request: dict[str, Any]) -> Any:
        if self._process is None:
            command = [sys.executable, "-m", "tests.forkserver"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
            )
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)
        self._outputs.cleanup()


def _serve() -> dict[str, Any] | None:
    """Answer requests until there are none; in a forked child, its request."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "poll" not in request:
            pid = os.fork()
            if pid == 0:
                return request
            print(pid, flush=True)
            continue
        if request["poll"] not in codes:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(codes.get(request["poll"])), flush=True)
    return None


def _become(request: dict[str, Any]) -> int:
    """Run the command line as the main module of this process; its exit code."""
    with open(os.devnull) as empty:
        os.dup2(empty.fileno(), 0)
    for number, path in enumerate(request["files"], start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["clifflab", *request["args"]]
    sys.path[0] = request["folder"]
    try:
        runpy.run_module("clifflab", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted test run closes its server by itself
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    if (own := _serve()) is not None:
        code = _become(own)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the imported modules down would take longer than all the rest
