"""``clifflab run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clifflab.errors import ConfigError

if TYPE_CHECKING:
    from clifflab.config import RuntimeConfig

UNTRAINED, PARTIAL = 3, 4


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
    be trained on some model; 4 partial: some models failed, one line each says why,
    and the others are done; 130 interrupted.
    """
    from clifflab.studyfile import load_study

    loaded = load_study(find_study(study), overrides, given_path("--data", data) if data else None)
    settings = at_address(loaded.runtime, address, runtime)
    loaded = loaded.model_copy(update={"runtime": settings})
    if dry_run:
        _dry_run(loaded, out)
        return
    check_reach(settings, runtime)
    from clifflab.cli.closing import print_models
    from clifflab.runtime.progress import Terminal
    from clifflab.runtime.study import run

    result = run(loaded, out, runtime=runtime, reporter=Terminal())
    print_models(result.metrics["models"], loaded.heads.fraction)
    place = result.address or str(result.root)
    click.echo(f"\nreport   {place}/report.html\nmetrics  {place}/metrics.json")
    for warning in result.warnings:
        click.echo(f"clifflab: {warning}", err=True)
    if result.failed:
        tell_failed(result.failed)
        done, total = len(loaded.models) - len(result.failed), len(loaded.models)
        click.echo(f"clifflab: partial: {done} of {total} models are done; the same command tries the rest", err=True)
        sys.exit(PARTIAL)
    if result.warnings:
        sys.exit(UNTRAINED)


def tell_failed(failed: list[dict[str, Any]]) -> None:
    """One line for each model that failed."""
    for failure in failed:
        where = f" at {failure['step']}" if failure["step"] else ""
        click.echo(f"clifflab: {failure['model']}: failed{where}: {failure['error']}", err=True)


def at_address(settings: RuntimeConfig, address: str | None, runtime: str | None) -> RuntimeConfig:
    """Settings that use the running Ray at an address, if one is given.

    Raises:
        ConfigError: The work would not be done over Ray.
    """
    if address is None:
        return settings
    if not address:
        raise ConfigError("--address", address, "is empty", "give host:port, or auto")
    if (runtime or settings.kind) == "inline":
        raise ConfigError("--address", address, "the inline runtime uses no Ray", "add --runtime ray, or leave it out")
    return settings.model_copy(update={"address": address})


def check_reach(settings: RuntimeConfig, runtime: str | None = None) -> None:
    """Ask a running Ray, where one is to be used, before the seconds that models and their libraries take.

    Raises:
        ClusterError: It cannot be joined.
    """
    if settings.address is not None and (runtime or settings.kind) == "ray":
        from clifflab.runtime.connect import find

        find(settings.address)


def given_path(option: str, text: str) -> Path:
    """A path as it was typed; ``~`` is the home folder.

    Raises:
        ConfigError: The system could not even be asked for it.
    """
    from clifflab.config.base import possible_path

    try:
        text.encode()
        return Path(possible_path(text)).expanduser()
    except UnicodeEncodeError:
        raise ConfigError(option, text, "is not UTF-8", "rename it") from None
    except ValueError as error:
        raise ConfigError(option, text, str(error), "check the path") from None


def find_study(name: str) -> Path:
    """A study file: the path as given, else a shipped study of that name."""
    given_path("study", name.lstrip("~"))  # which is not looked up here
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    package = Path(__file__).parents[1]
    shipped = [package / "jobs" / f"{name}.yaml", package.parent / "jobs" / f"{name}.yaml"]
    return next((file for file in shipped if file.is_file()), path)


def _dry_run(study: Any, out: str) -> None:
    from clifflab.runtime.storage import open_store
    from clifflab.runtime.study import identify, plan, prepare

    store = open_store(out, study.name)
    store.pull()
    steps = plan(identify(prepare(study), store.root))
    click.echo(
        f"study {study.name}: {len(study.models)} model(s), {len(study.prompts)} prompt set(s), "
        f"results in {store.address}"
    )
    for name, model in steps:
        click.echo(f"  would run  {name}{f' ({model})' if model else ''}")
    if not steps:
        click.echo("  everything is whole: nothing would run")
