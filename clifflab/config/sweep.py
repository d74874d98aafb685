"""One entry of ``models:`` for many models: what differs stands in ``sweep`` and is put into the other values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
MOST = 1000  # models of one sweep; more is a slip


def expand(entries: Any) -> Any:
    """``models:`` with every sweep written out, in order; what is no list of mappings is left to its own checks.

    An entry may hold ``sweep: {key: [values]}``. Each of its other texts may name ``{key}`` (``{{`` and ``}}`` stand
    for braces), and the entry becomes one for every combination of values, the last key fastest. A key that the name
    does not mention is added to it, after a ``-``; what no folder may be called becomes ``-`` there.

    Args:
        entries: The list as the study's file has it, or a single entry.

    Raises:
        ValueError: A placeholder without a key, a key that nothing uses, no values, or values that are no plain ones.
    """
    if isinstance(entries, Mapping):
        entries = [entries]
    if not isinstance(entries, list | tuple):
        return entries
    found: list[Any] = []
    for place, entry in enumerate(entries):
        found += _expanded(entry, place) if isinstance(entry, Mapping) and "sweep" in entry else [entry]
    return found


def _expanded(entry: Mapping[str, Any], place: int) -> list[dict[str, Any]]:
    values = _values(entry["sweep"], f"models.{place}.sweep")
    rest = {field: value for field, value in entry.items() if field != "sweep"}
    used = {field: _used(value, values, f"models.{place}.{field}") for field, value in rest.items()}
    elsewhere = set().union(*(keys for field, keys in used.items() if field != "name"))
    if idle := next((key for key in values if key not in elsewhere), None):
        raise ValueError(
            f"models.{place}.sweep: nothing but the name mentions {{{idle}}}, so its models would be the same; "
            "put it into path, revision, adapter or another setting"
        )
    unnamed = [key for key in values if key not in used.get("name", set())]
    expanded = []
    for combination in product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        model = {field: _filled(value, chosen) for field, value in rest.items()}
        if isinstance(name := rest.get("name"), str):
            safe = {key: _UNSAFE.sub("-", value).strip("-") for key, value in chosen.items()}
            model["name"] = "-".join([_filled(name, safe), *(safe[key] for key in unnamed)])
        expanded.append(model)
    return expanded


def _values(sweep: Any, field: str) -> dict[str, list[str]]:
    if not isinstance(sweep, Mapping) or not sweep:
        raise ValueError(f"{field}: give keys with lists of values, such as size: [0.6B, 1.7B]")
    found: dict[str, list[str]] = {}
    models = 1
    for key, values in sweep.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"{field}: {key!r} is no key; use letters, digits and '_', starting with a letter")
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{field}.{key}: is no list of values, or an empty one; give at least one value")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value):
                raise ValueError(f"{field}.{key}: {value!r} is neither text nor a number; quote it")
        texts = [str(value) for value in values]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise ValueError(f"{field}.{key}: {twice!r} stands there twice; leave one out")
        found[key] = texts
        models *= len(texts)
    if models > MOST:
        raise ValueError(f"{field}: makes {models:,} models, more than {MOST:,}; split the study")
    return found


def _used(value: Any, values: Mapping[str, Any], field: str) -> set[str]:
    """Keys that a value mentions."""
    keys = {found[1] for found in _PLACEHOLDER.finditer(value) if found[1] is not None} if type(value) is str else set()
    if unknown := sorted(keys - set(values)):
        known = ", ".join(values)
        raise ValueError(f"{field}: no key {unknown[0]!r} in sweep; it has {known} (write {{{{ for a brace)")
    return keys


def _filled(value: Any, chosen: Mapping[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    return _PLACEHOLDER.sub(lambda found: found[0][0] if found[1] is None else chosen[found[1]], value)
