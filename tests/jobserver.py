"""A stand-in for Ray's job server on the loopback address: keeps what it is sent, and tells what a test has it tell."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from aiohttp import WSMsgType, web

from clifflab.runtime.submit.check import PREFIX


@dataclass
class Job:
    """One job, and how it goes on."""

    sent: dict[str, Any]
    status: str = "RUNNING"
    log: str = ""
    code: int | None = None
    message: str = "as the test said"
    started: int = field(default_factory=lambda: int(time.time() * 1000))

    def told(self) -> dict[str, Any]:
        return {
            "type": "SUBMISSION",
            "submission_id": self.sent["submission_id"],
            "status": self.status,
            "entrypoint": self.sent["entrypoint"],
            "message": self.message,
            "metadata": self.sent.get("metadata"),
            "runtime_env": self.sent.get("runtime_env"),
            "start_time": self.started,
            "driver_exit_code": self.code,
        }


def node(**changes: Any) -> dict[str, Any]:
    """A node that answers well."""
    from clifflab.artifacts import code_version

    answer = {"node": "aaaa1111", "address": "10.0.0.1", "gpus": 0.0, "gpu_memory_mb": None, "missing": []}
    well = {"clifflab": code_version(), "sees_output": True, "free_mb": 9000, "problem": ""}
    return {**answer, **well, **changes}


class JobServer:
    """Answers on a port of its own until it is closed."""

    def __init__(self, token: str | None = None) -> None:
        import clifflab
        from clifflab.artifacts import code_version

        self.token, self.version = token, metadata.version("ray")
        self.jobs: dict[str, Job] = {}
        self.packages: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.found: dict[str, Any] = {
            "version": clifflab.__version__, "code": code_version(), "token": True, "free": {"CPU": 4.0, "GPU": 0.0},
            "nodes": [node(), node(node="bbbb2222", address="10.0.0.2")],
        }  # fmt: skip
        self.check_log: str | None = None
        self.next = Job({})  # how jobs that are sent go on
        self.break_after: list[int] = []  # characters after which a followed log breaks off, one a connection
        self.late: str | None = None  # a job that somebody else sends just before
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(20)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def of(self, kind: str = "clifflab run") -> list[Job]:
        """Jobs whose command holds some words."""
        return [job for job in self.jobs.values() if kind in job.sent["entrypoint"]]

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 30)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/packages/gcs/{name}", self._has)
        app.router.add_put("/api/packages/gcs/{name}", self._put)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._info)
        app.router.add_delete("/api/jobs/{id}", self._delete)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/jobs/{id}/logs", self._logs)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port: int = runner.addresses[0][1]
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = b"" if request.path.endswith("/tail") else await request.read()
        self.asked.append((request.method, request.path, dict(request.headers), body))
        given = request.headers.get("Authorization")
        if self.token and not given:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token and given != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.version, "ray_commit": "", "session_name": ""})

    async def _has(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _put(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _list(self, request: web.Request) -> web.Response:
        plain = {"type": "DRIVER", "submission_id": None, "status": "RUNNING", "entrypoint": "x.py", "metadata": {}}
        return web.json_response([plain, *(job.told() for job in self.jobs.values())])

    async def _submit(self, request: web.Request) -> web.Response:
        sent = await request.json()
        name = sent["submission_id"]
        if self.late and "clifflab.runtime.submit.check" not in sent["entrypoint"]:
            self.jobs[name] = Job({**sent, "metadata": {**sent["metadata"], "digest": self.late or ""}})
            if self.late == "same":
                self.jobs[name].sent["metadata"]["digest"] = sent["metadata"]["digest"]
            self.late = None
        if name in self.jobs:
            return web.Response(
                status=500, text=f"ValueError: Job with submission_id {name} already exists. Please ..."
            )
        job = Job(sent, self.next.status, self.next.log, self.next.code)
        if "clifflab.runtime.submit.check" in sent["entrypoint"]:
            line = PREFIX + json.dumps(self.found)
            job = Job(sent, "SUCCEEDED", line if self.check_log is None else self.check_log, 0)
        self.jobs[name] = job
        return web.json_response({"job_id": name, "submission_id": name})

    def _job(self, request: web.Request) -> Job:
        if request.match_info["id"] not in self.jobs:
            raise web.HTTPNotFound
        return self.jobs[request.match_info["id"]]

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request).told())

    async def _delete(self, request: web.Request) -> web.Response:
        del self.jobs[request.match_info["id"]]
        return web.json_response({"deleted": True})

    async def _stop(self, request: web.Request) -> web.Response:
        self._job(request).status = "STOPPED"
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self._job(request).log})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        job, socket = self._job(request), web.WebSocketResponse()
        await socket.prepare(request)
        most = self.break_after.pop(0) if self.break_after else None
        await socket.send_str(job.log[:most])
        if most is not None:
            assert request.transport is not None
            request.transport.abort()  # as a network does: without a word
            return socket
        while job.status == "RUNNING":
            try:
                if (await socket.receive(timeout=0.05)).type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                    break
            except TimeoutError:
                continue
        await socket.close()
        return socket
