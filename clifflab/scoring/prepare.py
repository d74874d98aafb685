"""From rows as they were read to traces that are ready to be scored, and the rows that are rejected.

Every row of a block comes out once. Its reasons are those of :mod:`clifflab.data.prompts`, of rendering, and of
:mod:`clifflab.scoring.types`; a reject never holds a text of its row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from clifflab.config import PromptSet, ScoreConfig
from clifflab.data.prompts import parse_row, prompt_column, row_id, writable
from clifflab.errors import InputError, TraceError, shorten
from clifflab.science.judges import judge
from clifflab.scoring.ready import Ready, bare, ready_table
from clifflab.scoring.types import CLOSING_MISSING, DUPLICATE_ID, TOO_LONG, Block, Prepared, RawRow, Reject, Source
from clifflab.text.batch import BatchRenderer, Rendered
from clifflab.text.cut import without_middle
from clifflab.text.render import Renderer
from clifflab.text.spans import Spans

# Characters of a row, about a million tokens: tokenising takes some hundred bytes a token, and one row of a corpus must
# not cost a worker its memory.
MOST_CHARACTERS = 1 << 22
_BESIDE = ("group", "category", "target", "label")  # columns that are read whatever the rows hold


class Preparer:
    """Prepares blocks of one corpus for one model; knows the model's tokenizer and not the model.

    A row fares in a sample of the corpus as in the whole of it: one whose id an earlier row has is rejected even where
    that earlier row is not in the sample.

    Args:
        renderer: The model's.
        context: Longest sequence that the model reads, in tokens.
        rows: Columns, label and name of the corpus. Where its rows hold no traces (``existing`` is false), the traces
            that come out are bare prompts, which :func:`clifflab.scoring.generate.complete` completes.
        settings: What becomes of long traces, and whether texts are kept.
    """

    def __init__(self, renderer: Renderer, context: int, rows: PromptSet, settings: ScoreConfig) -> None:
        self.rows, self.settings = rows, settings
        self.limit = min(context, settings.max_tokens or context)
        self._batch = BatchRenderer(renderer)
        self._renderer = renderer
        special = sorted(renderer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def prepare(
        self, block: Block, source: Source, raw: Sequence[RawRow], duplicates: Collection[int] = frozenset()
    ) -> Prepared:
        """Prepare one block.

        Args:
            block: The block.
            source: Where its rows come from.
            raw: Its rows, or those of them that are wanted.
            duplicates: Rows, counted through the whole input, whose id an earlier row has; a set.
        """
        rejects: list[Reject] = []
        parsed: list[tuple[RawRow, dict[str, Any]]] = []

        def reject(item: RawRow, error: TraceError, name: str | None) -> None:
            detail = writable(shorten(error.detail, 200))
            rejects.append(Reject(block.base + item.row, source.name, item.row, name, error.reason, detail))

        for item in raw:
            name: str | None = None
            try:
                if item.record is None:
                    raise TraceError(item.reason, item.detail)
                name = row_id(self.rows, item.record) or f"{source.name}:{item.row}"
                if block.base + item.row in duplicates:
                    raise TraceError(DUPLICATE_ID, "an earlier row has this id")
                _check_length(self.rows, item.record)
                parsed.append((item, parse_row(self.rows, item.record, name)))
            except TraceError as error:
                reject(item, error, name)
        traces: list[Ready] = []
        for (item, prompt), found in zip(parsed, self._rendered([prompt for _, prompt in parsed]), strict=True):
            try:
                traces.append(self._ready(block.base + item.row, prompt, found))
            except TraceError as error:
                reject(item, error, prompt["id"])
        self._judge(traces)
        if not self.settings.keep_traces:
            for trace in traces:
                trace.prompt = trace.thinking = trace.response = None
        rejects.sort(key=lambda found: found.row)
        return Prepared(block, source.name, ready_table(traces), rejects, len(raw))

    def _rendered(self, prompts: list[dict[str, Any]]) -> list[Rendered | TraceError]:
        """Ids and borders of each row; of a bare prompt, those of a trace of which nothing is written."""
        if self.rows.existing:
            return self._batch.render([(p["messages"], p["thinking"], p["response"]) for p in prompts])
        found = self._batch.prompts([prompt["messages"] for prompt in prompts])
        return [ids if isinstance(ids, TraceError) else (ids, bare(len(ids))) for ids in found]

    def _ready(self, row: int, prompt: dict[str, Any], found: Rendered | TraceError) -> Ready:
        if isinstance(found, TraceError):
            raise found
        users = [turn["content"] for turn in prompt["messages"] if turn["role"] == "user"]
        trace = Ready(row, prompt["id"], prompt["label"], prompt["group"], *found, prompt=users[-1])
        if not self.rows.existing:
            if len(trace.ids) >= self.limit:
                raise TraceError(TOO_LONG, f"{len(trace.ids)} tokens of the prompt leave none of {self.limit}")
            return trace
        if not trace.spans.closed:
            raise TraceError(CLOSING_MISSING, "the thinking never ends")
        trace.thinking, trace.response = self._texts(prompt, *found)
        return fit(trace, self.limit, self.settings)

    def _texts(self, prompt: dict[str, Any], ids: list[int], spans: Spans) -> tuple[str, str]:
        """Thinking and response as they were given, without special tokens where they were given with some."""
        thinking, response = (prompt["thinking"] or "").strip(), (prompt["response"] or "").strip()
        if self._special.search(thinking) or self._special.search(response):
            return self._renderer.texts(ids, spans)
        return thinking, response

    def _judge(self, traces: list[Ready]) -> None:
        """Decide outcomes by rules; equal responses are judged once."""
        if self.rows.existing:
            outcomes = {text: judge(text, True).outcome for text in {str(trace.response) for trace in traces}}
            for trace in traces:
                trace.outcome = outcomes[str(trace.response)]


def _check_length(rows: PromptSet, record: dict[str, Any]) -> None:
    """Whether the texts that will be read are short enough to be looked at.

    Raises:
        TraceError: ``too_long``, or ``no_column``.
    """
    roles = ("thinking", "response", *_BESIDE) if rows.existing else _BESIDE
    columns = {prompt_column(rows, record, listing=False), *(rows.columns.get(role, role) for role in roles)}
    length = sum(_characters(record.get(column)) for column in columns)
    if length > MOST_CHARACTERS:
        raise TraceError(TOO_LONG, f"{length} characters, of at most {MOST_CHARACTERS}")


def _characters(value: Any) -> int:
    """Length of a text, or of a conversation's texts."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list):
        return 0
    parts = (turn.get(key) for turn in value if isinstance(turn, dict) for key in ("role", "content"))
    return sum(len(part) for part in parts if isinstance(part, str))


def fit(trace: Ready, limit: int, settings: ScoreConfig) -> Ready:
    """A trace of at most ``limit`` tokens before its response: as it is, or without the middle of its thinking.

    The response does not count, since nothing in it is scored.

    Raises:
        TraceError: ``too_long``.
    """
    length = trace.spans.response_start
    if length <= limit:
        return trace
    found = without_middle(trace.ids, trace.spans, length - limit) if settings.too_long == "cut" else None
    if found is None:
        what = "" if settings.too_long == "reject" else ", and too little of them is thinking to be cut"
        raise TraceError(TOO_LONG, f"{length} tokens before the response, of at most {limit}{what}")
    trace.ids, trace.spans, _ = found
    trace.cut_tokens = length - limit
    return trace


def check_columns(raw: Sequence[RawRow], rows: PromptSet, field: str = "--columns") -> None:
    """Look whether the first rows of a corpus have the columns that its rows need.

    A column that no row has is a wrong call, not a reject of each row; one that some rows lack is their reject.

    Args:
        raw: The first rows.
        rows: Columns of the corpus, and whether rows hold traces.
        field: What the error line calls the choice of columns.

    Raises:
        InputError: A column is missing; lists those there are. Rows that could not be read tell nothing.
    """
    records = [item.record for item in raw if item.record is not None]
    there = sorted({str(name) for record in records for name in record})
    if not records:
        return

    def missing(role: str, column: str) -> InputError:
        remedy = f"name the column that holds the {role}" if column not in rows.columns.values() else "mend its name"
        listed = writable(", ".join(there)) or "none"
        return InputError(field, f"{role}={column}", f"no such column; there are: {listed}", remedy)

    for role, column in rows.columns.items():
        if column not in there:
            raise missing(role, column)
    held = [(record, column) for record in records if (column := _request(rows, record))]
    if not held:
        raise missing("prompt", "prompt")
    response = rows.columns.get("response", "response")
    if rows.existing and response not in there and not any(_answered(record[column]) for record, column in held):
        raise missing("response", response)


def _request(rows: PromptSet, record: dict[str, Any]) -> str:
    try:
        return prompt_column(rows, record)
    except TraceError:
        return ""


def _answered(messages: Any) -> bool:
    """Whether a conversation ends with the assistant's turn."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"
