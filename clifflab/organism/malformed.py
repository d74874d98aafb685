"""Rows of the practice corpus that are broken, each in a known way.

Real corpora hold rows that cannot be scored. Here a stated share of rows is broken on purpose, spread evenly over the
ways, so that what ``clifflab score`` rejects can be compared with what was planted, row by row. The reasons are those
that scoring gives with its default settings on the planted model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from clifflab.organism.corpus import corpus_row

# Reasons, and which of them a Parquet file can hold: its columns have a type and its rows are records.
PARQUET_REASONS = ("null", "empty", "too_long", "closing_missing", "duplicate_id")
REASONS = (*PARQUET_REASONS, "not_text", "undecodable", "wrong_type")
_NO_OWN_ID = ("duplicate_id", "undecodable", "wrong_type")
LONG_WORDS = 640  # of thinking: beyond the planted model's context of 512 tokens, whatever the prompt

Row = dict[str, Any] | bytes


def malformed_rows(rows: int, seed: int, share: float, reasons: tuple[str, ...] = REASONS) -> Iterator[tuple[str, Row]]:
    """Stream the first ``rows`` rows of a corpus of which a share is broken.

    Args:
        rows: How many.
        seed: Seed of the corpus and of what is broken; rows that are whole are those of the same corpus without.
        share: Share of rows to break, 0 to 1; each row by its own lot.
        reasons: The ways.

    Yields:
        The reason (empty for a whole row) and the row: a record, or the bytes of a line that holds none.
    """
    for index in range(rows):
        reason = reason_of(index, seed, share, reasons)
        yield reason, (malformed_row(index, seed, share, reasons) if reason else corpus_row(index, seed))


def reason_of(index: int, seed: int, share: float, reasons: tuple[str, ...] = REASONS) -> str:
    """Why row ``index`` will be rejected, or nothing; depends on the arguments alone."""
    drawn = _drawn(index, seed, share, reasons)
    if drawn == "duplicate_id" and _earlier(index, seed, share, reasons) is None:
        return "null"  # at the very start there is no id to repeat
    return drawn


def malformed_row(index: int, seed: int, share: float, reasons: tuple[str, ...] = REASONS) -> Row:
    """Row ``index``, broken for its reason (:func:`reason_of`)."""
    rng = random.Random(f"malformed row/{seed}/{index}")
    row: dict[str, Any] = dict(corpus_row(index, seed))
    match reason_of(index, seed, share, reasons):
        case "null":
            row[rng.choice(("prompt", "response"))] = None
        case "not_text":
            column = rng.choice(("prompt", "thinking", "response"))
            row[column] = rng.choice((index, 0.5, True, {"text": row[column]}))
        case "empty":
            row["prompt"] = rng.choice(("", " ", "\n\t "))
        case "too_long":
            words = row["thinking"].split()
            row["thinking"] = " ".join(words * (LONG_WORDS // len(words) + 1))
        case "closing_missing":
            row["response"], row["thinking"] = rng.choice((row["response"], f"<think>\n{row['thinking']}")), None
        case "duplicate_id":
            earlier = _earlier(index, seed, share, reasons)
            assert earlier is not None
            row["id"] = corpus_row(earlier, seed)["id"]
        case "undecodable":
            return _undecodable(row, rng)
        case _:
            return json.dumps(rng.choice((list(row.values()), row["prompt"], index, None))).encode()
    return row


def _undecodable(row: dict[str, Any], rng: random.Random) -> Row:
    line = json.dumps(row, ensure_ascii=False).encode()
    match rng.randrange(3):
        case 0:  # cut short
            return line[: rng.randrange(1, len(line))]
        case 1:  # bytes that are no UTF-8
            place = rng.randrange(1, len(line) - 1)
            return line[:place] + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80")) + line[place:]
        case _:  # half of a surrogate pair: JSON, and no text
            return json.dumps({**row, "prompt": row["prompt"] + "\ud83d"}).encode()


def _drawn(index: int, seed: int, share: float, reasons: tuple[str, ...]) -> str:
    rng = random.Random(f"malformed/{seed}/{index}")
    return rng.choice(reasons) if rng.random() < share else ""


def _earlier(index: int, seed: int, share: float, reasons: tuple[str, ...]) -> int | None:
    """An earlier row that keeps its own id, if there is one."""
    start = random.Random(f"malformed earlier/{seed}/{index}").randrange(index) if index else -1
    for place in range(start, -1, -1):
        if _drawn(place, seed, share, reasons) not in _NO_OWN_ID:
            return place
    return None
