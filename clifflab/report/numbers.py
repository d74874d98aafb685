"""Numbers as text: every mean with its interval, or with the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DASH = "\u2013"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return DASH if value is None else f"{value:z.{digits}f}"  # z: no minus before a zero


def interval(entry: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A mean with its 95% interval, or why it has none.

    Args:
        entry: ``mean``, ``low`` and ``high``; where ``low`` is null, ``reason`` or ``groups`` say why.
        digits: Digits after the point.
    """
    if not entry or entry["mean"] is None:
        return DASH
    if entry["low"] is None:
        return f"{number(entry['mean'], digits)} (no interval: {_why(entry)})"
    return f"{number(entry['mean'], digits)} [{number(entry['low'], digits)}, {number(entry['high'], digits)}]"


def cell(value: Any, digits: int = 2) -> str:
    """A table's cell: text and counts as they are, a mean with its interval, a dash for nothing."""
    if value is None:
        return DASH
    if isinstance(value, Mapping):
        return interval(value, digits)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        raise TypeError(f"{value}: a number without an interval; give a mean with its interval, or text that says why")
    return str(value)


def percent(entry: Mapping[str, Any] | None) -> str:
    """A share with its interval in per cent."""
    if not entry or entry["mean"] is None:
        return DASH
    mean, low, high = (None if entry[k] is None else f"{100 * entry[k]:z.0f}" for k in ("mean", "low", "high"))
    return f"{mean}% (no interval: {_why(entry)})" if low is None else f"{mean}% [{low}, {high}]"


def _why(entry: Mapping[str, Any]) -> str:
    """Why a mean has no interval."""
    groups = entry.get("groups")
    return entry.get("reason") or ("one group" if groups in (None, 1) else f"{groups} groups")
