"""``clifflab score`` on a disk that fills up stops with one line and goes on later; leftovers of killed runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clifflab.errors import WorkerError
from clifflab.scoring.job import Folder
from clifflab.scoring.worker import MAX_ATTEMPTS, BlockScorer
from tests.chaos import contents
from tests.score_files import PLANTED, practice, score, write_jsonl, write_probes

ROWS, BLOCK = 400, 20
# In a mount namespace of its own: a small disk, the command, then a larger disk and the command again.
CODE = """
import json, os, shutil, subprocess, sys
from pathlib import Path
from tests.score_files import score
place = Path("disk/scores").absolute()
first = score(*sys.argv[1:], "--output", place)
receipts = [file.name for file in place.glob("receipts/*")]
scratch = [str(file) for file in place.rglob("*.tmp")]
subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)
second = score(*sys.argv[1:], "--output", place)
shutil.copytree(place, "scores")
codes, outputs = [first.exit_code, second.exit_code], [first.output, second.output]
print(json.dumps({"codes": codes, "outputs": outputs, "receipts": receipts, "scratch": scratch}))
"""


@pytest.mark.parametrize("runtime", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_stops_it_and_it_goes_on(tmp_path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mount namespace, so no small disk can be made")
    probes = write_probes(tmp_path / "probes")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", practice(ROWS))
    args = ["--model", PLANTED.path, "--probes", str(probes), "--input", str(corpus), "--block-rows", str(BLOCK)]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    script = 'mkdir disk && mount -t tmpfs -o size=160k tmpfs disk && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", CODE, *args, "--runtime", runtime]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["codes"] == [2, 0], told
    lines = [line for line in told["outputs"][0].splitlines() if not line.startswith("reading the ids")]
    assert len(lines) == 1, told
    assert "no space left on the disk; make space and run again: it continues" in lines[0]
    assert 0 < len(told["receipts"]) < ROWS // BLOCK
    assert told["scratch"] == [], "nothing half-written is left"
    log = [json.loads(line) for line in (tmp_path / "scores/events.jsonl").read_text().splitlines()]
    assert [event["done"] for event in log if event["event"] == "start"] == [0, len(told["receipts"])]
    whole = score(*args, "--output", tmp_path / "whole", "--runtime", "inline")
    assert whole.exit_code == 0, whole.output
    assert contents(tmp_path / "scores") == contents(tmp_path / "whole")


def test_killed_at_the_first_file(tmp_path: Path) -> None:
    """A file that was being written when the command was killed is not somebody else's, and does not stay."""
    probes = write_probes(tmp_path / "probes")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", practice(4))
    args = ["--model", PLANTED.path, "--probes", str(probes), "--input", str(corpus), "--runtime", "inline"]
    out = tmp_path / "out"
    out.mkdir()
    (out / ".job.json.123-ab.tmp").write_text("{")
    done = score(*args, "--output", out)
    assert done.exit_code == 0, done.output
    assert list(out.glob(".*.tmp")) == []
    (out / "mine.tmp").write_text("keep")
    (out / "job.json").unlink()
    assert "holds other files (mine.tmp)" in score(*args, "--output", out, "--overwrite").output


def test_attempts_count_within_a_run(tmp_path: Path) -> None:
    """A block whose workers kept dying is given up, and tried anew by the next run: its settings may be others."""
    probes = write_probes(tmp_path / "probes")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", practice(4))
    args = ["--model", PLANTED.path, "--probes", str(probes), "--input", str(corpus), "--runtime", "inline"]
    out = tmp_path / "out"
    assert score(*args, "--output", out).exit_code == 0
    (out / "manifest.json").unlink()
    scorer = object.__new__(BlockScorer)
    scorer._folder = Folder(out)
    for _ in range(MAX_ATTEMPTS):
        scorer._attempt(0)
    with pytest.raises(WorkerError, match="block 0 was begun 5 times"):
        scorer._attempt(0)
    done = score(*args, "--output", out, "--token-budget", 64)
    assert done.exit_code == 0, done.output
    log = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["begun"] for event in log if "begun" in event] == [0, 1, MAX_ATTEMPTS, 1]
