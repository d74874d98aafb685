"""The planted-cliff model: a tiny reasoning model whose refusal cliff has a known cause."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def planted_path() -> Path:
    """Folder of the shipped planted-cliff checkpoint."""
    return Path(str(files("clifflab.organism") / "data" / "planted"))


__all__ = ["planted_path"]
