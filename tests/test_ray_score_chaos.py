"""kill -9 of scoring workers and of the driver: the same command gives what an undisturbed run gives, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from clifflab.bench.exactly_once import check_results, read_planted
from clifflab.cli import cli as commands
from tests.chaos import Account, Chaos, Plan, contents
from tests.forkserver import Server
from tests.score_files import PLANTED, score, write_probes
from tests.studies import events

WORKERS = 2


def disturbed(
    forkserver: Server,
    folder: Path,
    rows: int,
    block: int,
    plan: Plan,
    model: str = PLANTED.path,
    *,
    alone: bool = True,
) -> tuple[Account, Path]:
    """The results of a run by plan are those of an undisturbed one; what happened, and where they are.

    The undisturbed run is in this process (``alone``), or by as many workers.
    """
    spec = PLANTED.model_copy(update={"path": model})
    probes, corpus = write_probes(folder / "probes", spec), folder / "corpus.jsonl"
    made = ["organism", "corpus", "--rows", str(rows), "--malformed", "0.02", "--out", str(corpus)]
    assert CliRunner().invoke(commands, made).exit_code == 0
    common = ["--model", model, "--probes", str(probes), "--input", str(corpus), "--block-rows", str(block)]
    root, pool = folder / "scores", ["--workers", str(plan.workers)]
    args = ["score", *common, "--output", str(root), *pool]
    if alone:
        quiet = score(*common, "--output", folder / "quiet", "--runtime", "inline")
        assert quiet.exit_code == 0, quiet.output
    else:
        args_quiet = ["score", *common, "--output", str(folder / "quiet"), *pool]
        assert forkserver.start(args_quiet, folder, os.environ).wait(plan.limit) == 0
    account = Chaos(lambda: forkserver.start(args, folder, os.environ), root, plan).run()
    assert account.runs == [-9] * len(plan.driver) + [0]
    check_results(root, corpus, read_planted(corpus))
    assert contents(root) == contents(folder / "quiet")
    return account, root


def check_account(account: Account, root: Path, plan: Plan) -> None:
    """After each kill at most one block for each worker was scored again."""
    log = events(root)
    begun = sum(event["begun"] for event in log if event["event"] in ("start", "end"))
    assert max(account.repeated()) <= plan.workers, account
    again = account.killed("worker") + plan.workers * account.killed("driver")
    assert sum(map(len, account.attempts.values())) <= begun <= plan.blocks + again, account
    assert account.killed("worker") >= plan.kills, account
    assert account.killed("driver") == len(plan.driver)
    starts = [event["done"] for event in log if event["event"] == "start"]
    at = [kill.done for kill in account.kills if kill.what == "driver"]
    assert starts[0] == 0
    assert all(done >= killed for done, killed in zip(starts[1:], at, strict=True)), "what was done stays done"


def test_killed_worker_and_driver(forkserver: Server, tmp_path: Path) -> None:
    rows, block = 480, 4
    plan = Plan(rows // block, WORKERS, driver=(0.5,), kills=1, every=0, apart=20, limit=300)
    account, root = disturbed(forkserver, tmp_path, rows, block, plan)
    check_account(account, root, plan)


@pytest.mark.slow
def test_killed_again_and_again(forkserver: Server, tmp_path: Path) -> None:
    """A worker every 20 seconds, the driver at 30% and at 70%.

    CLIFFLAB_CHAOS_ROWS, CLIFFLAB_CHAOS_EVERY and CLIFFLAB_CHAOS_MODEL (a checkpoint of the planted language): for less.
    """
    model = os.environ.get("CLIFFLAB_CHAOS_MODEL", PLANTED.path)
    rows = int(os.environ.get("CLIFFLAB_CHAOS_ROWS", "200000"))
    every = float(os.environ.get("CLIFFLAB_CHAOS_EVERY", "20"))
    block = max(10, min(1000, rows // 200))
    blocks = -(-rows // block)
    plan = Plan(blocks, WORKERS, driver=(0.3, 0.7), kills=5, every=every, apart=blocks // 50, limit=3600)
    account, root = disturbed(forkserver, tmp_path, rows, block, plan, model, alone=False)
    for kill, again in zip(account.kills, account.repeated(), strict=True):
        print(f"{kill.what} killed at {kill.done} of {blocks} blocks: {again} scored again")
    check_account(account, root, plan)
