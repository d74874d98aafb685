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


@command.command("scale")
@click.option("--probes", required=True, metavar="PATH", help="A model's folder in a study's results.")
@click.option("--model", default="organism:planted", show_default=True, metavar="MODEL", help="What scores.")
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of a corpus; repeatable. [default: 100000, 1000000]",
)
@click.option(
    "--malformed",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="SHARE",
    help="Share of rows that are spoilt.",
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="As of score. [default: one per GPU, or core]")
@click.option(
    "--object-store", type=click.IntRange(min=80), default=512, show_default=True, metavar="MB", help="As of score."
)
@click.option(
    "--work",
    default="runs/scale",
    show_default=True,
    metavar="DIR",
    help="Folder of the corpora, which are kept for the next time, and of the results.",
)
@click.option("--plot", metavar="FILE", help="Draw rows done and memory against time: .png, .svg or .pdf.")
@JSON
def scale(json_file: str | None, plot: str | None, rows: tuple[int, ...], work: str, **settings: Any) -> None:
    """Score practice corpora of growing size with clifflab score: do speed and memory hold?

    Every row must come out exactly once, and just the rows that were spoilt must be rejected, each for its reason; else
    the command fails. Memory is that of the command, of Ray and of its workers (proportional set size: pages that
    several processes share count once), looked at about twice a second.
    """
    from pathlib import Path

    from clifflab.bench.scale import ScaleBench, bench_scale
    from clifflab.bench.scale_plot import check_place, write_plot

    place = check_place(Path(plot)) if plot else None
    bench = ScaleBench(work=Path(work), rows=rows or (100_000, 1_000_000), **settings)
    records, courses = bench_scale(bench, lambda line: click.echo(line, err=True))
    if place:
        write_plot(courses, place)
    columns = {
        "rows": lambda record: f"{record['rows']:,}",
        "seconds": lambda record: f"{record['seconds']:,.1f}",
        "rows/s (ratio)": lambda record: _with_ratio(record["rows_per_second"], record["speed_ratio"]),
        "steady": lambda record: _with_ratio(record["steady_rows_per_second"], record["steady_speed_ratio"]),
        "driver + workers": lambda record: _mib(record["peak_driver_and_workers_bytes"], record["memory_ratio"]),
        "all processes": lambda record: _mib(record["peak_memory_bytes"], record["total_memory_ratio"]),
    }
    title = "bench scale: every row once, rejects as planted; peak memory in MiB"
    _print([record.as_dict() for record in records], json_file, title, columns)


def _with_ratio(value: float | None, ratio: float | None) -> str:
    """A figure, and its ratio to that of the first row."""
    if value is None:
        return "-"
    return f"{value:,.0f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _mib(size: int, ratio: float) -> str:
    return _with_ratio(size / 2**20, ratio)


_SCORED = (
    "A checkpoint, organism:planted, or geometry:NAME; repeatable. [default: geometry:smollm2-135m, organism:planted]"
)


@command.command("score")
@click.option("--model", "models", multiple=True, metavar="MODEL", help=_SCORED)
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="Of the weights.")
@click.option(
    "--traces", type=click.IntRange(min=1), help="Traces of a run. [default: 384 of the practice corpus, else 12]"
)
@_number("--shortest", 64, "Tokens of the shortest trace of random tokens.")
@_number("--longest", 1024, "Tokens of the longest.")
@click.option("--layer", type=click.IntRange(min=0), help="Probed layer. [default: as deep as layer 22 of 30]")
@click.option("--token-budget", type=click.IntRange(min=1), help="Tokens of one pass of the kernel.")
@_number("--repeats", 5, "Interleaved timed rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads on a CPU. [default: all cores]")
@click.option(
    "--pipeline",
    type=click.IntRange(min=1),
    metavar="ROWS",
    help="Score a practice corpus of so many rows through Ray Data too, once (organism:planted).",
)
@JSON
def score(
    json_file: str | None, models: tuple[str, ...], threads: int | None, pipeline: int | None, **settings: Any
) -> None:
    """Score traces of mixed lengths with the kernel, as published (plain), and only run the model over them (limit).

    Plain is one trace at a time with all hidden states and logits. The limit is a bare forward pass to the probed layer
    over rows of one length, in the batch shape that is fastest here. The kernel's scores must be equal to plain's.
    With --pipeline all of clifflab score runs over Ray Data, from the file to the manifest, on as many cores; its time
    holds the start of Ray.
    """
    import torch

    from clifflab.bench.score import MODELS, ScoreBench, bench_score
    from clifflab.runtime.score_bench import CorpusPipeline

    if threads:
        torch.set_num_threads(threads)
    bench = ScoreBench(models=models or MODELS, **settings)
    through = CorpusPipeline(pipeline, threads) if pipeline else None
    records = [record.as_dict() for record in bench_score(bench, lambda line: click.echo(line, err=True), through)]
    columns: dict[str, Callable[[Any], str]] = {
        "method": lambda record: record["method"],
        "seconds": lambda record: f"{record['seconds_median']:.3f}",
        "tokens/s": lambda record: f"{record['tokens_per_second']:,.0f}",
        "x plain": lambda record: f"{record['ratio_to_plain']:.3g}",
        "x limit": lambda record: f"{record['ratio_to_limit']:.3g}",
        "difference": lambda record: f"{record['max_abs_diff']:.1e}",
        "padding": lambda record: f"{record['padding_share']:.1%}",
        "MiB": lambda record: f"{record['peak_memory_bytes'] / 2**20:,.0f}",
    }
    if any(record["peak_share"] for record in records):
        columns["of peak"] = lambda record: f"{record['peak_share']:.0%}" if record["peak_share"] else ""
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
