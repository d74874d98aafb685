"""Words and numbers that the parts of the section on heads share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from clifflab.report.figures import head_map
from clifflab.report.head_results import EXACT, Head, HeadsFound, finite, head_name
from clifflab.report.numbers import DASH

AT = {"closing": "at the closing tokens", "all": "at all tokens", "final": "at the final position"}
PANEL = {"closing": "closing tokens", "all": "all tokens", "final": "final position"}
METHOD = {EXACT: "exact effect", "attribution": "first-order estimate", "direct": "direct contribution"}
_NAMED = 12  # heads that a sentence names


def drawn_map(found: HeadsFound, method: str, positions: str, column: str, sign: float, title: str = "") -> Figure:
    """The map of one column of ``heads.parquet``, with the study's and the ground truth's marks."""
    what = "change of refusal log-odds" if column == "effect_log_odds" else "change of probe logit"
    marked = found.suppression(positions if positions in found.positions else found.positions[0])
    planted = found.planted.heads if found.planted else frozenset()
    shape = found.shape
    inside = [head for head in planted if head[0] < shape[0] and head[1] < shape[1]]
    title = title or f"removed at {PANEL.get(positions, positions)}"
    return head_map(found.grid(method, positions, column, sign), what, title, marked, inside)


def listed(heads: Iterable[Head]) -> str:
    """Names of heads."""
    return ", ".join(head_name(head) for head in heads)


def named(heads: Sequence[Head]) -> str:
    """The first of many heads."""
    return listed(heads[:_NAMED]) + (f" and {len(heads) - _NAMED:,} more" if len(heads) > _NAMED else "")


def capital(text: str) -> str:
    """With a capital first letter."""
    return text[:1].upper() + text[1:]


def signed(value: Any) -> str:
    """A number that needs no interval where it stands, with its sign."""
    found = finite(value)
    return DASH if found is None else f"{found:+z.2f}"


def share_text(value: Any) -> str:
    """A share in per cent."""
    found = finite(value)
    return DASH if found is None else f"{100 * found:z.0f}%"


def q_text(value: Any) -> str:
    """A q-value; small ones by their order of magnitude."""
    found = finite(value)
    if found is None:
        return DASH
    return f"{found:.0e}" if found < 0.001 else f"{found:.3f}"
