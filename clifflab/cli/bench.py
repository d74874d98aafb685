"""``clifflab bench``: how much faster, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

FC = TypeVar("FC", bound=Callable[..., Any])

JSON = click.option("--json", "json_file", metavar="FILE", help="Write the records as JSON.")


@click.group("bench")
def command() -> None:
    """Time the fast ways against the plain one, in one process, and check that their results are equal."""


_COLUMNS: dict[str, Callable[[Any], str]] = {
    "method": lambda record: record["method"],
    "seconds (median)": lambda record: f"{record['seconds_median']:.3f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']:,.0f}",
    "ratio to plain": lambda record: f"{record['ratio_to_plain']:.3g}",
    "largest difference": lambda record: f"{record['max_abs_diff']:.1e}",
    "peak memory": lambda record: f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB",
}
_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_METHODS = click.Choice(["closing", "all", "direct", "attribution"])
_MODEL = "A checkpoint, or geometry:NAME for the sizes of smollm2-135m, qwen2.5-7b or tiny with random weights."
_WAYS = "Which ways beside plain; repeatable. [default: closing, direct, attribution]"


def _number(name: str, default: int, text: str) -> Callable[[FC], FC]:
    return click.option(name, type=click.IntRange(min=1), default=default, show_default=True, help=text)


@command.command("sweep")
@click.option("--model", default="geometry:smollm2-135m", show_default=True, metavar="MODEL", help=_MODEL)
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="Of the weights.")
@_number("--traces", 8, "Traces of a run.")
@_number("--tokens", 256, "Tokens of a trace before its closing tokens.")
@_number("--closing", 4, "Closing tokens of a trace.")
@_number("--plain-heads", 3, "Heads of the plain sweep.")
@_number("--repeats", 5, "Interleaved timed rounds.")
@click.option("--method", "methods", multiple=True, type=_METHODS, help=_WAYS)
@click.option("--threads", type=click.IntRange(min=1), help="Threads on a CPU. [default: all cores]")
@JSON
def sweep(json_file: str | None, methods: tuple[str, ...], threads: int | None, **settings: Any) -> None:
    """Sweep all heads in every fast way, and a few heads in the plain one as published: a full pass a head.

    Direct effects are compared with the probe's logit (they must add up to it), the first-order estimate with
    gradients through whole sequences, the exact sweeps with the plain one. Seconds of the plain way count for all
    heads in proportion. "all" (every position) runs for many minutes on a CPU.
    """
    import torch

    from clifflab.bench.sweep import SweepBench, bench_sweep

    if threads:
        torch.set_num_threads(threads)
    chosen = methods or ("closing", "direct", "attribution")
    records = bench_sweep(SweepBench(methods=chosen, **settings), lambda line: click.echo(line, err=True))
    _show([record.as_dict() for record in records], json_file)


@command.command("select")
@_number("--rows", 1_000_000, "Rows of the score table.")
@_number("--files", 10, "Files that it comes in.")
@_number("--repeats", 3, "Interleaved timed rounds.")
@JSON
def select(json_file: str | None, **settings: Any) -> None:
    """Choose 1.7% of a random score table: the streaming top-k against a sort of the whole table.

    Both read the same Parquet files in this process; the same traces in the same order are asserted.
    """
    from clifflab.bench.select import SelectBench, bench_select

    records = bench_select(SelectBench(**settings), lambda line: click.echo(line, err=True))
    first = records[0]
    columns = {
        "method": lambda record: record["method"],
        "seconds (median)": lambda record: f"{record['seconds_median']:.3f}",
        "rows/s": lambda record: f"{record['rows_per_second']:,.0f}",
        "ratio to plain": lambda record: f"{record['ratio_to_plain']:.2f}",
        "peak memory": lambda record: f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    title = f"bench select: {first.chosen:,} of {first.rows:,} rows, the same in the same order"
    _print([record.as_dict() for record in records], json_file, title, columns)


_TUNED = "organism:planted, or geometry:NAME for the sizes of smollm2-135m, qwen2.5-7b or tiny with random weights."


@command.command("tune")
@click.option("--model", default="geometry:smollm2-135m", show_default=True, metavar="MODEL", help=_TUNED)
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="Of the weights.")
@_number("--examples", 16, "Examples of a run.")
@_number("--tokens", 256, "Tokens of the longest example.")
@_number("--batch-size", 4, "Examples of an optimizer step.")
@_number("--repeats", 5, "Interleaved timed rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads on a CPU. [default: all cores]")
@JSON
def tune(json_file: str | None, threads: int | None, **settings: Any) -> None:
    """Train a LoRA adapter with clifflab's loop, and with a plain loop of PEFT and PyTorch over the same batches.

    The loss of every step must be equal. Tokens count prompts and no padding.
    """
    import torch

    from clifflab.bench.tune import TuneBench, bench_tune

    if threads:
        torch.set_num_threads(threads)
    records = bench_tune(TuneBench(**settings), lambda line: click.echo(line, err=True))
    _show([record.as_dict() for record in records], json_file)


_SCORED = (
    "A checkpoint, organism:planted, or geometry:NAME; repeatable. [default: geometry:smollm2-135m, organism:planted]"
)


@command.command("score")
@click.option("--model", "models", multiple=True, metavar="MODEL", help=_SCORED)
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="Of the weights.")
@click.option(
    "--traces", type=click.IntRange(min=1), help="Traces of a run. [default: 384 of the practice corpus, else 16]"
)
@_number("--shortest", 64, "Tokens of the shortest trace of random tokens.")
@_number("--longest", 1024, "Tokens of the longest.")
@click.option("--layer", type=click.IntRange(min=0), help="Probed layer. [default: as deep as layer 22 of 30]")
@click.option("--token-budget", type=click.IntRange(min=1), help="Tokens of one pass of the kernel.")
@_number("--repeats", 5, "Interleaved timed rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads on a CPU. [default: all cores]")
@JSON
def score(json_file: str | None, models: tuple[str, ...], threads: int | None, **settings: Any) -> None:
    """Score traces of mixed lengths with the kernel, as published (plain), and only run the model over them (limit).

    Plain is one trace at a time with all hidden states and logits. The limit is a bare forward pass to the probed layer
    over rows of one length, in the batch shape that is fastest here. The kernel's scores must be equal to plain's.
    """
    import torch

    from clifflab.bench.score import MODELS, ScoreBench, bench_score

    if threads:
        torch.set_num_threads(threads)
    bench = ScoreBench(models=models or MODELS, **settings)
    records = [record.as_dict() for record in bench_score(bench, lambda line: click.echo(line, err=True))]
    columns = {
        **_COLUMNS,
        "ratio to limit": lambda record: f"{record['ratio_to_limit']:.3g}",
        "padding": lambda record: f"{record['padding_share']:.1%}",
    }
    for model in dict.fromkeys(record["model"] for record in records):
        mine = [record for record in records if record["model"] == model]
        first = mine[0]
        title = f"bench score: {model}, {first['dtype']}, {first['traces']} traces, layer {first['layer']}"
        _print(records, json_file, title, columns, mine)


def _show(records: list[dict[str, Any]], json_file: str | None) -> None:
    first = records[0]
    title = f"bench {first['bench']}: {first['model']}, {first['dtype']}, {first['tokens']} tokens a trace"
    _print(records, json_file, title, _COLUMNS)


def _print(
    records: list[dict[str, Any]], json_file: str | None, title: str, columns: dict[str, Callable[[Any], str]],
    shown: list[dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Print a table of the records (or of those shown); write the file first, so that a closed pipe loses nothing."""
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from clifflab.artifacts import output_error, write_json

    if json_file:
        try:
            write_json(Path(json_file), records)
        except OSError as error:
            raise output_error(Path(json_file), error) from None
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    for record in shown or records:
        table.add_row(*(show(record) for show in columns.values()))
    Console().print(table)
