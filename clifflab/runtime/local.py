"""The Ray that a run uses: one of this process's own (bounded, on loopback, asking for a token), or a running one."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clifflab.config import RuntimeConfig
from clifflab.errors import ClusterError, shorten

_NAMES = ("clifflab-ray-", "r-")  # of the folder of an own Ray; the short one where its place is deep
# The path of a socket may have 107 bytes: place, "/", name, 8 of mkdtemp, "/r", "/session_" with 35 of date and
# process, "/sockets/plasma_store".
_LONGEST = 107 - (1 + 8 + 2 + 9 + 35 + 21)
_REMOVALS = 10
_folders: list[Path] = []  # of the Ray that this process started


def start_ray(settings: RuntimeConfig, note: Callable[[str], None] | None = None) -> bool:
    """Make Ray ready in this process: join the one at ``settings.address``, or start one; nothing if it is ready.

    A local cluster has a bounded object store, no dashboard, listens on the loopback address, asks for a token that
    lives in this process's environment alone, and keeps its logs and sockets in a folder that other users cannot enter.
    A running one is used as it is.

    Args:
        settings: Where Ray runs, or how it is started.
        note: Told, in one line, of a running Ray that asks nobody for a token.

    Returns:
        Whether this call made it ready, and :func:`stop_ray` is the caller's.

    Raises:
        ClusterError: The running Ray cannot be joined, said within seconds; or there is no room for the files of an
            own one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if settings.address is not None:
        return _join(settings.address, note)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        return False
    _read_environment()
    folder = _own_folder()
    with _native_messages_held():
        ray.init(
            address="local",
            _temp_dir=str(folder),
            # Ray's own count respects the limits of containers; more workers than cores are the user's choice.
            num_cpus=settings.workers if isinstance(settings.workers, int) else None,
            object_store_memory=settings.object_store_mb << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    return True


def stop_ray() -> None:
    """Leave Ray, or end the one that :func:`start_ray` started, and remove its files."""
    import ray

    ray.shutdown()
    while _folders:
        folder = _folders.pop()
        for _ in range(_REMOVALS):  # processes that end may still be writing their logs
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def _own_folder() -> Path:
    """A new folder for Ray's files, under one that only this user can enter: Ray opens its own to everybody.

    It lies where Ray would keep them (``RAY_TMPDIR``, ``TMPDIR``, /tmp), or in /tmp if the paths of sockets would
    become too long there. It goes with Ray, or when this process ends; a killed process leaves it.
    """
    parent = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute()  # noqa: S108
    names = [(place, name) for place in (parent, Path("/tmp")) for name in _NAMES]  # noqa: S108
    place, name = next(
        pair for pair in names if len(os.fsencode(pair[0])) + len(pair[1]) <= _LONGEST or pair == names[-1]
    )
    try:
        place.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=name, dir=place))
    except OSError as error:
        problem = f"cannot hold Ray's files ({error.strerror or error})"
        raise ClusterError("RAY_TMPDIR", place, problem, "name a writable folder there, with a short path") from None
    if not _folders:
        atexit.register(_at_exit, os.getpid())  # before Ray's own, which was registered when it was imported
    _folders.append(private)
    return private / "r"


def _at_exit(owner: int) -> None:
    if _folders and os.getpid() == owner:  # forked processes leave it alone
        stop_ray()


def _join(address: str, note: Callable[[str], None] | None) -> bool:
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            return False
    from clifflab.runtime import connect

    found = connect.find(address)
    import ray

    if found.asks_token:
        os.environ["RAY_AUTH_MODE"] = "token"
    _read_environment()
    try:
        with _native_messages_held():
            ray.init(address=found.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        problem = f"cannot be joined ({shorten(error)})"
        raise ClusterError("address", found.address, problem, "see whether it is well: ray status") from error
    if note and not found.asks_token:
        note(connect.OPEN_TO_ALL.format(address=found.address))
    return True


def _read_environment() -> None:
    """Let Ray's native code read mode and token again: it kept what it found when Ray was imported, or joined."""
    import ray._raylet

    native: Any = ray._raylet
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _native_messages_held() -> Iterator[None]:
    """Hold back what Ray's native code prints while it starts; show it only if starting fails.

    On a machine without a network it warns that it found no outer address, which is how a study is meant to run.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def native_messages_in(path: Path) -> Iterator[None]:
    """Let what Ray's native code prints go to a file; what Python prints to standard error still goes there.

    It prints warnings that are no business of a user's, such as one for every pool of actors.
    """
    sys.stderr.flush()
    kept, before = os.dup(2), sys.stderr
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log, os.fdopen(kept, "w", buffering=1, closefd=False) as mine:
        os.dup2(log.fileno(), 2)
        sys.stderr = mine
        try:
            yield
        finally:
            mine.flush()
            os.dup2(kept, 2)
            sys.stderr = before
    os.close(kept)
