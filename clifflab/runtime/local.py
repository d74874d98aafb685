"""A Ray of this process's own: bounded, on the loopback address, asking for a token."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clifflab.config import RuntimeConfig


def start_ray(settings: RuntimeConfig) -> bool:
    """Start Ray in this process unless it runs already; returns whether it was started here.

    The local cluster has a bounded object store, no dashboard, listens on the loopback address and asks for a token
    that lives in this process's environment alone.
    """
    if settings.address:
        import ray

        if ray.is_initialized():
            return False
        ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR)
        return True
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return False
    with _native_messages_held():
        ray.init(
            address="local",
            # Ray's own count respects the limits of containers; more workers than cores are the user's choice.
            num_cpus=settings.workers if isinstance(settings.workers, int) else None,
            object_store_memory=settings.object_store_mb << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    return True


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
