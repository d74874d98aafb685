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
@click.option("--address", metavar="HOST:PORT", help="Use a running Ray (auto: the one on this machine).")
@click.option("--dry-run", is_flag=True, help="Check everything and list the steps that would run.")
def command(
    study: str, overrides: tuple[str, ...], data: str | None, out: str, runtime: str | None, address: str | None,
    dry_run: bool,
) -> None:  # fmt: skip
    """Run the study in STUDY, a YAML file or the name of a shipped one (quickstart, smollm2).

    What is whole already is not computed again: the same command continues after an interruption.

    \b
    Exit codes: 0 done; 2 wrong input, one line says which; 3 done, but no probe could
    be trained on some model; 130 interrupted.
    """
    from clifflab.studyfile import load_study

    loaded = load_study(find_study(study), overrides, Path(data).expanduser() if data else None)
    if address is not None:
        loaded = loaded.model_copy(update={"runtime": loaded.runtime.model_copy(update={"address": address})})
    if dry_run:
        _dry_run(loaded, out)
        return
    from clifflab.cli.closing import print_models
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
