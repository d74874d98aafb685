"""Multiple-choice questions: from a source's rows to questions with texts to choose from.

Every source row comes out once: as a question, or counted under a reason (``undecodable``, ``no_question``,
``no_choices``, ``repeated_choice``, ``bad_answer``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from clifflab.config.repair import ChoiceSet
from clifflab.data.files import iter_rows
from clifflab.errors import InputError, TraceError

_COLUMNS = ("question", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        row: Its row in the source.
        question: What is asked.
        choices: At least two different texts.
        answer: Index of the right one.
    """

    row: int
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """The questions of one source.

    Attributes:
        rows: The usable ones, in its order.
        broken: How many rows could not be used, by reason.
    """

    rows: list[Question]
    broken: dict[str, int]


def read_choices(spec: ChoiceSet, field: str) -> Questions:
    """Read one set of multiple-choice questions.

    Args:
        spec: The set's configuration.
        field: Its place in the study (``repair.evaluate.choices.0``), for error lines.

    Raises:
        InputError: The source cannot be read, lacks a column, or has no usable row.
    """
    rows: list[Question] = []
    broken: Counter[str] = Counter()
    for number, record, _ in islice(iter_rows(f"{field}.path", spec.path), spec.limit):
        try:
            if record is None:
                raise TraceError("undecodable", "")
            if not number and (absent := [name for name in _COLUMNS if name not in record]):
                there = ", ".join(map(str, record)) or "none"
                problem = f"has no column {absent[0]}; there are: {there}"
                raise InputError(f"{field}.path", spec.path, problem, f"give the columns {', '.join(_COLUMNS)}")
            rows.append(_question(number, record))
        except TraceError as error:
            broken[error.reason] += 1
    if not rows:
        why = ", ".join(f"{count} x {reason}" for reason, count in broken.items()) or "it has no rows"
        remedy = "give rows with a question, a list of at least two choices, and the index of the right one"
        raise InputError(f"{field}.path", spec.path, f"no usable question: {why}", remedy)
    return Questions(rows, dict(sorted(broken.items())))


def _question(number: int, record: Mapping[str, Any]) -> Question:
    question = _text(record.get("question"))
    if not question:
        raise TraceError("no_question", "the question is empty or no text")
    choices = tuple(_text(choice) for choice in _list(record.get("choices")))
    if len(choices) < 2 or not all(choices):
        raise TraceError("no_choices", "choices is no list of at least two texts")
    if len(set(choices)) < len(choices):
        raise TraceError("repeated_choice", "two choices are the same")
    return Question(number, question, choices, _answer(record.get("answer"), len(choices)))


def _list(value: Any) -> list[Any]:
    """A list, also where a table without lists (CSV) holds it as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return list(value) if isinstance(value, list | tuple) else []


def _answer(value: Any, count: int) -> int:
    """Index of the right choice; whole floats and digits as a table's reader may make them of integers."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise TraceError("bad_answer", f"answer is no index from 0 to {count - 1}")
    return value


def _text(value: Any) -> str:
    """Text without outer white space; nothing for what is no text, or holds half of a surrogate pair."""
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return ""
    return value.strip()
