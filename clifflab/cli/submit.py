"""``clifflab submit``: the same work on a cluster."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from clifflab.errors import ConfigError, one_line, shorten

if TYPE_CHECKING:
    from clifflab.runtime.submit.client import Cluster
    from clifflab.runtime.submit.ids import JobView
    from clifflab.runtime.submit.plan import Plan

TASKS = ("score", "tune")
_LEFT = "clifflab.options"
_PATHS = ("model", "probes", "pattern", "output", "study", "data", "out")  # options of a task


class SubmitCommand(click.Command):
    """Options may stand before and after STUDY; what follows ``score`` or ``tune`` belongs to those."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the options of a task aside."""
        ctx.allow_interspersed_args = False
        found, left, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.allow_interspersed_args = True
        if found.get("study") in TASKS:
            ctx.meta[_LEFT] = list(left)
            args = args[: len(args) - len(left)]
        return super().parse_args(ctx, args)


address_option = click.option(
    "--address",
    metavar="URL",
    help="The cluster's dashboard. [default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]",
)


@click.command("submit", cls=SubmitCommand)
@click.argument("study", metavar="STUDY | score OPTIONS... | tune OPTIONS...")
@address_option
@click.option("--follow", "-f", is_flag=True, help="Show what the job prints until it ends; its exit code is returned.")
@click.option("--name", metavar="NAME", help="Of the job. [default: the study's]")
@click.option("--out", metavar="DIR|URI", help="Results go to DIR/<study name>/, which all nodes see. [default: runs]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: traces.samples=4")
@click.option("--data", metavar="DIR", help="Prompt files that are not beside the study are looked for in DIR.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment of the job; repeatable. No secrets.")
@click.option("--python", default="python", show_default=True, metavar="PATH", help="The interpreter on the nodes.")
@click.option("--no-check", is_flag=True, help="Send it without asking the nodes first.")
@click.option(
    "--max-upload", type=click.IntRange(1, 500), default=100, show_default=True, metavar="MB", help="Most to upload."
)
@click.pass_context
def command(
    ctx: click.Context, study: str, address: str | None, follow: bool, name: str | None, out: str | None,
    overrides: tuple[str, ...], data: str | None, env: tuple[str, ...], python: str, no_check: bool, max_upload: int,
) -> None:  # fmt: skip
    """Send a study to a cluster as a Ray job, or clifflab score and clifflab tune with their options.

    Only what the study names is uploaded. Before that, address, token, versions, GPUs, output and models are checked
    on every node. Sent twice, a job that runs is found again, and one that ended continues.

    \b
    clifflab submit mine.yaml --address http://HEAD:8265 --follow
    clifflab submit score --model MODEL --probes FOLDER --input 'GLOB' --output SHARED_FOLDER

    \b
    Exit codes: 0 sent, or it runs already; 2 wrong input, or a cluster that cannot do it (one line says why).
    With --follow the job's own: 0 done; 1, 2, 3, 4 as clifflab run; 130 stopped, or Ctrl-C here (the job goes on).
    """
    from clifflab.cli.run import given_path
    from clifflab.runtime.submit.package import Package
    from clifflab.runtime.submit.send import check_name, parse_env

    if out is not None:
        given_path("--out", out)
    environment, package = parse_env(env), Package(max_upload)
    if study in TASKS:
        for option, value in {"--out": out, "--set": overrides, "--data": data}.items():
            if value:
                raise ConfigError(option, value, "belongs to a study", f"give it after {study}, as it calls it")
        plan = _task(study, ctx.meta.get(_LEFT, []), check_name(name), package)
    else:
        plan = _study(study, overrides, data, out or "runs", check_name(name), package)
    from clifflab.runtime.submit.client import connect
    from clifflab.runtime.submit.send import submit

    cluster = connect(address)
    sent = submit(cluster, plan, env=environment, python=python, check=not no_check, note=_note)
    again = f" --address {address}" if address else ""
    job = sent.job
    if sent.new:
        _note(f"sent as {job.id}; results go to {job.out}")
    else:
        _note(f"runs already as {job.id}: not sent again")
    click.echo(job.id)
    if follow:
        sys.exit(follow_to_end(cluster, job, again))
    _note(f"follow it: clifflab logs -f {job.id}{again}; stop it: clifflab stop {job.id}{again}")


def follow_to_end(cluster: Cluster, job: JobView, again: str) -> int:
    """Show a job until it ends; returns the exit code. Ctrl-C leaves it running."""
    from clifflab.cli.watching import JobScreen
    from clifflab.runtime.submit.follow import follow

    screen = JobScreen()
    try:
        ended = follow(cluster, job, screen)
    except KeyboardInterrupt:
        screen.close()
        hint = f"follow it: clifflab logs -f {job.id}{again}; stop it: clifflab stop {job.id}{again}"
        click.echo(f"clifflab: no longer followed; {job.id} goes on. {hint}", err=True)
        return 130
    finally:
        screen.close()
    if ended.exit:
        why = f": {shorten(ended.message, 200)}" if ended.exit_code is None and ended.message else ""
        click.echo(f"clifflab: {job.id} {ended.status} (exit code {ended.exit}){why}", err=True)
    return ended.exit


def _note(text: str) -> None:
    click.echo(f"clifflab: {one_line(text)}", err=True)


def _study(
    study: str, overrides: tuple[str, ...], data: str | None, out: str, name: str | None, package: Any
) -> Plan:  # fmt: skip
    from clifflab.cli.run import find_study, given_path
    from clifflab.runtime.submit.plan import plan_study
    from clifflab.studyfile import load_study

    file = find_study(study)
    package.beside = file.parent
    loaded = load_study(file, overrides, given_path("--data", data) if data else None)
    return plan_study(loaded, out, name, package)


def _task(kind: str, left: list[str], name: str | None, package: Any) -> Plan:
    from click.core import ParameterSource

    from clifflab.cli import cli
    from clifflab.cli.run import find_study, given_path
    from clifflab.runtime.submit.plan import plan_task

    task = cli.get_command(click.get_current_context(), kind)
    assert task is not None
    try:
        parsed = task.make_context(kind, left)
    except click.NoSuchOption as error:
        own = {name for param in click.get_current_context().command.params for name in param.opts}
        if error.option_name not in own:
            raise
        remedy = f"give it before {kind}"
        if (kind, error.option_name) == ("score", "--out"):
            remedy = "score calls it --output"
        raise ConfigError(error.option_name, "", f"is not an option of {kind}", remedy) from None
    options: list[tuple[str, str | None]] = []
    for param in task.params:
        if parsed.get_parameter_source(param.name or "") is not ParameterSource.COMMANDLINE:
            continue
        value = parsed.params[param.name or ""]
        for one in value if param.multiple else [value]:
            text = str(find_study(one)) if param.name == "study" else str(one)
            if param.name in _PATHS:
                given_path(param.opts[0], text)
            options.append((param.opts[0], None if getattr(param, "is_flag", False) else text))
    plan = plan_task(kind, options, name, package)
    _check_task(kind, {**parsed.params, "address": "auto"})
    return plan


def _check_task(kind: str, given: dict[str, Any]) -> None:
    """What the command itself would refuse there, said here."""
    if kind == "score":
        from clifflab.cli.score import prepare

        prepare(**{name: value for name, value in given.items() if name not in ("verify", "overwrite")})
    else:
        from clifflab.cli.tune import prepare as prepare_tune

        prepare_tune(**{name: value for name, value in given.items() if name != "seed"})
