"""Ray's job client with limits: every request ends, and the address is the one that was given."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from clifflab.errors import ClusterError, shorten
from clifflab.runtime.submit.address import Head, is_loopback

_SECONDS = (4.0, 60.0)  # to connect, to answer
_LOGGERS = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
# What Ray takes an address from, whatever it is given.
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
        if is_loopback(head.address):
            os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
        headers = {"Authorization": f"Bearer {head.token}"} if head.token else {}
        with _without(*_OVERRIDES):
            super().__init__(head.address, headers=headers)

    def _do_request(self, method: str, endpoint: str, **more: Any) -> requests.Response:
        """One request.

        Raises:
            ClusterError: The dashboard does not answer, or refuses the token.
        """
        more.setdefault("timeout", _SECONDS)
        try:
            reply: requests.Response = super()._do_request(method, endpoint, **more)
        except AuthenticationError:
            raise ClusterError(
                "--address", self.head.address, "the token is no longer accepted", "was the cluster started anew?"
            ) from None
        except requests.exceptions.RequestException as error:
            problem = f"does not answer ({type(error).__name__})"
            raise ClusterError("--address", self.head.address, problem, "is the cluster up?") from None
        return reply

    def ask(self, method: str, endpoint: str, data: object = None) -> tuple[int, Any]:
        """Status and JSON of a request; the text where it is no JSON."""
        reply = self._do_request(method, endpoint, json_data=data)
        try:
            return reply.status_code, reply.json()
        except (ValueError, json.JSONDecodeError):
            return reply.status_code, reply.text

    def failed(self, what: str, error: RuntimeError) -> ClusterError:
        """A refusal of the job server as one line."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        problem = f"{what} ({shorten(lines[-1] if lines else error)})"
        return ClusterError("--address", self.head.address, problem, "look at the dashboard's logs")


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
