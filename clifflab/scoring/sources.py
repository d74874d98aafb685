"""Which files the input is made of, and opening them."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

from clifflab.errors import InputError
from clifflab.scoring.filesystems import FIELD, local_path, locate, reading, refuse_credentials, scheme_of
from clifflab.scoring.types import Source

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_WRAPPED = (".bz2", ".xz", ".lz4", ".zip", ".br", ".snappy", ".7z", ".zstd", ".gzip")
_WILD = re.compile(r"[*?\[]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KNOWN = "Parquet, .jsonl or .csv (also .gz or .zst), a saved dataset, or hf:NAME[:SPLIT]"
_BUFFER = 1 << 20  # bytes


def find_sources(pattern: str) -> list[Source]:
    """The files that an input stands for, in a stable order (by name).

    A path may be a file, a folder (its files of known kinds, at any depth), a glob (``*``, ``?``, ``[...]`` within a
    name, ``**`` for folders), a saved Hugging Face dataset, or ``hf:NAME[:SPLIT]``. Schemes: ``s3://`` and ``gs://``
    through pyarrow, any other through fsspec. Names that begin with a dot or an underscore are left out of folders and
    wildcards, as are files of other kinds.

    Raises:
        InputError: Nothing matches, a file is of an unknown kind, the place cannot be read, or its address holds a
            credential.
    """
    if pattern.startswith("hf:") and not pattern.startswith("hf://"):
        return [_hub(pattern)]
    if not pattern.strip():
        raise InputError(FIELD, pattern, "names nothing", f"give a path, a folder or a glob: {_KNOWN}")
    refuse_credentials(pattern)
    scheme = scheme_of(pattern)
    prefix = pattern[: pattern.index("://") + 3] if scheme else ""
    if scheme and pattern[len(prefix) :].startswith("anonymous@"):
        prefix += "anonymous@"
    try:
        with reading(pattern):
            found = _search(*locate(pattern), prefix)
    except UnicodeError:
        shown = pattern.encode(errors="backslashreplace").decode()
        raise InputError(FIELD, shown, "a file's name is not UTF-8", "rename it: names become part of ids") from None
    if not found:
        raise InputError(FIELD, pattern, "no file matches", f"give a path, a folder or a glob: {_KNOWN}")
    return found


def would_read(pattern: str, file: Path) -> bool:
    """Whether an input takes a file of this local path in, now or once it is written.

    Args:
        pattern: As for :func:`find_sources`.
        file: Absolute.
    """
    if scheme_of(pattern) or pattern.startswith("hf:") or not pattern.strip() or kind_of(file.name) is None:
        return False
    path = local_path(pattern)
    wild = None if os.path.lexists(path) else _WILD.search(path)
    base = path if wild is None else path[: wild.start()].rpartition("/")[0]
    below = os.path.relpath(os.path.realpath(file), os.path.realpath(base or "/"))
    names = below.split("/")
    if names[0] in ("..", "."):
        return below == "."
    if wild is None:
        return not any(map(_hidden, names))
    return _taken(names, path[len(base) :].strip("/").split("/"))


def _taken(names: list[str], parts: list[str]) -> bool:
    """Whether :func:`_glob` would come upon a file of this path."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        return not any(map(_hidden, names)) and _matches(names, ["**", *(rest or ["*"])])
    if not names or not fnmatchcase(names[0], part) or (_WILD.search(part) and _hidden(names[0]) > _hidden(part)):
        return False
    return _taken(names[1:], rest) if rest else len(names) == 1


def _search(filesystem: Any, path: str, prefix: str) -> list[Source]:
    from pyarrow.fs import FileType

    wild = _WILD.search(path)
    if wild is not None and (prefix or not os.path.lexists(path)):
        base = path[: wild.start()].rpartition("/")[0]
        infos = _glob(filesystem, base, path[len(base) :].strip("/").split("/"), local=not prefix)
        if infos or not prefix:
            return _known(infos, base, prefix)
    info = filesystem.get_file_info(path)
    if info.type == FileType.File:
        return [_file(info, info.base_name, prefix)]
    if info.type == FileType.Directory:
        return _folder(filesystem, path, prefix)
    if prefix:  # a bucket's own refusal is a better answer than "no file matches"
        filesystem.get_file_info(_selector(path.rpartition("/")[0] or path))
    return []


def _folder(filesystem: Any, path: str, prefix: str) -> list[Source]:
    if not prefix:
        names = set(os.listdir(path))
        if "dataset_dict.json" in names:
            splits = ", ".join(sorted(f"{path}/{name}" for name in names if (Path(path) / name).is_dir()))
            raise InputError(FIELD, path, "holds several splits", f"name one of {splits}")
        if {"state.json", "dataset_info.json"} <= names:
            return [_saved(path)]
    infos = filesystem.get_file_info(_selector(path, recursive=True))
    shown = [info for info in infos if not any(map(_hidden, _below(info.path, path).split("/")))]
    return _known(shown, path, prefix)


def _known(infos: list[Any], base: str, prefix: str) -> list[Source]:
    """Sources among files: other kinds are passed over, but not data that is packed in an unknown way."""
    from pyarrow.fs import FileType

    sources, others = [], list[str]()
    for info in sorted(infos, key=lambda info: info.path):
        if info.type != FileType.File:
            continue
        stem, suffix = os.path.splitext(info.base_name.lower())
        if kind_of(info.base_name) is None and not (suffix in _WRAPPED and kind_of(stem)):
            others.append(info.base_name)
            continue
        sources.append(_file(info, _below(info.path, base), prefix))
    if not sources and others:
        some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(FIELD, some, "no file of a known kind matches", f"give {_KNOWN}")
    return sources


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind and compression by a file's name; ``None`` where it is unknown. Parquet is compressed inside."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    kind = KINDS.get(os.path.splitext(stem)[1] if compression else suffix)
    return None if kind is None or (compression and kind == "parquet") else (kind, compression)


def _file(info: Any, name: str, prefix: str) -> Source:
    known = kind_of(info.base_name)
    if known is None:
        remedy = "write one object a line, as .jsonl" if info.base_name.lower().endswith(".json") else f"give {_KNOWN}"
        raise InputError(FIELD, prefix + info.path, "unknown kind of file", remedy)
    changed = "" if info.mtime_ns is None else str(info.mtime_ns)
    path = info.path if scheme_of(info.path) else prefix + info.path
    return Source(path, name, *known, size=info.size or 0, changed=changed)


def _saved(path: str) -> Source:
    try:
        state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(FIELD, path, "is not a whole saved dataset (state.json is no JSON)", "save it again") from None
    files = [Path(path) / part["filename"] for part in state.get("_data_files", [])]
    size = sum(file.stat().st_size for file in files if file.exists())
    return Source(path, os.path.basename(path), "saved", size=size, changed=str(state.get("_fingerprint", "")))


def _hub(pattern: str) -> Source:
    from clifflab.data.files import hub_commit

    name = pattern.removeprefix("hf:")
    if not name.strip(":"):
        raise InputError(FIELD, pattern, "names no dataset", "write hf:NAME or hf:NAME:SPLIT")
    commit = hub_commit(pattern)
    return Source(pattern, name, "hub", changed=_cached_commit(name) if commit == "unreachable" else commit)


def _cached_commit(name: str) -> str:
    """Commit of the copy of a hub dataset that is read where the hub cannot be reached; empty where there is none."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, slash, own = name.partition(":")[0].rpartition("/")
    place = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    # As the datasets package lays its cache out: DATASET/CONFIG/VERSION/COMMIT, the one changed last is read.
    folders = (place / f"{owner}{'___' if slash else ''}{camelcase_to_snakecase(own)}").glob("*/*/*")
    commits = [folder for folder in folders if _COMMIT.fullmatch(folder.name) and folder.is_dir()]
    return max(commits, key=lambda folder: folder.stat().st_mtime).name if commits else ""


def _below(path: str, base: str) -> str:
    """A path from ``base`` on; some filesystems begin theirs with a slash."""
    return path.strip("/")[len(base.strip("/")) :].strip("/")


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _selector(path: str, *, recursive: bool = False, optional: bool = False) -> Any:
    from pyarrow.fs import FileSelector

    return FileSelector(path, recursive=recursive, allow_not_found=optional)


def _glob(filesystem: Any, base: str, parts: list[str], *, local: bool) -> list[Any]:
    """What lies under ``base`` and matches the parts of a path, a folder at a time."""
    from pyarrow.fs import FileType

    part, rest = parts[0], parts[1:]
    root = base or ("/" if local else "")
    if part == "**":
        every = [
            info
            for info in filesystem.get_file_info(_selector(root, recursive=True, optional=local))
            if not any(map(_hidden, _below(info.path, base).split("/")))
        ]
        wanted = ["**", *(rest or ["*"])]
        return [info for info in every if _matches(_below(info.path, base).split("/"), wanted)]
    if not _WILD.search(part):
        path = f"{base}/{part}" if base or local else part
        if rest:
            return _glob(filesystem, path, rest, local=local)
        return [info for info in [filesystem.get_file_info(path)] if info.type != FileType.NotFound]
    found = []
    for info in filesystem.get_file_info(_selector(root, optional=local)):
        if not fnmatchcase(info.base_name, part) or (_hidden(info.base_name) and not _hidden(part)):
            continue
        if not rest:
            found.append(info)
        elif info.type == FileType.Directory:
            found += _glob(filesystem, info.path, rest, local=local)
    return found


def _matches(names: list[str], parts: list[str]) -> bool:
    """Whether a path matches a pattern, name by name; ``**`` stands for any number of folders, none too."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_matches(names[skip:], parts[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def open_source(source: Source, offset: int = 0) -> BinaryIO:
    """A source's bytes, unpacked, buffered.

    Args:
        source: A file.
        offset: Where to begin; only in a file that is not compressed.

    Raises:
        InputError: It cannot be opened.
    """
    with reading(source.path):
        if not scheme_of(source.path):
            handle: Any = open(local_path(source.path), "rb", buffering=_BUFFER)  # noqa: SIM115 - the caller closes it
        else:
            filesystem, path = locate(source.path)
            handle = io.BufferedReader(filesystem.open_input_file(path), _BUFFER)
        if offset:
            handle.seek(offset)
        if source.compression == "gz":
            handle = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=handle, mode="rb")), _BUFFER)
        elif source.compression == "zst":
            import pyarrow as pa

            handle = io.BufferedReader(pa.CompressedInputStream(handle, "zstd"), _BUFFER)
    return cast(BinaryIO, handle)


def check_unchanged(source: Source) -> None:
    """Fail where a file is no longer what was indexed: its rows would be read from wrong places.

    Raises:
        InputError: It is gone, or has another size (or, on the local disk, another time of change).
    """
    if source.kind == "hub":
        return
    if source.kind == "saved":
        now = _saved(source.path)
    else:
        with reading(source.path):
            filesystem, path = locate(source.path)
            info = filesystem.get_file_info(path)
        # Buckets give times to the second in one answer and finer in another.
        changed = source.changed if scheme_of(source.path) or info.mtime_ns is None else str(info.mtime_ns)
        now = replace(source, size=info.size or 0, changed=changed)
    if now != replace(source, name=now.name):
        raise InputError(FIELD, source.path, "has changed since it was indexed", "leave the input as it is, run again")
