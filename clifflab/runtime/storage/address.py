"""What an output's address may be, and where it leads."""

from __future__ import annotations

from pathlib import Path

from clifflab.errors import OutputError
from clifflab.scoring.filesystems import OUTPUT, local_path, refuse_credentials, scheme_of


def local_root(out: str, name: str) -> Path | None:
    """Folder of an output on a disk, absolute; ``None`` where it is remote.

    Raises:
        OutputError: It is no address of an output, or holds a credential.
    """
    _check(out, name)
    return None if scheme_of(out) else Path(local_path(out)) / name


def address_of(out: str, name: str) -> str:
    """What a user is shown, and what a filesystem is asked for: a path, or an address without a credential.

    Raises:
        OutputError: It is no address of an output, or holds a credential.
    """
    root = local_root(out, name)
    return str(root) if root is not None else f"{out.rstrip('/')}/{name}"


def _check(out: str, name: str) -> None:
    refuse_credentials(out, OUTPUT)
    scheme, shape = scheme_of(out), "write a local path, or SCHEME://BUCKET/FOLDER"
    if not out.strip() or ("://" in out and not scheme and not out.lower().startswith("file://")):
        raise OutputError(OUTPUT, out, "is no path and no address", shape)
    if not name or "/" in name or name.startswith("."):
        raise OutputError(OUTPUT, name, "is no name of a folder", "name the study with letters, digits, - and _")
    if not scheme:
        return
    parts = out.partition("://")[2].removeprefix("anonymous@").rstrip("/").split("/")
    if scheme not in ("memory", "local") and not parts[0]:
        raise OutputError(OUTPUT, out, "names no bucket", shape)
    if any(part in (".", "..") for part in parts) or any(c in out for c in "?#\n\0"):
        raise OutputError(OUTPUT, out, "holds '..', '?' or '#'", f"{shape}; settings come from the environment")
