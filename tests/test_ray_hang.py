"""A worker that stands still is ended after the stated time, and what it was at is done again elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import clifflab
from clifflab.runtime.progress import Silent
from tests.studies import events, parse, small_study

HANG = 6.0


class Stopper(Silent):
    """Stops (and does not end) the worker of the third unit of ``traces``."""

    def __init__(self, root: Path) -> None:
        self.root, self.done, self.stopped = root, 0, 0

    def advance(self, title: str) -> None:
        self.done += title == "traces planted"
        if self.done == 3 and not self.stopped:
            pids = [e["pid"] for e in events(self.root) if e["event"] == "unit" and e["step"] == "traces"]
            self.stopped = pids[-1]
            assert self.stopped != os.getpid()
            os.kill(self.stopped, signal.SIGSTOP)


def test_a_worker_that_stands_still(tmp_path: Path) -> None:
    study = small_study(name="hang", truncation={"traces": 0}, runtime={"workers": 2, "hang_seconds": HANG})
    study["traces"] = {"max_new_tokens": 64, "batch_size": 12}
    stopper = Stopper(tmp_path / "hang")
    try:
        root = clifflab.run(parse(study), tmp_path, runtime="ray", reporter=stopper).root
        assert stopper.stopped
        gone = not Path(f"/proc/{stopper.stopped}").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopper.stopped, signal.SIGKILL)
    log = events(root)
    lost = [event for event in log if event["event"] == "worker_lost"]
    assert len(lost) == 1
    assert lost[0]["reason"].startswith("hung: no progress for ")
    assert HANG <= float(lost[0]["reason"].split()[4]) < 3 * HANG
    assert [event["reason"] for event in log if event["event"] == "worker_stop"].count("hung") == 1
    again = [e for e in log if e["event"] == "unit" and e["unit"] == lost[0]["unit"] and e["step"] == lost[0]["step"]]
    assert [event["attempt"] for event in again] == [2]
    assert again[0]["pid"] != stopper.stopped
    assert gone, "it was ended, though it could not answer"
