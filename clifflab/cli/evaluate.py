"""``clifflab evaluate``."""

from __future__ import annotations

import sys

import click

from clifflab.cli.run import PARTIAL, UNTRAINED, find_study, given_path, tell_failed


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
    from clifflab.cli.closing import print_evaluation
    from clifflab.comparison import comparison
    from clifflab.runtime.progress import Terminal
    from clifflab.runtime.study import prepare, run
    from clifflab.studyfile import load_study

    loaded = load_study(find_study(study), overrides, given_path("--data", data) if data else None)
    pair = comparison(loaded, model, adapter=adapter, after=after)
    result = run(prepare(pair), out, runtime=runtime, reporter=Terminal())
    if result.failed:
        tell_failed(result.failed)
        sys.exit(PARTIAL)
    tuned = pair.models[-1].name
    found = read_json(result.root / tuned / "evaluation.json")
    print_evaluation(found)
    place = result.root / tuned / "evaluation.json"
    click.echo(f"\nreport   {result.root / 'report.html'}\nfigures  {place}")
    for warning in result.warnings:
        click.echo(f"clifflab: {warning}", err=True)
    if any(warning.startswith(f"{pair.models[0].name}: ") for warning in result.warnings):
        sys.exit(UNTRAINED)
