"""``clifflab status``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from clifflab.errors import InputError

RUNS = Path("runs")
EXIT_CODES = {"running": 0, "done": 0, "partial": 4}  # anything else is 1
_BROKEN, _EVERY, _EVERY_ON_A_PIPE = 1, 2.0, 10.0

Look = Callable[[], "dict[str, Any] | None"]


@click.command("status")
@click.argument("run", metavar="[FOLDER|JOB]", required=False)
@click.option("--address", metavar="URL", help="Ask the cluster there, such as http://127.0.0.1:8265, for the job.")
@click.option("--watch", is_flag=True, help="Show it again and again until the run ends.")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as one line of JSON.")
@click.option("--audit", "audited", is_flag=True, help="A post-mortem from the run's event log.")
def command(run: str | None, address: str | None, watch: bool, as_json: bool, audited: bool) -> None:
    """Show where a run stands: models, steps, units done and failed, speed, time left.

    A run is a folder (runs/quickstart), a study's name under ./runs, or a job that was
    submitted to a cluster. Without one, all runs under ./runs are listed, or with
    --address those of the cluster.

    \b
    Exit codes: 0 it runs or is done; 4 some models failed and the rest is done; 1 it failed
    or stopped, or with --audit broke a rule; 2 there is no such run.
    """
    folder = _folder(run) if run and address is None else None
    if audited:
        sys.exit(_audit(folder, run, as_json))
    if run is None:
        sys.exit(_list(address, as_json))
    look: Look = _local(folder) if folder else lambda: _from_cluster(run, address)
    sys.exit(_show(look, run, watch, as_json))


def _folder(run: str) -> Path | None:
    """The folder of a run that left something to look at."""
    from clifflab.runtime.status import RunFolder

    places = (Path(run).expanduser(), RUNS / run)
    return next((place for place in places if RunFolder.is_one(place)), None)


def _local(folder: Path) -> Look:
    from clifflab.runtime.status import RunFolder

    reader = RunFolder(folder)
    return lambda: reader.snapshot(time.time())


def _from_cluster(job: str, address: str | None) -> dict[str, Any] | None:
    """What a job told last; ``None`` where the cluster has none of that name."""
    from clifflab.runtime.submit.client import find_job, last_status

    found = find_job(job, address)
    return None if found is None else last_status(found)


def _show(look: Look, run: str, watch: bool, as_json: bool) -> int:
    """Print a run's state, once or until it ends; its exit code."""
    from rich.console import Console
    from rich.live import Live

    from clifflab.runtime.status import render

    snapshot = look()
    if snapshot is None:
        raise InputError(
            "status", run, "there is no such run", "give its folder, a name under ./runs, or a job with --address"
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)

    def show(found: dict[str, Any]) -> None:
        if as_json:
            click.echo(json.dumps(found, ensure_ascii=True))
        else:
            console.print(render(found))

    if watch and sys.stdout.isatty() and not as_json:
        with Live(render(snapshot), console=console, auto_refresh=False) as live:
            while snapshot["state"] == "running":
                time.sleep(_EVERY)
                snapshot = look() or snapshot
                live.update(render(snapshot), refresh=True)
    else:
        show(snapshot)
        shown = time.monotonic()
        while watch and snapshot["state"] == "running":
            time.sleep(_EVERY)
            snapshot = look() or snapshot
            if snapshot["state"] != "running" or time.monotonic() - shown >= _EVERY_ON_A_PIPE:
                shown = time.monotonic()
                show(snapshot)
    return EXIT_CODES.get(snapshot["state"], 1)


def _list(address: str | None, as_json: bool) -> int:
    """One line a run."""
    from rich.console import Console

    from clifflab.runtime.status import RunFolder
    from clifflab.runtime.status_view import summary_line

    if address is not None:
        snapshots = _all_of_cluster(address)
    else:
        folders = sorted(place for place in RUNS.glob("*") if RunFolder.is_one(place))
        snapshots = [RunFolder(folder).snapshot(time.time()) for folder in folders]
    if not snapshots:
        where, remedy = (address or RUNS, "give a run's folder, or --address URL of a cluster")
        raise InputError("status", where, "there are no runs", remedy)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for snapshot in snapshots:
        if as_json:
            click.echo(json.dumps(snapshot))
        else:
            console.print(summary_line(snapshot), soft_wrap=True)
    return 0


def _all_of_cluster(address: str) -> list[dict[str, Any]]:
    from clifflab.runtime.submit.client import last_status, list_jobs

    found = [last_status(job) for job in list_jobs(address)]
    return [snapshot for snapshot in found if snapshot is not None]


def _audit(folder: Path | None, run: str | None, as_json: bool) -> int:
    from rich.console import Console

    from clifflab.runtime.audit import audit
    from clifflab.runtime.audit_view import render_audit
    from clifflab.runtime.events import read_events
    from clifflab.runtime.status import EVENTS

    if folder is None or not (folder / EVENTS).is_file():
        problem = "an audit reads a run's events.jsonl, and there is none"
        raise InputError("status --audit", run or "", problem, "give the folder of the run's results")
    found = audit(read_events(folder / EVENTS))
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(render_audit(found))
    return _BROKEN if found.problems() else 0
