"""clifflab: find, explain and repair the refusal cliff of reasoning models.

The public Python interface is small: describe a :class:`Study`, then :func:`run` it. Both names are resolved on first
use, so that ``import clifflab`` (and ``clifflab --help``) stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clifflab.config import Study as Study
    from clifflab.runtime.study import run as run

__version__ = "0.1.0"
__all__ = ["Study", "__version__", "run"]

_LAZY = {"Study": "clifflab.config", "run": "clifflab.runtime.study"}


def __getattr__(name: str) -> Any:
    """Import the public names on first use."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'clifflab' has no attribute {name!r}")
