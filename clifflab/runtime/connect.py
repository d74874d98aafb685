"""Finding a running Ray and asking, within seconds, whether this process can join it.

Ray itself tries for twenty seconds and more before it says that a token is wrong or that nobody answers, and then says
it in a stack. What it will need is asked here first: one gRPC call for the versions, one for the nodes.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clifflab.errors import ClusterError

_SECONDS = 2.0  # of each question; at most two of them can go unanswered
_START = "start one with: RAY_AUTH_MODE=token ray start --head"
_TOKEN_PLACES = "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"  # noqa: S105
OPEN_TO_ALL = (
    "the Ray at {address} asks for no token: everyone who reaches it can run code there; "
    "start it with RAY_AUTH_MODE=token"
)


@dataclass(frozen=True)
class Joinable:
    """A running Ray that this process can join.

    Attributes:
        address: ``host:port`` of its head.
        asks_token: Whether it asks for a token; this process has the right one.
    """

    address: str
    asks_token: bool


def find(address: str) -> Joinable:
    """The running Ray at an address, after everything was checked that would make joining it fail.

    Args:
        address: ``host:port``, or ``auto`` for ``RAY_ADDRESS``, else the Ray that was started on this machine.

    Raises:
        ClusterError: Nothing listens there, it is no Ray, it asks for a token that is missing or wrong, it is of
            another version, or it has no node on this machine.
    """
    _check_form("address", address)
    if address == "auto":
        address = _running()
    _listens(address)
    return _asked(address)


def token() -> str | None:
    """The token that Ray would send, from the places where it looks.

    Raises:
        ClusterError: ``RAY_AUTH_TOKEN_PATH`` names a file that holds none, or it is nothing that could be sent.
    """
    found = _found_token()
    if found is not None and not (found.isascii() and found.isprintable() and " " not in found):
        problem = "holds white space or characters that no token has"
        raise ClusterError("token", "(not shown)", problem, f"put the cluster's own in {_TOKEN_PLACES}")
    return found


def _found_token() -> str | None:
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        if found := _text(Path(named)):
            return found
        raise ClusterError("RAY_AUTH_TOKEN_PATH", named, "no such file, or it is empty", "name the token's file")
    return _text(Path.home() / ".ray" / "auth_token")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _check_form(field: str, address: str) -> None:
    if address == "auto":
        return
    remedy = "give host:port of the head (port 6379 as Ray starts it), or auto"
    if address.startswith("ray://"):
        raise ClusterError(field, address, "a Ray Client's address cannot carry a run", remedy)
    if address.startswith(("http://", "https://")):
        problem = "is a dashboard's address, which takes jobs (clifflab submit)"
        raise ClusterError(field, address, problem, remedy)
    try:
        split = urlsplit(f"//{address}")
        whole = bool(split.hostname and split.port and not split.path and not split.username)
    except ValueError:
        whole = False
    if not whole:
        raise ClusterError(field, address, "is not host:port", remedy)


def _running() -> str:
    """Address of the Ray that runs on this machine; inside a job, of the job's own."""
    if (named := os.environ.get("RAY_ADDRESS")) and named != "auto":
        _check_form("RAY_ADDRESS", named)
        return named
    from ray._private import services
    from ray._private.utils import read_ray_address

    recorded = read_ray_address()
    if recorded and _open(recorded) is None:
        return recorded
    services.find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]
    places: frozenset[str] = services.find_gcs_addresses()  # type: ignore[no-untyped-call]
    running = sorted(place for place in places if _open(place) is None)
    if not running:
        raise ClusterError("address", "auto", "no Ray runs on this machine", f"{_START}; or leave --address out")
    if len(running) > 1:
        problem = f"{len(running)} Rays run on this machine ({', '.join(running)})"
        raise ClusterError("address", "auto", problem, "give the address of one")
    return running[0]


def _open(address: str) -> OSError | None:
    split = urlsplit(f"//{address}")
    try:
        socket.create_connection((split.hostname or "", split.port or 0), timeout=_SECONDS).close()
    except OSError as error:
        return error
    return None


def _listens(address: str) -> None:
    error = _open(address)
    if error is None:
        return
    remedy = f"check host and port (the head's, 6379 as Ray starts it), or {_START}"
    if isinstance(error, socket.gaierror):
        raise ClusterError("address", address, "no machine of that name is known", remedy)
    what = "nothing listens there" if isinstance(error, ConnectionRefusedError) else f"cannot be reached ({error})"
    raise ClusterError("address", address, what, remedy)


def _asked(address: str) -> Joinable:
    import grpc

    with _channel(address) as channel:
        asks, sent = False, token()
        try:
            metadata = _metadata(channel, None)
        except grpc.RpcError as error:
            asks = error.code() == grpc.StatusCode.UNAUTHENTICATED
            if not asks:
                raise _no_ray(address, error) from None
            if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
                remedy = "unset RAY_AUTH_MODE"
                raise ClusterError("address", address, "asks for a token, and RAY_AUTH_MODE=disabled", remedy) from None
        if sent is None and (asks or os.environ.get("RAY_AUTH_MODE", "").lower() == "token"):
            who = "asks for a token" if asks else "RAY_AUTH_MODE=token is set here"
            raise ClusterError("address", address, f"{who}, and none was found", f"put it in {_TOKEN_PLACES}")
        try:
            if asks:
                metadata = _metadata(channel, sent)
            _same_versions(address, metadata)
            nodes = _nodes(channel, sent if asks else None)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                remedy = f"put the cluster's own in {_TOKEN_PLACES}"
                raise ClusterError("address", address, "the token is wrong", remedy) from None
            raise _no_ray(address, error) from None
    _has_a_node_here(address, nodes)
    return Joinable(address, asks)


def _channel(address: str) -> Any:
    import grpc
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        from ray._common.tls_utils import load_certs_from_env

        chain, key, roots = load_certs_from_env()  # type: ignore[no-untyped-call]
        trust = grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=chain)
        return grpc.secure_channel(address, trust, options=GLOBAL_GRPC_OPTIONS)
    return grpc.insecure_channel(address, options=GLOBAL_GRPC_OPTIONS)


def _sent(secret: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),) if secret else ()


def _metadata(channel: Any, secret: str | None) -> dict[str, Any]:
    """What the cluster says of itself: ``ray_version`` and ``python_version``; empty where it says nothing."""
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER

    messages, services = _generated("gcs_service_pb2"), _generated("gcs_service_pb2_grpc")
    request = messages.InternalKVGetRequest(key=CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER)
    ask = services.InternalKVGcsServiceStub(channel).InternalKVGet
    reply = ask(request, timeout=_SECONDS, metadata=_sent(secret))
    found = json.loads(reply.value) if reply.value else {}
    return found if isinstance(found, dict) else {}


def _nodes(channel: Any, secret: str | None) -> set[str]:
    """Ids (hex) of the nodes that are alive."""
    ask = _generated("gcs_service_pb2_grpc").NodeInfoGcsServiceStub(channel).GetAllNodeInfo
    request = _generated("gcs_service_pb2").GetAllNodeInfoRequest()
    reply = ask(request, timeout=_SECONDS, metadata=_sent(secret))
    alive = _generated("gcs_pb2").GcsNodeInfo.ALIVE
    return {node.node_id.hex() for node in reply.node_info_list if node.state == alive}


def _generated(name: str) -> Any:
    """A module that protobuf made, which has no types."""
    return importlib.import_module(f"ray.core.generated.{name}")


def _same_versions(address: str, metadata: dict[str, Any]) -> None:
    """Ray joins only its own version under the same Python; its own switch decides how alike the latter must be."""
    import platform

    import ray

    level = os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch")
    own = {"ray": ray.__version__, "python": platform.python_version()}
    for name, mine in own.items():
        there = metadata.get(f"{name}_version", mine)
        places = 2 if name == "python" and level == "minor" else None
        if there.split(".")[:places] != mine.split(".")[:places]:
            what = name.capitalize()
            problem = f"runs {what} {there}, and this is {what} {mine}"
            raise ClusterError("address", address, problem, "use the same environment in both places")


def _has_a_node_here(address: str, nodes: set[str]) -> None:
    """A driver works through a node on its own machine; without one Ray waits for it for a minute."""
    from ray._private.services import find_node_ids

    here: set[str] = set(find_node_ids())  # type: ignore[no-untyped-call]
    if not nodes & here:
        problem = f"none of its {len(nodes)} nodes is this machine, and a run is driven from one of them"
        raise ClusterError("address", address, problem, "run there, or send it with clifflab submit")


def _no_ray(address: str, error: Any) -> ClusterError:
    problem = f"what listens there does not answer as a Ray head ({error.code().name.lower()})"
    return ClusterError("address", address, problem, "check the port: 6379 as Ray starts it")
