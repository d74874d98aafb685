"""Ray's job client with limits: every request ends, and goes to the address that was given with what that asks for.

Ray's own adds the token wherever the environment has one, follows redirections, takes passwords from ``.netrc``, and
waits for a silent connection for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import requests
from ray.job_submission import JobSubmissionClient

from clifflab.errors import ClusterError, shorten
from clifflab.runtime.submit.address import Head, is_loopback

_SECONDS = (4.0, 60.0)  # to connect, to answer
_OPEN_SECONDS = 15.0  # to open the connection of a log
_SILENCE = 30.0  # seconds after which the job's state is asked for anew: a network may lose a connection silently
_LOGGERS = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
# What Ray takes an address from, whatever it is given; and by what it adds a token of its own.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Wire(JobSubmissionClient):
    """Ray's client for one dashboard.

    Args:
        head: The dashboard, which was reached before.
    """

    def __init__(self, head: Head) -> None:
        for name in _LOGGERS:  # they tell of each upload
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
        self.head = head
        self._session = requests.Session()
        self._session.trust_env = False  # a password in .netrc would take the token's place
        if not is_loopback(head.address):
            self._session.proxies.update(requests.utils.get_environ_proxies(head.address))
        asked = {"Authorization": f"Bearer {head.token}"} if head.token else {}
        with _without(*_OVERRIDES):
            # Given some header of that name, Ray looks for no token.
            super().__init__(head.address, headers={"Authorization": "none"})
        self._headers = asked

    def _check_connection_and_version(self, *_given: Any, **_more: Any) -> None:
        """Was asked when the dashboard was reached."""

    def _do_request(
        self, method: str, endpoint: str, *, data: bytes | None = None, json_data: Any = None, **more: Any
    ) -> requests.Response:
        """One request; follows no redirection.

        Raises:
            ClusterError: The dashboard does not answer, sends elsewhere, or refuses the token.
        """
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        given = {"timeout": _SECONDS, "headers": self._headers, "verify": verify, "allow_redirects": False, **more}
        try:
            reply = self._session.request(method, self.head.address + endpoint, data=data, json=json_data, **given)
        except requests.exceptions.RequestException as error:
            raise self._fault(f"does not answer ({type(error).__name__})", "is the cluster up?") from None
        if reply.status_code in (401, 403):
            raise self._fault("the token is no longer accepted", "was the cluster started anew?")
        if 300 <= reply.status_code < 400:
            raise self._fault(f"sends elsewhere (HTTP {reply.status_code})", "give the dashboard's own address")
        return reply

    def ask(self, method: str, endpoint: str, data: object = None) -> tuple[int, Any]:
        """Status and JSON of a request; the text where it is no JSON."""
        reply = self._do_request(method, endpoint, json_data=data)
        try:
            return reply.status_code, reply.json()
        except (ValueError, RecursionError):
            return reply.status_code, reply.text

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """What a job prints, from its beginning, as it comes; ends with the job, or when nothing came for a while.

        Raises:
            aiohttp.ClientError, OSError: The connection breaks.
        """
        watch = aiohttp.TraceConfig()
        watch.on_request_redirect.append(_refuse)
        async with aiohttp.ClientSession(headers=self._headers, trace_configs=[watch]) as session:
            opening = session.ws_connect(f"{self.head.address}{job_path(submission_id)}/logs/tail")
            socket = await asyncio.wait_for(opening, _OPEN_SECONDS)
            while True:
                try:
                    message = await socket.receive(timeout=_SILENCE)
                except TimeoutError:
                    return
                if message.type == aiohttp.WSMsgType.TEXT:
                    yield message.data
                elif message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED):
                    if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                        raise aiohttp.ClientConnectionError("the connection broke")
                    return
                elif message.type == aiohttp.WSMsgType.ERROR:
                    raise aiohttp.ClientConnectionError(str(socket.exception()))

    def failed(self, what: str, error: object) -> ClusterError:
        """A refusal of the job server as one line."""
        text = error if isinstance(error, str) else json.dumps(error) if isinstance(error, dict | list) else str(error)
        lines = [line for line in text.splitlines() if line.strip()]
        return self._fault(f"{what} ({shorten(lines[-1] if lines else text)})", "look at the dashboard's logs")

    def _fault(self, problem: str, remedy: str) -> ClusterError:
        return ClusterError("--address", self.head.address, problem, remedy)


def job_path(submission_id: str) -> str:
    """Where the job server answers for a job."""
    return f"/api/jobs/{quote(submission_id, safe='')}"


async def _refuse(*_given: Any) -> None:
    raise aiohttp.ClientConnectionError("the dashboard sends elsewhere")


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
