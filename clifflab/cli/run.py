"""``clifflab run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

UNTRAINED = 3


@click.command("run")
@click.argument("study", metavar="STUDY")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: traces.samples=4")
@click.option("--data", metavar="DIR", help="Prompt files that are not beside the study are looked for in DIR.")
@click.option("--out", default="runs", show_default=True, metavar="DIR", help="Results go to DIR/<study name>/.")
@click.option(
    "--runtime", type=click.Choice(["ray", "inline"]), help="Ray actors, or this process. [default: the study's]"
)
@click.option("--dry-run", is_flag=True, help="Check everything and list the steps that would run.")
def command(
    study: str, overrides: tuple[str, ...], data: str | None, out: str, runtime: str | None, dry_run: bool
) -> None:
    """Run the study in STUDY, a YAML file or the name of a shipped one (quickstart, smollm2).

    What is whole already is not computed again: the same command continues after an interruption.

    \b
    Exit codes: 0 done; 2 wrong input, one line says which; 3 done, but no probe could
    be trained on some model; 130 interrupted.
    """
    from clifflab.studyfile import load_study

    loaded = load_study(find_study(study), overrides, Path(data).expanduser() if data else None)
    if dry_run:
        _dry_run(loaded, out)
        return
    from clifflab.runtime.progress import Terminal
    from clifflab.runtime.study import run

    result = run(loaded, out, runtime=runtime, reporter=Terminal())
    print_models(result.metrics["models"], loaded.heads.fraction)
    click.echo(f"\nreport   {result.root / 'report.html'}\nmetrics  {result.root / 'metrics.json'}")
    for warning in result.warnings:
        click.echo(f"clifflab: {warning}", err=True)
    if result.warnings:
        sys.exit(UNTRAINED)


def find_study(name: str) -> Path:
    """A study file: the path as given, else a shipped study of that name."""
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    package = Path(__file__).parents[1]
    shipped = [package / "jobs" / f"{name}.yaml", package.parent / "jobs" / f"{name}.yaml"]
    return next((file for file in shipped if file.is_file()), path)


def print_models(models: dict[str, dict[str, Any]], fraction: float) -> None:
    """Each model's table; of one that is compared with another, the comparison.

    Args:
        models: That part of ``metrics.json``.
        fraction: Share of heads that counts as the top.
    """
    from clifflab.cli.evaluate import print_evaluation
    from clifflab.findings import visible
    from clifflab.report.curve import curve_line
    from clifflab.report.repair_short import repair_lines

    after = {model["evaluation"]["before"]: model for model in models.values() if model.get("evaluation")}
    for name, model in models.items():
        if model.get("evaluation"):
            print_evaluation(model["evaluation"])
            continue
        print_model(name, model, fraction)
        for line in (*repair_lines(model, after.get(name)), curve_line(model)):
            if line:
                click.echo(visible(line))


def print_model(name: str, model: dict[str, Any], fraction: float = 0.03) -> None:
    """The closing table, the excess cliff, and what removing heads does."""
    from rich.console import Console
    from rich.table import Table

    from clifflab.findings import visible
    from clifflab.report.heads_short import heads_line
    from clifflab.report.numbers import interval

    layer = model["probe"].get("all", {}).get("layer")
    title = f"{name}: all-position probe, layer {layer}" if layer is not None else name
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("set")
    scores = ("plateau", "final", "cliff [95%]") if layer is not None else ()
    for heading in ("n", "refused", "complied", "unclosed", "degen.", *scores):
        table.add_column(heading, justify="right")
    for set_name, entry in model["sets"].items():
        counts = [str(entry["outcomes"][key]) for key in ("n", "refused", "complied", "unclosed", "degenerate")]
        probe = entry["probes"]["all"]
        means = [interval({**probe[key], "low": None}).split(" ")[0] for key in ("plateau", "final")]
        table.add_row(set_name, *counts, *([*means, interval(probe["cliff"])] if scores else []))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print()
    console.print(table)
    excess = model["excess_cliff"]["all"]
    why = excess.get("reason", "") if model["probe"]["trained"] else "no probe could be trained"
    line = interval(excess) if excess["mean"] is not None else f"not defined: {why}"
    console.print(f"excess cliff (complied - refused, matched length): {line}", markup=False, soft_wrap=True)
    if heads := heads_line(model, fraction):
        console.print(visible(heads), markup=False, soft_wrap=True)


def _dry_run(study: Any, out: str) -> None:
    from clifflab.runtime.study import identify, plan, prepare

    root = (Path(out) / study.name).absolute()
    steps = plan(identify(prepare(study), root))
    click.echo(
        f"study {study.name}: {len(study.models)} model(s), {len(study.prompts)} prompt set(s), results in {root}"
    )
    for name, model in steps:
        click.echo(f"  would run  {name}{f' ({model})' if model else ''}")
    if not steps:
        click.echo("  everything is whole: nothing would run")
