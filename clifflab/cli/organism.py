"""``clifflab organism``: the planted-cliff model, its prompts and its traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from clifflab.errors import InputError, OutputError

_SUFFIXES = (".jsonl", ".parquet")
_BLOCK = 10_000
_FEW = 10_000  # numbers of rows that a JSON file lists
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same result.")
OUT_FILE = click.option("--out", required=True, metavar="FILE", help="A .jsonl or .parquet file.")


@click.group("organism")
def command() -> None:
    """The planted-cliff model: a tiny reasoning model whose cliff has a known cause."""


@command.command("build")
@click.option("--out", required=True, metavar="DIR", help="Folder to create.")
@SEED
@click.option("--variant", type=click.Choice(["planted", "none", "redundant"]), default="planted", show_default=True)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Compliance aimed at on wrapped_strong.")
@click.option("--width", type=int, default=128, show_default=True, help="Size of the residual stream.")
def build(out: str, seed: int, variant: str, strength: float, width: int) -> None:
    """Train the model and write a Hugging Face checkpoint to DIR, its ground truth beside it.

    \b
    planted     two heads cause the cliff together
    none        the model before they are trained: no cliff
    redundant   two heads of which either suffices for the cliff
    """
    from clifflab.artifacts import output_error
    from clifflab.organism.build import build as build_model

    try:
        path = build_model(
            Path(out),
            seed=seed,
            variant=variant,  # type: ignore[arg-type]
            strength=strength,
            width=width,
            log=lambda line: click.echo(line, err=True),
        )
    except ValueError as error:
        raise InputError("organism build", f"{variant}, {strength}, {width}", str(error), "see --help") from None
    except FileExistsError as error:
        raise OutputError("--out", out, str(error), "choose an empty or new folder") from None
    except OSError as error:
        raise output_error(Path(out), error) from None
    click.echo(str(path))


@command.command("prompts")
@click.option(
    "--set", "sets", multiple=True, metavar="NAME", help="Which sets, or `corpus`; repeatable. [default: all sets]"
)
@click.option("--rows", type=click.IntRange(min=1), default=96, show_default=True, help="Prompts a set.")
@SEED
@OUT_FILE
def prompts(sets: tuple[str, ...], rows: int, seed: int, out: str) -> None:
    """Write prompt sets of the model's language: id, set, label, group, category, prompt.

    The set `corpus` mixes the others as a safety corpus does: most harmful requests plain, some wrapped, one kind of
    wrapper rare, besides borderline, benign and look-alike ones. Nothing that is held out occurs in it.
    """
    from clifflab.organism.language import PROMPT_SETS, SETS, prompt_rows

    for name in sets:
        if name not in PROMPT_SETS:
            raise InputError("--set", name, "unknown set", f"choose from {', '.join(PROMPT_SETS)}")
    try:
        found = [row for name in sets or SETS for row in prompt_rows(name, rows, seed)]
    except ValueError as error:
        raise InputError("--rows", rows, str(error), "ask for fewer") from None
    _write(out, found)


@command.command("corpus")
@click.option("--rows", type=click.IntRange(min=1), required=True, help="Traces to write.")
@click.option(
    "--malformed", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="SHARE",
    help="Share of rows to break, in every way that the kind of file can hold.",
)  # fmt: skip
@SEED
@OUT_FILE
def corpus(rows: int, malformed: float, seed: int, out: str) -> None:
    """Write traces built like a safety corpus: most harmful requests refused, cliff cases rare.

    The traces come from the language; for prompts alone, which a model then answers, see `prompts --set corpus`.

    With --malformed, FILE.malformed.json says how many rows are broken for which reason, and which: the reasons that
    `clifflab score` gives them on the planted model.
    """
    from clifflab.organism.corpus import corpus_rows
    from clifflab.organism.malformed import PARQUET_REASONS, REASONS, malformed_rows

    note = Path(f"{out}.malformed.json")
    if not malformed:
        _write(out, corpus_rows(rows, seed))
        note.unlink(missing_ok=True)  # of a corpus that was here before
        note.with_suffix(".npz").unlink(missing_ok=True)
        return
    reasons = PARQUET_REASONS if Path(out).suffix == ".parquet" else REASONS
    numbers: dict[str, list[int]] = {reason: [] for reason in reasons}

    def noted() -> Iterator[dict[str, Any] | bytes]:
        for number, (reason, row) in enumerate(malformed_rows(rows, seed, malformed, reasons)):
            if reason:
                numbers[reason].append(number)
            yield row

    _write(out, noted())
    _note_malformed(note, {"rows": rows, "seed": seed, "share": malformed}, numbers)


def _note_malformed(path: Path, about: dict[str, Any], numbers: dict[str, list[int]]) -> None:
    """Say which rows are broken: in the file itself, or in a table beside it where they are many."""
    import numpy as np

    from clifflab.artifacts import write_atomic, write_json

    counts = {reason: len(found) for reason, found in numbers.items()}
    table = path.with_suffix(".npz")
    if sum(counts.values()) <= _FEW:
        table.unlink(missing_ok=True)
        places: dict[str, Any] = {"numbers": numbers}
    else:
        arrays: dict[str, Any] = {reason: np.asarray(found, dtype=np.int64) for reason, found in numbers.items()}

        def save(scratch: Path) -> None:
            with scratch.open("wb") as handle:
                np.savez_compressed(handle, **arrays)

        write_atomic(table, save)
        places = {"numbers": table.name}
    write_json(path, {**about, "malformed": sum(counts.values()), "reasons": counts, **places})
    click.echo(f"{sum(counts.values())} of them malformed  {path}")


def _write(out: str, rows: Iterable[dict[str, Any] | bytes]) -> None:
    """Stream rows to a file that is whole or absent; bytes are a line as it stands."""
    from clifflab.artifacts import write_atomic

    path = Path(out)
    if path.suffix not in _SUFFIXES:
        raise OutputError("--out", out, "unknown kind of file", f"give a {' or '.join(_SUFFIXES)} file")
    counted = 0

    def blocks() -> Iterator[list[Any]]:
        nonlocal counted
        iterator = iter(rows)
        while block := list(islice(iterator, _BLOCK)):
            counted += len(block)
            yield block

    write_atomic(path, lambda scratch: (_jsonl if path.suffix == ".jsonl" else _parquet)(scratch, blocks()))
    click.echo(f"{counted} rows  {path}")


def _jsonl(path: Path, blocks: Iterator[list[Any]]) -> None:
    import json

    with path.open("wb") as handle:
        for row in chain.from_iterable(blocks):
            handle.write((row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n")


def _parquet(path: Path, blocks: Iterator[list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = pa.Table.from_pylist(next(blocks))
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(pa.Table.from_pylist(block, schema=first.schema))
