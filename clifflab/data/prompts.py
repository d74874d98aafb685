"""Prompt sets: from a source's rows to the ``PROMPTS`` table and its rejects.

Every source row comes out once: as a prompt, or as a reject with a reason (``undecodable``, ``null``, ``not_text``,
``empty``, ``no_column``, ``not_messages``, ``bad_label``, ``bad_id``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from clifflab.config import PromptSet
from clifflab.data.files import Row, iter_rows
from clifflab.errors import InputError, TraceError
from clifflab.text.render import Messages, split_inline

PROMPT_COLUMNS = ("prompt", "messages", "instruction", "question", "Goal", "goal")
_ROLES = ("system", "user", "assistant", "tool")
_MIXED = "organism:corpus"  # harmful and benign requests; ``label: unlabelled`` keeps their labels out of sight


def read_prompts(spec: PromptSet, field: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read one prompt set.

    Args:
        spec: The set's configuration.
        field: Its place in the study (``prompts.0``), for error lines.

    Returns:
        Rows of ``tables.PROMPTS`` (without ``row``) and of ``tables.REJECTS``.

    Raises:
        InputError: The source cannot be read, has no usable row, lacks a column, or repeats an id.
    """
    prompts: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, record, problem in islice(_source_rows(spec, field), spec.limit):
        try:
            if record is None:
                raise TraceError("undecodable", problem)
            prompt = parse_row(spec, record, f"{spec.name}-{number:06d}")
        except TraceError as error:
            rejects.append(_reject(spec, number, record, error))
            continue
        if prompt["id"] in seen:
            raise InputError(
                f"{field}.id", prompt["id"], f"duplicate id in rows {seen[prompt['id']]} and {number} of {spec.path}",
                "make ids unique within the set, or drop the id column",
            )  # fmt: skip
        seen[prompt["id"]] = number
        prompts.append(prompt)
    if not prompts and rejects and all(row["reason"] == "no_column" for row in rejects):
        raise InputError(
            f"{field}.columns.prompt", spec.columns.get("prompt", "(absent)"), f"{rejects[0]['detail']} ({spec.path})",
            "name the column with the request in columns.prompt",
        )  # fmt: skip
    if not prompts:
        why = f"all {len(rejects)} rows are rejected, the first as {rejects[0]['reason']}" if rejects else "has no rows"
        raise InputError(f"{field}.path", spec.path, f"empty prompt set: {why}", "give at least one usable prompt")
    return prompts, rejects


def _source_rows(spec: PromptSet, field: str) -> Iterator[Row]:
    if not spec.path.startswith("organism:"):
        yield from iter_rows(f"{field}.path", spec.path)
        return
    from clifflab.organism.language import prompt_rows

    assert spec.limit is not None  # PromptSet demands it
    try:
        rows = prompt_rows(spec.path.removeprefix("organism:"), spec.limit, spec.seed)
    except ValueError as error:
        raise InputError(
            f"{field}.path", spec.path, str(error), "choose a set of `clifflab organism prompts`"
        ) from None
    for number, record in enumerate(rows):
        yield number, record, ""


def parse_row(spec: PromptSet, record: dict[str, Any], name: str) -> dict[str, Any]:
    """One row of a source as a row of ``tables.PROMPTS`` (without ``row``).

    Args:
        spec: The set that the row belongs to: columns, label, and whether rows hold traces.
        record: The row as it was read.
        name: Its id where it has none of its own.

    Raises:
        TraceError: The row cannot be used; says why.
    """
    messages = _messages(record, prompt_column(spec, record))
    thinking, response = None, None
    if spec.existing:
        thinking, response, messages = _existing(spec, record, messages)
    elif messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise TraceError("not_messages", "the conversation does not end with the user's turn")
    identity = row_id(spec, record)
    group = _text_or_none(record, spec, "group")
    return {
        "id": name if identity is None else identity,
        "set": spec.name,
        "label": _label(spec, record),
        "group": derived_group(messages) if group is None or not group.strip() else group,
        "messages": messages,
        "existing": spec.existing,
        "thinking": thinking,
        "response": response,
        **{role: _text_or_none(record, spec, role) for role in ("category", "target")},
    }


def row_id(spec: PromptSet, record: dict[str, Any]) -> str | None:
    """A row's own id as text; ``None`` where it has none.

    Raises:
        TraceError: ``bad_id``: the id is neither text nor a whole number, is empty, or is not UTF-8.
    """
    identity = _optional(record, spec, "id")
    if identity is None:
        return None
    if isinstance(identity, bool | float | list | dict | bytes) or not str(identity).strip():
        raise TraceError("bad_id", "the id is empty or no text")
    try:
        return _decodable(str(identity), "id")
    except TraceError:
        raise TraceError("bad_id", "the id holds bytes that are not UTF-8") from None


def derived_group(messages: Messages) -> str:
    """A name for the request itself: equal requests share a group, whatever their set, case and white space."""
    text = " ".join(messages[-1]["content"].casefold().split())
    return f"text-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prompt_column(spec: PromptSet, record: Mapping[str, Any], *, listing: bool = True) -> str:
    """The column that holds a row's request.

    Args:
        spec: The set that the row belongs to.
        record: The row as it was read.
        listing: Whether the error may list the row's columns; where rows are not trusted, a request may be the name
            of a column.

    Raises:
        TraceError: ``no_column``: the row has none; lists those that it has, or says how many.
    """
    for role in ("prompt", "messages"):
        if role in spec.columns:
            column = spec.columns[role]
            break
    else:
        column = next((name for name in PROMPT_COLUMNS if name in record), "")
    if column not in record:
        wanted = column or " or ".join(PROMPT_COLUMNS)
        if not listing:
            raise TraceError("no_column", f"no column {wanted}; columns of the row: {len(record)}")
        there = ", ".join(sorted(map(str, record))) or "none"
        raise TraceError("no_column", f"no column {wanted}; there are: {there}")
    return column


def _messages(record: dict[str, Any], column: str) -> Messages:
    value = record[column]
    if value is None:
        raise TraceError("null", f"{column} is null")
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, column)}]
    if not isinstance(value, list):
        raise TraceError("not_text", f"{column} is {type(value).__name__}, not text")
    messages: Messages = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            raise TraceError("not_messages", f"{column} holds a turn without a known role and text content")
        messages.append({"role": turn["role"], "content": _decodable(turn["content"], column)})
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in messages):
        raise TraceError("empty", f"{column} has no user turn with text")
    return messages


def _existing(spec: PromptSet, record: dict[str, Any], messages: Messages) -> tuple[str | None, str | None, Messages]:
    """Thinking, response and the conversation before; an empty response is an outcome and no broken row.

    A conversation may end with the assistant's turn, which then holds both, and have them in columns beside it too.
    """
    thought, said = (spec.columns.get(role, role) for role in ("thinking", "response"))
    apart = record.get(thought) is not None
    if messages[-1]["role"] == "assistant":
        answer, messages = messages[-1]["content"], messages[:-1]
        if apart and isinstance(record.get(said), str):
            answer = _text(record[said], said, empty=True)
    else:
        answer = _text(record.get(said), said, empty=True)
    if apart:
        return _text(record[thought], thought, empty=True), answer, messages
    thinking, response = split_inline(answer)
    return thinking, response, messages


def _text(value: Any, column: str, *, empty: bool = False) -> str:
    if value is None:
        raise TraceError("null", f"{column} is null or absent")
    if not isinstance(value, str):
        raise TraceError("not_text", f"{column} is {type(value).__name__}, not text")
    if not value.strip() and not empty:
        raise TraceError("empty", f"{column} is empty")
    return _decodable(value, column)


def _decodable(value: str, column: str) -> str:
    """The text itself; half of a surrogate pair stands for bytes that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TraceError("undecodable", f"{column} holds bytes that are not UTF-8") from None
    return value


def writable(text: str) -> str:
    """A text as a table takes it: halves of surrogate pairs become question marks."""
    return text.encode("utf-8", "replace").decode()


def _label(spec: PromptSet, record: dict[str, Any]) -> str:
    """The row's own label where the set has a column of labels; rows of the planted corpus always bring theirs."""
    own = "label" if spec.path == _MIXED and spec.label != "unlabelled" else None
    column = spec.columns.get("label", own)
    if column is None:
        return spec.label
    value = record.get(column)
    if isinstance(value, str) and value.strip().lower() in ("harmful", "benign"):
        return value.strip().lower()
    raise TraceError("bad_label", f"{column} is neither harmful nor benign")


def _text_or_none(record: dict[str, Any], spec: PromptSet, role: str) -> str | None:
    value = _optional(record, spec, role)
    return None if value is None else _decodable(str(value), spec.columns.get(role, role))


def _optional(record: dict[str, Any], spec: PromptSet, role: str) -> Any:
    return record.get(spec.columns.get(role, role))


def _reject(spec: PromptSet, number: int, record: dict[str, Any] | None, error: TraceError) -> dict[str, Any]:
    identity = _optional(record, spec, "id") if record else None
    return {
        "stage": "prompts",
        "set": spec.name,
        "source": spec.path,
        "source_row": number,
        "id": None if identity is None else writable(str(identity)),
        "reason": error.reason,
        "detail": writable(error.detail),
    }
