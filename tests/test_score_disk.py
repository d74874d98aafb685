"""``clifflab score`` on a disk that fills up: it stops with one line, and goes on when space is made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import contents
from tests.score_files import PLANTED, practice, score, write_jsonl, write_probes

ROWS, BLOCK = 400, 20
# In a mount namespace of its own: a small disk, the command, then a larger disk and the command again. Which blocks
# were committed at the stop stays in the folder `kept`.
SCRIPT = f"""
mkdir disk kept && mount -t tmpfs -o size=160k tmpfs disk || exit 99
run() {{ {sys.executable} -m clifflab score "$@" --output disk/scores > out.$n 2> err.$n; echo $? > code.$n; }}
n=1; run "$@"
ls disk/scores/receipts > kept/receipts; ls -A disk/scores/scores disk/scores/receipts | grep tmp > kept/scratch
mount -o remount,size=64m disk || exit 98
n=2; run "$@"
cp -r disk/scores kept/scores
"""


@pytest.mark.parametrize("runtime", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_stops_it_and_it_goes_on(tmp_path: Path, runtime: str) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mount namespace, so no small disk can be made")
    probes = write_probes(tmp_path / "probes")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", practice(ROWS))
    args = ["--model", PLANTED.path, "--probes", str(probes), "--input", str(corpus), "--block-rows", str(BLOCK)]
    command = ["unshare", "-rm", "sh", "-c", SCRIPT, "sh", *args, "--runtime", runtime]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    codes = [(tmp_path / f"code.{n}").read_text().strip() for n in (1, 2)]
    errors = [(tmp_path / f"err.{n}").read_text() for n in (1, 2)]
    assert codes == ["2", "0"], errors
    lines = [line for line in errors[0].splitlines() if not line.startswith("reading the ids")]
    assert len(lines) == 1
    assert "no space left on the disk; make space and run again: it continues" in lines[0]
    committed = (tmp_path / "kept/receipts").read_text().split()
    assert 0 < len(committed) < ROWS // BLOCK
    assert (tmp_path / "kept/scratch").read_text() == "", "nothing half-written is left"
    starts = [json.loads(line) for line in (tmp_path / "kept/scores/events.jsonl").read_text().splitlines()]
    assert [event["done"] for event in starts if event["event"] == "start"] == [0, len(committed)]
    whole = score(*args, "--output", tmp_path / "whole", "--runtime", "inline")
    assert whole.exit_code == 0, whole.output
    assert contents(tmp_path / "kept/scores") == contents(tmp_path / "whole")
