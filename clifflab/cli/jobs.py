"""``clifflab logs``, ``clifflab stop`` and ``clifflab ls``: jobs that were submitted."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

import click

from clifflab.cli.submit import address_option, follow_to_end


@click.command("logs")
@click.argument("name", metavar="NAME")
@address_option
@click.option("--follow", "-f", "follow", is_flag=True, help="Go on until the job ends; its exit code is returned.")
def logs(name: str, address: str | None, follow: bool) -> None:
    """Show what the job NAME printed: its name, or an id as clifflab ls shows it.

    \b
    Exit codes: 0; 2 there is no such job, or no cluster; with -f the job's own, as in clifflab submit --follow.
    """
    from clifflab.cli.watching import JobScreen
    from clifflab.runtime.submit.client import connect, find_job
    from clifflab.runtime.submit.follow import show_log

    cluster = connect(address)
    job = find_job(cluster, name)
    if follow:
        sys.exit(follow_to_end(cluster, job, f" --address {address}" if address else ""))
    screen = JobScreen()
    try:
        show_log(cluster.log(job.id), screen)
    finally:
        screen.close()


@click.command("stop")
@click.argument("name", metavar="NAME")
@address_option
def stop(name: str, address: str | None) -> None:
    """Stop the job NAME. What it has finished stays: submitted again, it continues.

    Where jobs of that name write to different outputs, nothing is stopped, and their ids are listed: give one.

    \b
    Exit codes: 0 stopped, or it had ended already; 1 it does not end; 2 there is no such job, or no cluster.
    """
    from clifflab.runtime.submit.client import connect, find_job

    cluster = connect(address)
    job = find_job(cluster, name, alone=True)
    if not job.active:
        click.echo(f"{job.id} ({job.out}) had ended already ({job.status})")
        return
    status = cluster.stop(job.id)
    if status in ("pending", "running"):
        click.echo(f"clifflab: {job.id} was told to stop, and still runs; see clifflab ls", err=True)
        sys.exit(1)
    click.echo(f"{job.id} ({job.out}) {status}; submitted again, it continues")


@click.command("ls")
@address_option
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def ls(address: str | None, as_json: bool) -> None:
    """List the jobs that clifflab sent to a cluster, the latest last."""
    from clifflab.runtime.submit.client import connect

    jobs = connect(address).jobs()
    if as_json:
        shown = [{**asdict(job), "exit": None if job.active else job.exit} for job in jobs]
        click.echo(json.dumps(shown, indent=2))
        return
    if not jobs:
        click.echo("no jobs")
        return
    rows = [("ID", "KIND", "STATE", "SINCE", "TOOK", "RESULTS")]
    for job in jobs:
        state = job.status if job.status != "failed" else f"failed ({job.exit})"
        since = time.strftime("%m-%d %H:%M", time.localtime(job.started)) if job.started else ""
        took = f"{(job.ended or time.time()) - job.started:,.0f} s" if job.started else ""
        rows.append((job.id, job.kind, state, since, took, job.out))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
