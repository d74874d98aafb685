"""Files that are whole or absent, and names for what was computed.

Everything is written to a temporary name beside its place and renamed; a step's manifest is written last, so that what
has a manifest is whole. Fingerprints cover settings, inputs, model, seed and code, never workers or machines.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import clifflab
from clifflab.errors import InputError, OutputError, shorten
from clifflab.pulse import beat

# Folders whose code decides results; the command line, runtimes and reports do not.
_RESULT_CODE = ("data", "engines", "models", "organism", "repair", "science", "stages", "sweep", "text", "tuning")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "peft")
_OTHER_PACKAGES = ("datasketch", "pyarrow", "ray", "safetensors", "datasets")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of plain data in canonical JSON."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no white space; NaN is refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


@lru_cache(maxsize=1)
def code_version() -> str:
    """Version of clifflab with a hash of the code that decides results."""
    return f"{clifflab.__version__}+{code_hash((*_RESULT_CODE, 'tables.py'))}"


@lru_cache
def code_hash(parts: tuple[str, ...]) -> str:
    """Hash of folders and files of this package: all code and templates in them."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        place = root / part
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.suffix in (".py", ".j2"):
                digest.update(file.relative_to(root).as_posix().encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def package_versions(*, every: bool = False) -> dict[str, str]:
    """Versions of the packages that numbers depend on; with ``every``, of those that carry them too."""
    return {name: metadata.version(name) for name in (*_PACKAGES, *(_OTHER_PACKAGES if every else ()))}


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, then put it in place.

    Raises:
        OutputError: The disk is full or the folder cannot be written; the old file, if any, is untouched.
    """
    # Machines that share a folder may have processes of one number.
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(scratch, path)
        beat()
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda scratch: scratch.write_bytes(text.encode()))


def write_json(path: Path, data: Any) -> None:
    """Write readable JSON atomically."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_parquet(path: Path, table: Any) -> None:
    """Write an Arrow table atomically."""
    import pyarrow.parquet as pq

    write_atomic(path, lambda scratch: pq.write_table(table, scratch, compression="zstd"))


def write_safetensors(path: Path, tensors: Mapping[str, Any], meta: Mapping[str, str]) -> None:
    """Write tensors with text metadata atomically."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(meta))
    write_atomic(path, lambda scratch: scratch.write_bytes(data))


def read_parquet(path: Path) -> Any:
    """Read a table that clifflab wrote.

    Raises:
        InputError: The file is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, memory_map=False)
    except FileNotFoundError:
        raise InputError("output", path, "is missing", "run the study again: it is computed anew") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError("output", path, f"is damaged ({error})", "delete this file and run again") from None


def read_json(path: Path) -> Any:
    """Read JSON; ``None`` where the file is absent or damaged (a manifest cut short marks nothing whole)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # not JSON, or not UTF-8
        return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class HashCache:
    """SHA-256 of files, kept by path, size and time of change, so that large checkpoints are read once.

    Args:
        path: Where the hashes are kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = read_json(path) or {}

    def __call__(self, file: Path) -> str:
        """Hash of a file's bytes."""
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if key not in self._known:
            self._known[key] = file_hash(file)
        return self._known[key]

    def save(self) -> None:
        """Keep what is known for the next run."""
        if self._known != (read_json(self._path) or {}):
            write_json(self._path, self._known)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a folder for one run at a time; the lock goes with the process, however it ends.

    Raises:
        OutputError: The folder cannot be written, another run holds it, or its lock is a link.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # a link would lock, or empty, another file
        handle = os.fdopen(os.open(root / ".lock", flags, 0o666), "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno == errno.ELOOP and (root / ".lock").is_symlink():
            problem, remedy = "is a link, and must be a file of its own", "remove it, or choose another --out"
            raise OutputError("output", root / ".lock", problem, remedy) from None
        raise output_error(root, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = _holder(handle)
        handle.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise output_error(root / ".lock", error) from None
        raise OutputError(
            "output", root, f"another run is writing there{who}", "wait for it, or choose another --out"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with suppress(OSError):  # a full disk: the lock is held all the same
            os.truncate(handle.fileno(), 0)
            os.pwrite(
                handle.fileno(), f"since {since}, process {os.getpid()} on host {socket.gethostname()}".encode(), 0
            )
        yield
    finally:
        handle.close()


def _holder(handle: IO[str]) -> str:
    """Who wrote a lock file, in brackets; nothing where that is not told."""
    try:
        handle.seek(0)
        told = handle.read(200)
    except OSError:
        return ""
    return f" ({told})" if told else ""


def refuse_links(root: Path) -> None:
    """Refuse a folder of results in which a link leads out of it: what is written there would land elsewhere.

    The folder itself may be a link, and links within it may lead to other places within it.

    Raises:
        OutputError: Names the first such link.
    """
    inside = root.resolve()
    for folder, folders, files in os.walk(root):
        for name in sorted((*folders, *files)):
            path = Path(folder, name)
            if path.is_symlink() and not _leads_into(path, inside):
                problem = f"is a link that leads out of the results ({shorten(os.readlink(path), 60)})"
                raise OutputError("output", path, problem, "remove it, or choose another --out")


def _leads_into(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # a link to itself
        return False


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def output_error(path: Path, error: OSError) -> OutputError:
    """An operating system's refusal to write, as one line with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError("output", path, "no space left on the disk", "make space and run again: it continues")
    return OutputError("output", path, f"cannot be written ({error.strerror or error})", "choose a writable --out")
