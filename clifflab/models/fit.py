"""GPUs that a model needs."""

from __future__ import annotations

from clifflab.config import ModelSpec


def gpus_needed(spec: ModelSpec, gpu_memory_mb: int | None) -> float:
    """One."""
    return 1.0
