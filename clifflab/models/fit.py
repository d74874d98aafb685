"""How much room a model takes, from what its files say of themselves: no weight is read.

A worker holds the weights in the dtype that they are loaded in, and beside them the states of a batch, the caches of
generation and the library's own; :data:`ROOM` and :data:`FIXED_MB` stand for these. Batches that do not fit are split,
so the room is what keeps a worker going, not what makes it fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clifflab.config import ModelSpec
from clifflab.errors import ClifflabError, InputError

ROOM = 1.25  # times the weights
FIXED_MB = 2048  # of each GPU, or an eighth of a small one
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}  # auto is bfloat16 on a GPU
_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER = 100 << 20  # the format's own bound


def gpus_needed(spec: ModelSpec, gpu_memory_mb: int | None, largest_node: int | None = None) -> float:
    """GPUs of one worker of a model, ``gpus: auto`` settled.

    Args:
        spec: The model.
        gpu_memory_mb: Memory of one GPU in MiB; ``None`` where it is unknown.
        largest_node: GPUs of the machine with the most, over which one model can be split.

    Returns:
        What the spec says; else 1, or the whole number of GPUs that its weights need with the room beside them. 1 where
        the memory or the size of the weights is unknown.

    Raises:
        InputError: No machine has as many.
    """
    size = None
    if spec.gpus != "auto":
        needed = float(spec.gpus)
    else:
        size = weight_bytes(spec) if gpu_memory_mb else None
        if size is None or not gpu_memory_mb:
            return 1.0
        usable_mb = gpu_memory_mb - min(FIXED_MB, gpu_memory_mb // 8)
        needed = float(max(1, math.ceil(size * ROOM / (usable_mb << 20))))
    if largest_node is not None and needed > max(largest_node, 1):
        have = f"and the machine with the most has {largest_node}"
        if size is None:
            raise InputError("models.gpus", f"{spec.name}: {needed:g}", f"GPUs of one machine, {have}", "give fewer")
        problem = f"is too big: {size / 1e9:.1f} GB of weights need {needed:g} GPUs, {have}"
        raise InputError("models.path", spec.path, problem, "use larger GPUs, or dtype bfloat16 if it is float32")
    return needed


def weight_bytes(spec: ModelSpec) -> int | None:
    """Bytes of a model's weights once they are loaded; ``None`` where its files do not say, or are not to be had."""
    from clifflab.models.loading import resolve_path

    try:
        path = Path(resolve_path(spec))
        if path.is_file():
            return _gguf_weights(path) * _BYTES[spec.dtype]
        counts = _stored(path) if path.is_dir() else _hub_counts(spec)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, ClifflabError):
        return None  # what is wrong with it shows when it is loaded
    return _loaded(counts, _BYTES[spec.dtype]) if counts else None


def _loaded(counts: Mapping[str, int], each: int) -> int:
    """Floating weights take the dtype that is asked for; whole numbers, and floats of less than 16 bits, stay."""
    return sum(count * (each if kind in _FLOATS else _STORED.get(kind, 1)) for kind, count in counts.items())


def _stored(folder: Path) -> dict[str, int]:
    """Numbers by stored dtype, of the weights that transformers would load from a folder."""
    if (folder / _WEIGHTS).is_file():
        return _counts([folder / _WEIGHTS])
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return _counts(folder / name for name in sorted(set(index["weight_map"].values())))


def _counts(files: Iterable[Path]) -> dict[str, int]:
    """Numbers by dtype, from the headers of safetensors files."""
    found: dict[str, int] = {}
    for file in files:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("no safetensors header")
            header: dict[str, Any] = json.loads(handle.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                found[about["dtype"]] = found.get(about["dtype"], 0) + math.prod(about["shape"])
    return found


def _hub_counts(spec: ModelSpec) -> dict[str, int] | None:
    """Of a hub id: from the local cache, else from what the hub says of its files."""
    from transformers.utils.hub import cached_file

    for name in (_WEIGHTS, _INDEX):
        here = cached_file(
            spec.path,
            name,
            revision=spec.revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if here:
            try:
                return _stored(Path(here).parent)
            except FileNotFoundError:  # the index alone is there
                break
    from huggingface_hub import get_safetensors_metadata

    try:
        counts = get_safetensors_metadata(spec.path, revision=spec.revision).parameter_count
    except Exception:  # noqa: BLE001 - the client's errors change with its version; loading will say what is wrong
        return None
    return {str(kind): count for kind, count in counts.items()}


def _gguf_weights(file: Path) -> int:
    """Numbers in a GGUF file's tensors, which are dequantised."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
