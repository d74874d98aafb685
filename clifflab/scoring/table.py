"""Scored traces as rows of ``tables.SCORED``, column by column."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clifflab import tables
from clifflab.scoring.measures import COLUMNS, Found, ranges
from clifflab.scoring.probes import ProbeSet
from clifflab.stages.base import CORPUS
from clifflab.text.spans import Spans


def inputs_of(ready: pa.Table) -> tuple[list[npt.NDArray[np.int32]], list[Spans]]:
    """Token ids (views, no copies) and token borders of the rows of ``tables.READY``."""
    ready = ready.combine_chunks()
    lists: Any = ready["token_ids"].chunk(0) if ready["token_ids"].num_chunks else pa.array([], pa.list_(pa.int32()))
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    ids = [values[start:stop] for start, stop in pairwise(offsets)]
    names = ("prefix_end", "thinking_start", "closing_start", "response_start")
    rows: Any = zip(*(ready[name].to_pylist() for name in names), ids, strict=True)
    spans = [
        Spans(prefix, thinking, closing, response, end=len(own), closed=True)
        for prefix, thinking, closing, response, own in rows
    ]
    return ids, spans


def scored_table(ready: pa.Table, found: Found, probes: ProbeSet, model: str, set_name: str) -> pa.Table:
    """Rows of the traces that were scored, one for each probe, in the order of the traces and then of the probes.

    Args:
        ready: ``tables.READY``, N rows.
        found: What was read of them.
        probes: The probes, Q of them.
        model: The model's name.
        set_name: Name of the corpus.

    Returns:
        ``tables.SCORED``; traces with a problem have no row.
    """
    kept = np.flatnonzero([not problem for problem in found.problem])
    count, many = len(kept), len(probes)
    total = count * many
    rows = pa.array(np.repeat(kept, many))
    of_rows = {name: ready[name].take(rows) for name in ("row", "id", "label", "group", "outcome", "cut_tokens")}
    starts, closings, ends = (
        ready[name].to_numpy()[kept] for name in ("thinking_start", "closing_start", "response_start")
    )
    values = found.measures[kept].reshape(total, len(COLUMNS))
    of_probes = {
        name: pa.array([getattr(probe, name) for probe in probes.probes] * count, tables.SCORED.field(name).type)
        for name in ("train_positions", "estimator", "layer", "reported")
    }
    joined = pc.binary_join_element_wise(f"{set_name}/", of_rows["id"], "#0", "")
    columns: dict[str, Any] = {
        **of_rows,
        **of_probes,
        "probe": pa.array([probe.name for probe in probes.probes] * count, pa.string()),
        "model": pa.repeat(pa.scalar(model, pa.string()), total),
        "trace_id": joined,
        "sample": pa.repeat(pa.scalar(0, pa.int32()), total),
        "set": pa.repeat(pa.scalar(set_name, pa.string()), total),
        "cluster": of_rows["group"],
        "split": pa.repeat(pa.scalar(CORPUS, pa.string()), total),
        "thinking_tokens": np.repeat(closings - starts, many),
        "closing_tokens": np.repeat(ends - closings, many),
        **{name: _nulls(values[:, place]) for place, name in enumerate(COLUMNS)},
        "closing_drops": _lists(found, found.drops, kept),
        "closing_drops_logit": _lists(found, found.drops_logit, kept),
    }
    return pa.table({name: columns[name] for name in tables.SCORED.names}, schema=tables.SCORED)


def _nulls(values: npt.NDArray[np.float32]) -> pa.Array:
    return pa.array(values, pa.float32(), mask=~np.isfinite(values))


def _lists(found: Found, drops_CQ: npt.NDArray[np.float32], kept: npt.NDArray[np.int64]) -> pa.Array:
    """The drops of each kept trace and probe as a list."""
    many = drops_CQ.shape[1]
    firsts = np.cumsum(found.closing) - found.closing
    counts = np.repeat(found.closing[kept], many)
    tokens = ranges(np.repeat(firsts[kept], many), counts)
    probe = np.repeat(np.tile(np.arange(many), len(kept)), counts)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, _nulls(drops_CQ[tokens, probe]))
