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
@SEED
@OUT_FILE
def corpus(rows: int, seed: int, out: str) -> None:
    """Write traces built like a safety corpus: most harmful requests refused, cliff cases rare.

    The traces come from the language; for prompts alone, which a model then answers, see `prompts --set corpus`.
    """
    from clifflab.organism.corpus import corpus_rows

    _write(out, corpus_rows(rows, seed))


def _write(out: str, rows: Iterable[dict[str, Any]]) -> None:
    """Stream rows to a file that is whole or absent."""
    from clifflab.artifacts import write_atomic

    path = Path(out)
    if path.suffix not in _SUFFIXES:
        raise OutputError("--out", out, "unknown kind of file", f"give a {' or '.join(_SUFFIXES)} file")
    counted = 0

    def blocks() -> Iterator[list[dict[str, Any]]]:
        nonlocal counted
        iterator = iter(rows)
        while block := list(islice(iterator, _BLOCK)):
            counted += len(block)
            yield block

    write_atomic(path, lambda scratch: (_jsonl if path.suffix == ".jsonl" else _parquet)(scratch, blocks()))
    click.echo(f"{counted} rows  {path}")


def _jsonl(path: Path, blocks: Iterator[list[dict[str, Any]]]) -> None:
    import json

    with path.open("w", encoding="utf-8") as handle:
        for row in chain.from_iterable(blocks):
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _parquet(path: Path, blocks: Iterator[list[dict[str, Any]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = pa.Table.from_pylist(next(blocks))
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(pa.Table.from_pylist(block, schema=first.schema))
