"""``clifflab select``: the traces that a repair needs, out of all."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clifflab.errors import InputError

if TYPE_CHECKING:
    from clifflab.repair.files import Sources
    from clifflab.repair.reading import Reader

_SELECTORS = click.Choice(["misalignment", "cliff", "final", "plateau", "random", "rules", "guard"])
# Options by what a choice calls them.
_OPTIONS = {
    name: f"--{name}" for name in ("scores", "traces", "guard", "probe", "budget", "benign", "stratify", "against")
}
_OPTIONS |= {"selector": "--by", "targets": "--targets"}
_BESIDE = ("final", "plateau", "random", "rules")


@click.command("select")
@click.option("--scores", required=True, metavar="GLOB", help="Score tables: cliffs.parquet of a study or a corpus.")
@click.option("--traces", metavar="GLOB", help="Traces of the scores. [default: traces.parquet beside them]")
@click.option("--prompts", metavar="GLOB", help="Their requests. [default: the study's, where the traces are its own]")
@click.option("--guard", metavar="GLOB", help="A guard's verdicts. [default: guard.parquet beside the "
              "traces, whatever ranks: only refusals that the guard calls safe become targets]")  # fmt: skip
@click.option("--out", required=True, metavar="DIR", help="Folder of the results.")
@click.option("--by", type=_SELECTORS, default="misalignment", show_default=True, help="What ranks.")
@click.option("--beside", type=_SELECTORS, multiple=True, help="Another selector, for comparison; repeatable. "
              "[default: final, plateau, random, rules]")  # fmt: skip
@click.option("--budget", default="1.7%", show_default=True, metavar="N|SHARE", help="Examples: 100, 0.017 or 1.7%.")
@click.option("--benign", type=click.FloatRange(0, 1, max_open=True), default=0.2, show_default=True,
              help="Share of the budget that goes to benign answered requests.")  # fmt: skip
@click.option("--stratify", metavar="COLUMN", help="A column whose values share the budget evenly.")
@click.option("--against", multiple=True, metavar="FILE", help="Prompts that are evaluated: requests too near to them "
              "are left out; repeatable.")  # fmt: skip
@click.option("--decontaminate", type=click.FloatRange(0.3, 1), default=0.8, show_default=True,
              help="Similarity that is too near.")  # fmt: skip
@click.option("--outcome", type=click.Choice(["refused", "complied"]), multiple=True, help="Only these; repeatable.")
@click.option("--plateau", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Least plateau of a trace without a label.")  # fmt: skip
@click.option("--min-thinking", type=click.IntRange(min=0), default=0, metavar="N", help="Least thinking tokens.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Most tokens of a trace.")
@click.option(
    "--probe", default="all", show_default=True, metavar="POSITIONS", help="Training positions: all or final."
)
@click.option("--targets", type=click.Choice(["keep-thinking", "rewrite"]), default="keep-thinking", show_default=True)
@click.option("--refusals", type=click.Choice(["own", "varied"]), default="own", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all draws.")
@click.option("--runtime", type=click.Choice(["ray", "inline"]), default="ray", show_default=True)
def command(
    scores: str,
    traces: str | None,
    prompts: str | None,
    guard: str | None,
    out: str,
    by: str,
    beside: tuple[str, ...],
    budget: str,
    against: tuple[str, ...],
    outcome: tuple[str, ...],
    probe: str,
    targets: str,
    refusals: str,
    seed: int,
    runtime: str,
    **settings: Any,
) -> None:
    """Choose the examples of a repair from scored traces, and write what the model is to say instead.

    Works on tables larger than memory. Writes selection.parquet (what every selector chose), train.jsonl (chat examples
    for clifflab tune and other trainers) and selection.json (figures) to DIR.

    Eligible are traces labelled harmful; without a label, those with a high plateau. Scores that agree within 0.001
    (the same bucket) are ranked by their logits, then by id. --by final puts the smallest final score first.
    """
    from clifflab.config import SelectConfig, TargetsConfig
    from clifflab.repair.files import select_files
    from clifflab.repair.output import SELECTION, SUMMARY, TRAIN, write_selection

    if probe not in ("all", "final"):
        raise InputError("--probe", probe, "unknown training positions", "give all or final")
    chosen = SelectConfig(
        by=by,  # type: ignore[arg-type]
        beside=beside or tuple(name for name in _BESIDE if name != by),  # type: ignore[arg-type]
        budget=_budget(budget),
        outcomes=outcome or ("refused", "complied"),  # type: ignore[arg-type]
        probe=probe,  # type: ignore[arg-type]
        **settings,
    )
    wanted = TargetsConfig(kind=targets, refusals=refusals)  # type: ignore[arg-type]
    sources = _sources(scores, traces, prompts, guard, against)
    try:
        with _reader(runtime) as read:
            selection = select_files(sources, chosen, wanted, seed, read)
    except InputError as error:
        field = _OPTIONS.get(error.field, error.field)
        raise InputError(field, error.value, error.problem, error.remedy) from None
    write_selection(Path(out), selection)
    _print(selection.summary)
    for name in (SELECTION, TRAIN, SUMMARY):
        click.echo(f"{Path(name).stem if name != SUMMARY else 'figures':<10}{Path(out) / name}")


@contextmanager
def _reader(runtime: str) -> Iterator[Reader]:
    if runtime == "inline":
        from clifflab.repair.reading import read_here

        yield read_here
        return
    from clifflab.config import RuntimeConfig
    from clifflab.runtime.select import RayReader

    with RayReader(RuntimeConfig()) as read:
        yield read


def _budget(text: str) -> int | float:
    from decimal import Decimal, DecimalException

    from clifflab.config.repair import check_budget

    try:
        value = float(Decimal(text.removesuffix("%")) / 100) if text.endswith("%") else float(text)
        return check_budget(int(value) if value >= 1 and not text.endswith("%") and value == int(value) else value)
    except (ValueError, OverflowError, DecimalException):
        remedy = "give a number of examples, or a share of the corpus such as 0.017 or 1.7%"
        raise InputError("--budget", text, "is neither a count nor a share", remedy) from None


def _sources(
    scores: str, traces: str | None, prompts: str | None, guard: str | None, against: tuple[str, ...]
) -> Sources:
    """The files; what is not named is looked for where a study puts it."""
    from clifflab.repair.files import Sources
    from clifflab.repair.reading import rows_of

    score_files = _files("--scores", scores)
    beside = [Path(file).with_name("traces.parquet") for file in score_files]
    if traces is None and not all(file.is_file() for file in beside):
        lacking = next(file for file in beside if not file.is_file())
        raise InputError("--traces", "(absent)", f"there is no {lacking}", "name the traces with --traces")
    trace_files = _files("--traces", traces) if traces else [str(file) for file in dict.fromkeys(beside)]
    prompt_files = _files("--prompts", prompts) if prompts else _there(_requests(Path(file)) for file in trace_files)
    guard_files: list[str] = []
    if guard:
        guard_files = _files("--guard", guard)
    else:  # a study without a guard writes an empty table
        found = _there(Path(file).with_name("guard.parquet") for file in trace_files)
        guard_files = [file for file in found if rows_of(file)]
    rows = [row for file in against for row in _evaluated(file)]
    return Sources(score_files, trace_files, prompt_files, guard_files, rows)


def _requests(traces: Path) -> Path:
    """Where a study keeps the requests of these traces."""
    folder = traces.absolute().parent
    return folder.parents[1] / "corpus.parquet" if folder.name == "corpus" else folder.parent / "prompts.parquet"


def _there(files: Iterator[Path]) -> list[str]:
    return [str(file) for file in dict.fromkeys(files) if file.is_file()]


def _files(option: str, pattern: str) -> list[str]:
    found = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
    if not found:
        raise InputError(option, pattern, "no such file", "give a file, or a pattern in quotes")
    return found


def _evaluated(file: str) -> list[dict[str, Any]]:
    """Rows of a prompt file: a study's prompts.parquet, or any file that a study's prompt sets may name."""
    from clifflab.config import PromptSet
    from clifflab.data.files import check_source
    from clifflab.data.prompts import read_prompts
    from clifflab.repair.reading import schema_of

    check_source("--against", file)
    columns = ["set", "id", "messages"]
    if Path(file).suffix == ".parquet" and set(columns) <= set(schema_of(file).names):
        import pyarrow.parquet as pq

        return list(pq.read_table(file, columns=columns).to_pylist())
    return read_prompts(PromptSet(name="evaluated", path=file, label="unlabelled"), "--against")[0]


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    budget, by = summary["budget"], summary["by"]
    title = f"{summary['model']}: {budget['examples']} of {budget['corpus']} traces"
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    table.add_column("selector")
    heads = ("harmful", "filled", "benign", "cliff cases", "complied", "refused", f"shared with {by}",
             "rank corr. with final", "benign if unlabelled")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right")
    for name, entry in summary["selectors"].items():
        shared, ranks, blind = summary["overlap"][by][name], entry["spearman_with_final"], entry["blind_benign_share"]
        table.add_row(
            name,
            str(budget["harmful"]),
            str(entry["filled"]),
            str(budget["benign"]),
            str(entry["cliff_cases"]),
            *(str(entry["outcomes"].get(outcome, 0)) for outcome in ("complied", "refused")),
            "-" if shared is None else f"{shared:.0%}",
            "-" if ranks is None else f"{ranks:.2f}",
            "-" if blind is None else f"{blind:.0%}",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    left = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in summary["left_out"].items())
    near = f"; {summary['contaminated']} traces of evaluated requests set aside" if summary["contaminated"] else ""
    lines = [f"{summary['eligible']} eligible, {summary['cliff_cases']} cliff cases; left out: {left or 'none'}{near}"]
    made = summary["targets"]
    what = f"{made['kind']}, {made['refusals']} refusals" if made["refusals"] else made["kind"]
    rejected = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in made["rejected"].items())
    lines.append(
        f"{made['rows']} training examples ({what}; {made['distinct']} distinct responses to harmful requests)"
    )
    if rejected:
        short = budget["examples"] - made["rows"]
        rest = f"{short} of the budget could not be replaced" if short else "others took their place"
        lines.append(f"chosen, but not usable: {rejected}; {rest}")
    if broken := ", ".join(f"{count} {use}" for use, count in summary["cut"].items() if count):
        lines.append(f"cut at the limit of tokens, and not used: {broken}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
