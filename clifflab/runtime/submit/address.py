"""The dashboard that takes jobs: its address, its token, and whether it is there, within seconds.

Ray's own client has no time limit, and an address in the environment overrides the one that it is given. So the first
question is asked here, before Ray is imported.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from clifflab.errors import ClusterError, holds_credentials, shorten, without_credentials
from clifflab.runtime.connect import token

DEFAULT = "http://127.0.0.1:8265"
SECONDS = 3.5  # for all questions together
_TOKEN_REMEDY = "name the cluster's token file: export RAY_AUTH_TOKEN_PATH=FILE"  # noqa: S105
_PORT = "give the dashboard's address, http://HOST:8265"


@dataclass(frozen=True)
class Head:
    """A dashboard that answers, and lets this user in.

    Attributes:
        address: ``http://host:port``.
        ray: Version of Ray that runs there.
        token: What it asks for; None where it lets everyone in.
    """

    address: str
    ray: str
    token: str | None = field(default=None, repr=False)


def reach(given: str | None) -> Head:
    """The dashboard at an address, asked for its version.

    Args:
        given: ``http://host:port``; by default ``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS`` if it is such an address,
            or else port 8265 of this machine.

    Raises:
        ClusterError: Nothing answers there, it is no Ray, it asks for a token that is missing or wrong, or it is
            another version than the one here. Said within 4 seconds.
    """
    where, address = find_address(given)
    wanted = os.environ.get("RAY_AUTH_MODE", "token").lower() in ("token", "")
    secret, until = token() if wanted else None, time.monotonic() + SECONDS
    status, body = _answer(where, address, None, until)
    if status in (401, 403) and not wanted:
        mode = os.environ["RAY_AUTH_MODE"]
        raise ClusterError(where, address, f"asks for a token, and RAY_AUTH_MODE={mode}", "unset RAY_AUTH_MODE")
    if status in (401, 403) and secret is None:
        raise ClusterError(where, address, "asks for a token, and none was found", _TOKEN_REMEDY)
    if status in (401, 403):
        status, body = _answer(where, address, secret, until)
    else:
        secret = None  # it is shown only to those who ask
    if status in (401, 403):
        raise ClusterError(where, address, "the token is wrong", _TOKEN_REMEDY)
    version = _version(body) if status == 200 else None
    if version is None:
        raise ClusterError(where, address, f"what answers there is no Ray dashboard (HTTP {status})", _PORT)
    own = metadata.version("ray")
    if version.split(".")[:2] != own.split(".")[:2]:
        problem = f"runs Ray {version}, and this is Ray {own}"
        raise ClusterError(where, address, problem, "use the same environment in both places")
    return Head(address, version, secret)


def find_address(given: str | None) -> tuple[str, str]:
    """Who named the dashboard, and its address.

    Raises:
        ClusterError: It is not the address of a dashboard, or holds a password.
    """
    where, address = "--address", given
    if address is None:
        named = [(name, os.environ.get(name, "")) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
        usable = [(name, value) for name, value in named if value.startswith(("http://", "https://"))]
        where, address = usable[0] if usable else ("--address", DEFAULT)
    if address in ("auto", "local", "") or address.startswith("ray://"):
        raise ClusterError(where, address, "takes no jobs", _PORT)
    if "://" not in address:
        address = f"http://{address}"
    if holds_credentials(address):
        raise ClusterError(where, without_credentials(address), "holds a password", f"leave it out; {_TOKEN_REMEDY}")
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ClusterError(where, address, "is no http:// address", _PORT)
    return where, address.split("?")[0].split("#")[0].rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether an address stays on this machine, so that no proxy can be meant."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would carry the token to another host."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        """Nowhere."""


def _answer(where: str, address: str, secret: str | None, until: float) -> tuple[int, bytes]:
    """Status and body of ``/api/version``; in a thread, since the look-up of a name knows no time limit."""
    found: list[tuple[int, bytes] | BaseException] = []
    thread = threading.Thread(target=lambda: found.append(_ask(address, secret)), daemon=True)
    thread.start()
    thread.join(max(0.1, until - time.monotonic()))
    if not found:
        raise ClusterError(where, address, f"does not answer within {SECONDS:g} s", "check the address and the network")
    if isinstance(found[0], BaseException):
        raise ClusterError(where, address, _reason(found[0]), "check the address: is the cluster up?") from None
    return found[0]


def _ask(address: str, secret: str | None) -> tuple[int, bytes] | BaseException:
    handlers: list[urllib.request.BaseHandler] = [_Stay()]
    if is_loopback(address):
        handlers.append(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=headers)  # noqa: S310
        with urllib.request.build_opener(*handlers).open(request, timeout=SECONDS) as reply:
            return int(reply.status), reply.read(1 << 16)
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, http.client.HTTPException, ValueError) as error:
        return error


def _reason(error: BaseException) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        return "no machine of that name is known"
    if isinstance(cause, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(cause, TimeoutError):
        return f"does not answer within {SECONDS:g} s"
    if isinstance(cause, http.client.HTTPException):
        return "what listens there speaks no HTTP"
    return f"cannot be reached ({shorten(cause, 80)})"


def _version(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    version = found.get("ray_version") if isinstance(found, dict) else None
    return version if isinstance(version, str) else None
