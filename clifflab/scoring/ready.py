"""The table of traces that are ready to be scored, and what is read from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clifflab import tables
from clifflab.text.spans import Spans

_BORDERS = ("prefix_end", "thinking_start", "closing_start", "response_start")


@dataclass
class Ready:
    """One trace: a row of ``tables.READY``; ``prompt``, ``thinking`` and ``response`` only where they are kept."""

    row: int
    id: str
    label: str
    group: str
    ids: list[int]
    spans: Spans
    outcome: str = ""
    cut_tokens: int = 0
    prompt: str | None = None
    thinking: str | None = None
    response: str | None = None
    finish_reason: str = "stop"


def ready_table(traces: Sequence[Ready]) -> pa.Table:
    """Traces as ``tables.READY``, in their order."""
    lengths = np.fromiter((len(trace.ids) for trace in traces), np.int64, len(traces))
    tokens = np.fromiter(chain.from_iterable(trace.ids for trace in traces), np.int32, int(lengths.sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = {
        "token_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
        **{name: [getattr(trace.spans, name) for trace in traces] for name in _BORDERS},
    }
    for name in tables.READY.names:
        if name not in columns:
            columns[name] = [getattr(trace, name) for trace in traces]
    return pa.table({name: columns[name] for name in tables.READY.names}, schema=tables.READY)


def bare_prompts(ready: pa.Table) -> list[Ready]:
    """The rows of a table of ``tables.READY`` in which nothing is written yet."""
    others = [field.name for field in dataclasses.fields(Ready) if field.name not in ("ids", "spans")]
    rows = ready.select([*others, "token_ids"]).to_pylist()
    found = []
    for row in rows:
        ids = row.pop("token_ids")
        found.append(Ready(ids=ids, spans=bare(len(ids)), **row))
    return found


def bare(length: int) -> Spans:
    """Borders of a chat prefix behind which nothing is written."""
    return Spans(length, length, length, length, length, closed=False)


def spans_of_ready(ready: pa.Table) -> list[Spans]:
    """Borders of each trace of a table of ``tables.READY``."""
    lengths = pc.list_value_length(ready["token_ids"]).to_pylist()
    borders = zip(*(ready[name].to_pylist() for name in _BORDERS), lengths, strict=True)
    return [Spans(a, b, c, d, end, closed=True) for a, b, c, d, end in borders]


def traces_table(ready: pa.Table, model: str, set_name: str, *, generated: bool = False) -> pa.Table:
    """The same traces as ``tables.TRACES``.

    Args:
        ready: ``tables.READY``, prepared with ``keep_traces``.
        model: Name of the model.
        set_name: Name of the set.
        generated: Whether the model wrote them.
    """
    rows = ready.num_rows
    ids = ready["id"].to_pylist()
    known = {
        "model": [model] * rows,
        "trace_id": [trace_id(set_name, name) for name in ids],
        "sample": [0] * rows,
        "set": [set_name] * rows,
        "closed": [True] * rows,
        "source": ["generated" if generated else "existing"] * rows,
    }
    columns = {name: known[name] if name in known else ready[name] for name in tables.TRACES.names}
    return pa.table(columns, schema=tables.TRACES)


def trace_id(set_name: str, name: str) -> str:
    """Id of the one trace of a row."""
    return f"{set_name}/{name}#0"
