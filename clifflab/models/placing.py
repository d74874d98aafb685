"""Where a model's weights lie, and whether they are whole: over several GPUs, and never anywhere slower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from clifflab.config import ModelSpec
from clifflab.errors import ClifflabError, InputError
from clifflab.models.fit import gpus_needed, weight_bytes

_SHARE = 0.9  # of a GPU's memory, for weights
_MISMATCH = "ignore_mismatched_sizes"  # an option of transformers, which it names instead of the problem
_SLOW = {"cpu", "disk", "meta"}


def device_map(spec: ModelSpec) -> dict[str, Any]:
    """Options of a load that spread a model over GPUs; none where one holds it.

    The GPUs are the first that this process sees, as many as the spec says; under ``auto`` as many as the weights need.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < 2:
        return {}
    sizes = [int(torch.cuda.get_device_properties(index).total_memory) for index in range(seen)]
    wanted = min(seen, int(gpus_needed(spec, min(sizes) >> 20)))
    if wanted < 2:
        return {}
    return {
        "device_map": "balanced",
        "max_memory": {index: int(size * _SHARE) for index, size in enumerate(sizes[:wanted])},
    }


def check_place(model: Any, spec: ModelSpec) -> None:
    """Refuse weights that found no room on the GPUs: fetched from memory or disk in every pass, they take for ever.

    Raises:
        InputError: Some part of the model lies elsewhere.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or (places & _SLOW and places - _SLOW):
        raise _too_big(spec)


@torch.no_grad()
def check_weights(model: Any, spec: ModelSpec) -> None:
    """Refuse a checkpoint that holds NaN or infinity.

    Raises:
        InputError: Names the first weight that does.
    """
    for name, weight in model.named_parameters():
        whole = not weight.is_floating_point() or weight.numel() == 0 or weight.device.type == "meta"
        if not whole and not torch.isfinite(torch.linalg.vector_norm(weight, ord=1, dtype=torch.float32)):
            problem = f"holds numbers that are not finite ({name})"
            remedy = "use dtype bfloat16 or float32" if spec.dtype == "float16" else "get the checkpoint again"
            raise InputError("models.path", spec.path, problem, remedy)


@contextmanager
def as_one_line(spec: ModelSpec, what: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong with a model is the user's to mend: one line, and what memory lacks said as such."""
    from clifflab.models.forward import no_memory

    try:
        yield
    except ClifflabError:
        raise
    except Exception as error:
        if no_memory(error):
            raise _too_big(spec) from error
        raise InputError("models.path", spec.path, f"{what} ({_first_line(error)})", remedy) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    if _MISMATCH in lines[0]:
        return "its weights have other sizes than its config.json says"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _too_big(spec: ModelSpec) -> InputError:
    size = weight_bytes(spec)
    told = f" ({size / 1e9:.1f} GB of weights as {spec.dtype})" if size else ""
    if not torch.cuda.is_available():
        remedy = "use a machine with more, or dtype bfloat16"
        return InputError("models.path", spec.path, f"does not fit into this machine's memory{told}", remedy)
    problem = f"does not fit into the memory of {torch.cuda.device_count()} GPU(s){told}"
    return InputError("models.path", spec.path, problem, "give it more (gpus: 2), or dtype bfloat16")
