"""What the parts of scoring hand each other.

A *source* is one file (or saved dataset) of the input. A *block* is a run of its rows: the unit that is read, prepared,
scored, written and committed. Blocks depend on the input and the settings alone, never on workers, so that a block done
twice gives the same bytes twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Reasons for a reject beside those of clifflab.data.prompts (undecodable, null, not_text, empty, not_messages, ...).
WRONG_TYPE, DUPLICATE_ID, TOO_LONG, CLOSING_MISSING, NOT_FINITE = (
    "wrong_type",
    "duplicate_id",
    "too_long",
    "closing_missing",
    "not_finite",
)


@dataclass(frozen=True)
class Source:
    """One file of the input.

    Attributes:
        path: Absolute where it is local, with its scheme where it is not, or ``hf:NAME[:SPLIT]``.
        name: Short name that ids and messages use: the path below the input's fixed part.
        kind: ``parquet``, ``jsonl``, ``csv``, ``saved`` (a folder of a Hugging Face dataset) or ``hub``.
        compression: ``""``, ``gz`` or ``zst``.
        size: Bytes.
        changed: When it was changed, as its filesystem says (text; empty where it does not); of a dataset its
            fingerprint or commit.
    """

    path: str
    name: str
    kind: str
    compression: str = ""
    size: int = 0
    changed: str = ""


@dataclass(frozen=True)
class Block:
    """Rows ``[start, stop)`` of a source.

    Attributes:
        number: Place among all blocks of the job, from 0.
        source: Place of its source in the input.
        start: First row within the source.
        stop: Row behind the last.
        base: Number of the source's first row in the whole input.
        offset: Where reading begins: a byte of a plain text file, a row group of a Parquet file, else 0.
        offset_row: The row that stands there.
    """

    number: int
    source: int
    start: int
    stop: int
    base: int
    offset: int
    offset_row: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


class RawRow(NamedTuple):
    """A row as it was read; a tuple, because a million of them are made.

    Attributes:
        row: Its number within the source.
        record: The record; ``None`` where there is none.
        reason: Why not: ``undecodable``, or ``wrong_type`` where the row is no record.
        detail: A sentence about it.
    """

    row: int
    record: dict[str, Any] | None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Reject:
    """A row that is not scored: columns of ``tables.SCORE_REJECTS``."""

    row: int
    source: str
    source_row: int
    id: str | None
    reason: str
    detail: str


@dataclass
class Prepared:
    """A block that is ready to be scored.

    Attributes:
        block: The block.
        source: Name of its source.
        table: ``tables.READY``: a row for each trace, in the order of the input.
        rejects: The other rows.
        read: How many rows were read: ``len(table) + len(rejects)``.
    """

    block: Block
    source: str
    table: Any
    rejects: list[Reject] = field(default_factory=list)
    read: int = 0
