"""What stands in tables beside the scores: a guard's verdicts, targets and categories of the requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clifflab.repair.reading import Reader
from clifflab.repair.stream import names_of
from clifflab.repair.texts import usable_target

CATEGORY = "category"


def verdicts_in(files: Sequence[str], read: Reader) -> pa.Table | None:
    """The guard's verdicts by trace; their texts are few, and kept once."""

    def coded(guard: pa.Table) -> pa.Table:
        return guard.set_column(1, "verdict", guard["verdict"].dictionary_encode())

    parts = list(read(files, ["trace_id", "verdict"], lambda guard: coded(guard.select(["trace_id", "verdict"]))))
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks() if parts else None


def safe_in(verdicts: pa.Table | None) -> pa.Array | None:
    """Ids of the traces that the guard calls safe."""
    if verdicts is None:
        return None
    return flat(verdicts.filter(pc.equal(verdicts["verdict"].cast(pa.string()), "safe"))["trace_id"])


def with_target(files: Sequence[str], read: Reader) -> pa.Array:
    """Names of the requests with a usable target."""

    def named(prompts: pa.Table) -> pa.Array:
        if "target" not in prompts.schema.names:
            return pa.array([], pa.string())
        usable = pa.array([usable_target(text) for text in prompts["target"].to_pylist()], pa.bool_())
        return flat(names_of(prompts.filter(usable)))

    return pa.concat_arrays([pa.array([], pa.string()), *read(files, ["set", "id", "target"], named)])


def flat(column: Any) -> Any:
    """A column in one piece."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def categories_in(files: Sequence[str], read: Reader) -> pa.Table:
    """Category of every request."""

    def named(prompts: pa.Table) -> pa.Table:
        return pa.table({"name": names_of(prompts), CATEGORY: prompts[CATEGORY]})

    return pa.concat_tables(read(files, ["set", "id", CATEGORY], named)).combine_chunks()
