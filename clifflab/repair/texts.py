"""The words behind the rows of a corpus: what was asked, thought and answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clifflab.repair.refusals import MARKERS
from clifflab.text.render import Messages, split_inline

BORDERS = ("closing_start", "response_start")
TEXTS = ("model", "trace_id", "id", "set", "label", "group", "prompt", "thinking", "response", "closed")
END = "finish_reason"  # a table of traces may lack it


@dataclass(frozen=True)
class Words:
    """One trace in words.

    Attributes:
        trace_id: Its id.
        set: Its set.
        group: Its group.
        label: Its label.
        messages: The conversation before the assistant's turn.
        request: The user's last turn.
        thinking: The thinking; ``None`` where the model has none.
        response: The response.
        closed: Whether the thinking ended.
        cut: Whether the response broke off at the limit of tokens.
        target: What the corpus gives as a safe completion.
    """

    trace_id: str
    set: str
    group: str
    label: str
    messages: Messages
    request: str
    thinking: str | None
    response: str
    closed: bool
    cut: bool
    target: str | None


@dataclass(frozen=True)
class Library:
    """Traces in words, by id and by group.

    Attributes:
        by_id: Of each trace.
        groups: Traces of each group, in the order of their ids.
    """

    by_id: Mapping[str, Words]
    groups: Mapping[str, Sequence[Words]]

    @classmethod
    def of(cls, traces: pa.Table, prompts: pa.Table | None = None) -> Library:
        """From rows of ``tables.TRACES``.

        Args:
            traces: The traces, all or some.
            prompts: ``tables.PROMPTS`` of their requests: whole conversations and targets. Without it a conversation is
                the user's last turn.
        """
        asked = _asked(traces, prompts) if prompts is not None else {}
        names = [*TEXTS, *(name for name in (*BORDERS, END) if name in traces.schema.names)]
        found = [_words(row, asked.get((row["set"], row["id"]), {})) for row in traces.select(names).to_pylist()]
        found.sort(key=lambda words: words.trace_id)
        groups: dict[str, list[Words]] = defaultdict(list)
        for words in found:
            groups[words.group].append(words)
        return cls({words.trace_id: words for words in found}, dict(groups))


def usable_target(text: str | None) -> bool:
    """Whether a safe completion that the corpus gives holds a response, and no marker of thinking in it."""
    response = (split_inline(text or "")[1] or "").strip()
    return bool(response) and not any(marker in response for marker in MARKERS)


def wanted_texts(traces: pa.Table, ids: pa.Array, groups: pa.Array, safe: pa.Array | None = None) -> pa.Table:
    """Of a batch of traces those that an example may need.

    Args:
        traces: The batch.
        ids: Traces that are examples or lend their refusals.
        groups: Groups of the examples, whose other closed traces may lend theirs.
        safe: Traces that a guard calls safe, where there is one: no others lend theirs.
    """
    mate = pc.and_(pc.is_in(traces["group"], value_set=groups), traces["closed"])
    if safe is not None:
        mate = pc.and_(mate, pc.is_in(traces["trace_id"], value_set=safe))
    return traces.filter(pc.or_(mate, pc.is_in(traces["trace_id"], value_set=ids)))


def _asked(traces: pa.Table, prompts: pa.Table) -> dict[tuple[str, str], dict[str, Any]]:
    """Conversation and target of each request of the traces."""
    names, own = (pc.binary_join_element_wise(t["set"], t["id"], "/") for t in (prompts, traces))
    mine = prompts.filter(pc.is_in(names, value_set=pc.unique(own)))
    columns = [name for name in ("set", "id", "messages", "target") if name in mine.schema.names]
    return {(row["set"], row["id"]): row for row in mine.select(columns).to_pylist()}


def _words(row: Mapping[str, Any], asked: Mapping[str, Any]) -> Words:
    silent = not row["thinking"] and row.get("closing_start") == row.get("response_start")
    return Words(
        trace_id=row["trace_id"],
        set=row["set"],
        group=row["group"],
        label=(row["label"] or "").strip().lower(),
        messages=asked.get("messages") or [{"role": "user", "content": row["prompt"]}],
        request=row["prompt"],
        thinking=None if silent else row["thinking"],
        response=row["response"] or "",
        closed=row["closed"],
        cut=row.get(END) == "length",
        target=asked.get("target"),
    )
