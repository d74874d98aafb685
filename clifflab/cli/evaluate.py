"""``clifflab evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from clifflab.cli.run import UNTRAINED, find_study

_RATES = {"harmful": ("asr",), "benign": ("over_refusal",), "mixed": ("asr", "over_refusal")}
_TITLES = {"asr": "ASR", "over_refusal": "over-refusal"}


@click.command("evaluate")
@click.argument("study", metavar="STUDY")
@click.option("--model", metavar="MODEL", help="Before: a model of STUDY, or a checkpoint. [default: STUDY's only one]")
@click.option("--adapter", metavar="DIR", help="After: that model with the PEFT adapter in DIR.")
@click.option("--after", metavar="MODEL", help="After: a whole checkpoint, in place of --adapter.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: traces.samples=4")
@click.option("--data", metavar="DIR", help="Prompt files that are not beside the study are looked for in DIR.")
@click.option("--out", default="runs", show_default=True, metavar="DIR", help="Results go to DIR/<name>-evaluation/.")
@click.option(
    "--runtime", type=click.Choice(["ray", "inline"]), help="Ray actors, or this process. [default: the study's]"
)
def command(
    study: str,
    model: str | None,
    adapter: str | None,
    after: str | None,
    overrides: tuple[str, ...],
    data: str | None,
    out: str,
    runtime: str | None,
) -> None:
    """Measure a model and its tuned version on the prompts of STUDY, and compare them prompt by prompt.

    Both go through the study's steps; heads are not searched. What is whole already is not computed again: another
    adapter of the same model costs only what the tuned model writes.

    \b
    Exit codes: 0 done; 2 wrong input, one line says which; 3 done, but no probe could
    be trained on the model before, so that no cliff is compared; 130 interrupted.
    """
    from clifflab.artifacts import read_json
    from clifflab.comparison import comparison
    from clifflab.runtime.progress import Terminal
    from clifflab.runtime.study import run
    from clifflab.studyfile import load_study

    loaded = load_study(find_study(study), overrides, Path(data).expanduser() if data else None)
    pair = comparison(loaded, model, adapter=adapter, after=after)
    result = run(pair, out, runtime=runtime, reporter=Terminal())
    tuned = pair.models[-1].name
    found = read_json(result.root / tuned / "evaluation.json")
    print_evaluation(found)
    place = result.root / tuned / "evaluation.json"
    click.echo(f"\nreport   {result.root / 'report.html'}\nfigures  {place}")
    for warning in result.warnings:
        click.echo(f"clifflab: {warning}", err=True)
    if any(warning.startswith(f"{pair.models[0].name}: ") for warning in result.warnings):
        sys.exit(UNTRAINED)


def print_evaluation(found: Mapping[str, Any]) -> None:
    """The table of a comparison: rates before and after by set, what was lost beside them, and the cliff.

    Args:
        found: Content of ``evaluation.json``.
    """
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    title = f"{found['model']} beside {found['before']}"
    console.print()
    if found["reason"]:
        console.print(f"{title}: not compared: {found['reason']}", markup=False, soft_wrap=True)
        return
    samples = f"{found['samples']} sample{'' if found['samples'] == 1 else 's'} a prompt"
    console.print(_table(found, f"{title}, judged by {found['judged_by']}, {samples}"))
    for line in _lines(found):
        console.print(line, markup=False, soft_wrap=True)


def _table(found: Mapping[str, Any], title: str) -> Any:
    from rich.table import Table

    from clifflab.report.numbers import DASH, percent

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("set", "rate"):
        table.add_column(heading)
    for heading in ("before [95%]", "after [95%]", "change [95%]", "unclosed", "degen.", "cliff (own probe)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in ("sets", "pools"):
        for name, entry in found[part].items():
            for rate in _RATES[entry["label"]]:
                figures = entry["rates"][rate]
                sides = [percent(figures[side]) for side in ("before", "after", "change")]
                lost = [_shift(entry["rates"][measure]) for measure in ("unclosed", "degenerate")]
                cliff = _cliff(found["cliff"][name]) if part == "sets" else ""
                table.add_row(name if part == "sets" else f"= {name}", _TITLES[rate], *sides, *lost, cliff)
    for name in found["left_out"]:
        table.add_row(name, "given", *[DASH] * 5, _cliff(found["cliff"][name]))
    return table


def _lines(found: Mapping[str, Any]) -> list[str]:
    from clifflab.report.numbers import interval, number, percent

    read = found["perplexity"]
    lines = [f"benign perplexity: not measured: {read['reason']}"]
    if not read["reason"]:
        sides = f"{number(read['before']['mean'], 3)} -> {number(read['after']['mean'], 3)}"
        lines = [f"benign perplexity: {sides}, ratio {interval(read['ratio'], 3)}, {read['ratio']['n']} texts"]
    for name, entry in found["choices"].items():
        sides = f"{percent(entry['before'])} -> {percent(entry['after'])}, change {percent(entry['change'])}"
        rejected = sum(entry["rejected"].values())
        left_out = f", {rejected} row{'' if rejected == 1 else 's'} left out" if rejected else ""
        lines.append(f"{name}: accuracy {sides}, {entry['questions']} questions{left_out}")
    probes = found["probes"]
    if probes["old"]:
        lines.append(f"cliff by the probe of the model before: not measured: {probes['old']}")
    if probes["own"] and probes["own"] not in probes["old"]:
        lines.append(f"cliff by the tuned model's own probe: not measured: {probes['own']}")
    told = " ".join(probes.values())
    sides_of_excess = {"before": "before", "after_old_probe": "after, old probe", "after_own_probe": "after, own probe"}
    for side, text in sides_of_excess.items():
        entry = found["excess_cliff"][side]
        if entry["mean"] is not None:
            lines.append(f"excess cliff {text}: {interval(entry)}")
        elif entry["reason"] not in told:
            lines.append(f"excess cliff {text}: not defined: {entry['reason']}")
    return lines


def _shift(entry: Mapping[str, Any]) -> str:
    """Two shares without their intervals."""
    from clifflab.report.numbers import DASH

    ends = [entry[side]["mean"] for side in ("before", "after")]
    return " -> ".join(DASH if value is None else f"{100 * value:.0f}%" for value in ends)


def _cliff(entry: Mapping[str, Any]) -> str:
    """Mean cliff before and after by the old probe, and by the tuned model's own."""
    from clifflab.report.numbers import number

    sides = ("before", "after_old_probe", "after_own_probe")
    before, after, own = (number(entry[side]["cliff"]["mean"] if entry[side] else None) for side in sides)
    return f"{before} -> {after} ({own})"
