"""``clifflab status``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clifflab.errors import ClifflabError, InputError, shorten

if TYPE_CHECKING:
    from clifflab.runtime.status import RunFolder

RUNS, CLUSTER = Path("runs"), "RAY_API_SERVER_ADDRESS"
EXIT_CODES = {"waiting": 0, "running": 0, "done": 0, "partial": 4}  # anything else is 1
_GOES_ON = ("waiting", "running")
_BROKEN = 1
_EVERY, _EVERY_AFAR, _EVERY_ON_A_PIPE = 2.0, 5.0, 10.0  # seconds between two looks; between two prints

Look = Callable[[], dict[str, Any]]


@click.command("status")
@click.argument("run", metavar="[FOLDER|JOB]", required=False)
@click.option("--address", metavar="URL", help="Ask the cluster there, such as http://127.0.0.1:8265, for the job.")
@click.option("--watch", is_flag=True, help="Show it again and again until the run ends.")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as one line of JSON.")
@click.option("--audit", "audited", is_flag=True, help="A post-mortem from the run's event log.")
def command(run: str | None, address: str | None, watch: bool, as_json: bool, audited: bool) -> None:
    """Show where a run stands: models, steps, units done and failed, speed, time left.

    A run is a folder (runs/quickstart, s3://bucket/runs/quickstart), a study's name under
    ./runs, or a job that was submitted to a cluster. Without one, all runs under ./runs are listed, and behind them
    the jobs of the cluster that RAY_API_SERVER_ADDRESS names, if it names one; with --address the cluster's alone.

    \b
    Exit codes: 0 it runs or is done; 4 some models failed and the rest is done; 1 it failed
    or stopped, or with --audit broke a rule; 2 there is no such run.
    """
    folder = _folder(run) if run and address is None else None
    if audited:
        sys.exit(_audit(folder, run, as_json))
    if run is None:
        sys.exit(_list(address, as_json))
    look: Look = (lambda: folder.snapshot(time.time())) if folder else _from_cluster(run, address)
    sys.exit(_show(look, watch, as_json, pause=_EVERY if folder and not folder.remote else _EVERY_AFAR))


def _folder(run: str) -> RunFolder | None:
    """The folder of a run that left something to look at."""
    from clifflab.runtime.status import RunFolder

    if "://" in run:
        found = RunFolder.at(run)
        if not found.is_one:
            raise InputError("status", run, "no run wrote there yet", "give OUT/NAME, the folder of its results")
        return found
    places = (RunFolder(Path(run).expanduser()), RunFolder(RUNS / run))
    return next((place for place in places if place.is_one), None)


def _from_cluster(run: str, address: str | None) -> Look:
    """What a job's driver told last."""
    from clifflab.runtime.status import of_job, read_log
    from clifflab.runtime.submit.client import connect, find_job

    try:
        cluster = connect(address)
    except ClifflabError as error:
        if address is not None:
            raise
        problem = f"no run of that name is here, and no cluster tells of one ({error})"
        raise InputError("status", run, problem, "give its folder, or --address URL") from None

    def look() -> dict[str, Any]:
        job = find_job(cluster, run)
        told, words = read_log(cluster.log(job.id))
        return of_job(told, job.name, job.status, job.exit_code, job.message, words)

    return look


def _show(look: Look, watch: bool, as_json: bool, pause: float) -> int:
    """Print a run's state, once or until it ends; its exit code."""
    from rich.console import Console
    from rich.live import Live

    from clifflab.runtime.status import render

    snapshot = look()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)

    def show(found: dict[str, Any]) -> None:
        if as_json:
            click.echo(json.dumps(found, ensure_ascii=True))
        else:
            console.print(render(found))

    if watch and sys.stdout.isatty() and not as_json:
        with Live(render(snapshot), console=console, auto_refresh=False) as live:
            while snapshot["state"] in _GOES_ON:
                time.sleep(pause)
                snapshot = look()
                live.update(render(snapshot), refresh=True)
    else:
        show(snapshot)
        shown = time.monotonic()
        while watch and snapshot["state"] in _GOES_ON:
            time.sleep(pause)
            snapshot = look()
            if snapshot["state"] not in _GOES_ON or time.monotonic() - shown >= _EVERY_ON_A_PIPE:
                shown = time.monotonic()
                show(snapshot)
    return EXIT_CODES.get(snapshot["state"], 1)


def _list(address: str | None, as_json: bool) -> int:
    """One line a run, then one a job of the cluster that is named here or in the environment."""
    from rich.console import Console

    from clifflab.runtime.status import RunFolder
    from clifflab.runtime.status.view import summary_line

    folders = [RunFolder(place) for place in sorted(RUNS.glob("*"))] if address is None else []
    snapshots = [folder.snapshot(time.time()) for folder in folders if folder.is_one]
    jobs = _jobs(address, needed=not snapshots)
    if not snapshots and not jobs:
        where, remedy = (address or RUNS, "give a run's folder, or --address URL of a cluster")
        raise InputError("status", where, "there are no runs", remedy)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for snapshot in snapshots:
        if as_json:
            click.echo(json.dumps(snapshot))
        else:
            console.print(summary_line(snapshot), soft_wrap=True)
    width = max((len(job["job"]) for job in jobs), default=0)
    for job in jobs:
        line = f"{shorten(job['job'], 100):<{width}}  {job['state']:<8}  {shorten(job['out'], 200)}".rstrip()
        click.echo(json.dumps(job) if as_json else line)
    return 0


def _jobs(address: str | None, *, needed: bool) -> list[dict[str, Any]]:
    """What a cluster knows of its jobs, without asking for their logs; none where no cluster is named."""
    from clifflab.runtime.status import state_of

    where = address or os.environ.get(CLUSTER)
    if not where:
        return []
    from clifflab.runtime.submit.client import connect

    try:
        found = connect(address).jobs()
    except ClifflabError as error:
        if needed or address is not None:
            raise
        click.echo(f"clifflab: the jobs of the cluster are not shown: {error}", err=True)
        return []
    names = ("name", "kind", "out", "started", "ended")
    return [
        {"job": job.id, "state": state_of(job.status, job.exit_code), **{name: getattr(job, name) for name in names}}
        for job in found
    ]


def _audit(folder: RunFolder | None, run: str | None, as_json: bool) -> int:
    from rich.console import Console

    from clifflab.runtime.audit import audit
    from clifflab.runtime.audit.view import render_audit
    from clifflab.runtime.events import read_events
    from clifflab.runtime.status import EVENTS

    if folder is None or not (folder.root / EVENTS).is_file():
        problem = "an audit reads a run's events.jsonl, and there is none"
        raise InputError("status --audit", run or "", problem, "give the folder of the run's results")
    found = audit(read_events(folder.root / EVENTS))
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(render_audit(found))
    return _BROKEN if found.problems() else 0
