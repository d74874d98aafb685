"""Prepared blocks, receipts and errors as plain columns of a Ray Dataset: bytes of Arrow and JSON, nothing pickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from clifflab import errors, tables
from clifflab.errors import ClifflabError, UserError
from clifflab.scoring.commit import CountsError, Receipt
from clifflab.scoring.types import Block, Prepared, Reject

_PLAIN = (errors.InterventionError, errors.WorkerError, CountsError, ClifflabError)
_USER = (errors.ConfigError, errors.InputError, errors.OutputError)


def pack(prepared: Prepared) -> dict[str, Any]:
    """A prepared block as a row."""
    rejects = [asdict(reject) for reject in prepared.rejects]
    about = {"block": asdict(prepared.block), "source": prepared.source, "read": prepared.read, "rejects": rejects}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables.READY) as writer:
        writer.write_table(prepared.table)
    return {"about": json.dumps(about), "ready": sink.getvalue().to_pybytes(), "error": ""}


def unpack(row: dict[str, Any]) -> Prepared:
    """The block of a row.

    Raises:
        ClifflabError: What was met where the row was made.
    """
    raise_error(row["error"])
    about = json.loads(row["about"])
    with pa.ipc.open_stream(pa.py_buffer(row["ready"])) as reader:
        table = reader.read_all()
    rejects = [Reject(**reject) for reject in about["rejects"]]
    return Prepared(Block(**about["block"]), about["source"], table, rejects, about["read"])


def failed(error: ClifflabError) -> dict[str, Any]:
    """An error as a row in the place of a prepared block."""
    return {"about": "", "ready": b"", "error": _error(error)}


def receipt_row(receipt: Receipt) -> dict[str, Any]:
    """A receipt as a row."""
    return {"receipt": json.dumps(receipt), "error": ""}


def failed_receipt(error: ClifflabError) -> dict[str, Any]:
    """An error as a row in the place of a receipt."""
    return {"receipt": "", "error": _error(error)}


def receipt_of(row: dict[str, Any]) -> Receipt:
    """The receipt of a row.

    Raises:
        ClifflabError: What was met where the row was made.
    """
    raise_error(row["error"])
    found: Receipt = json.loads(row["receipt"])
    return found


def raise_error(text: str) -> None:
    """Raise the error that a row carries, if it carries one."""
    if not text:
        return
    about = json.loads(text)
    for kind in _USER:
        if kind.__name__ == about["kind"]:
            raise kind(*about["parts"])
    for plain in _PLAIN:
        if plain.__name__ == about["kind"]:
            raise plain(about["text"])
    raise ClifflabError(about["text"])


def _error(error: ClifflabError) -> str:
    parts = []
    if isinstance(error, UserError):
        parts = [error.field, str(error.value), error.problem, error.remedy]
    return json.dumps({"kind": type(error).__name__, "parts": parts, "text": str(error)})
