"""``clifflab score`` and ``tune`` tell where they stand as studies do; their outputs hold no link that leads out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from clifflab.artifacts import locked
from clifflab.cli.status import command
from clifflab.config import TuneConfig
from clifflab.errors import InputError, OutputError
from clifflab.runtime import study as study_module
from clifflab.runtime import tune
from clifflab.runtime.score_pool import InlinePool
from clifflab.runtime.status import LINES, of_job, parse_line, read_log
from clifflab.runtime.tune import Progress, fit
from tests.score_files import PLANTED, practice, score, write_jsonl, write_probes
from tests.studies import parse, small_study
from tests.test_status import event, state_of

ROWS, BLOCK = 30, 10


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small corpus and how it is scored, but for the output."""
    place = tmp_path_factory.mktemp("status")
    corpus, probes = write_jsonl(place / "corpus.jsonl", practice(ROWS)), write_probes(place / "probes")
    return ["--model", PLANTED.path, "--probes", str(probes), "--input", str(corpus), "--block-rows", str(BLOCK),
            "--runtime", "inline"]  # fmt: skip


def states(output: str) -> list[tuple[str, int, int]]:
    told = [found for line in output.splitlines() if (found := parse_line(line))]
    return [(found["state"], found["units"]["done"], found["units"]["total"]) for found in told]


def test_a_scoring_job_tells_where_it_stands(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clifflab.runtime.status._LINE_EVERY", 0.0)
    out, run = tmp_path / "scores", InlinePool.run

    def breaks(self: InlinePool, *given: Any) -> Any:
        for number, receipt in enumerate(run(self, *given)):
            if number == 1:
                raise InputError("corpus", "row 11", "cannot be read", "mend it")
            yield receipt

    monkeypatch.setenv(LINES, "1")
    monkeypatch.setattr(InlinePool, "run", breaks)
    failed = score(*args, "--output", out)
    assert failed.exit_code == 2
    told = json.loads((out / "status.json").read_text())
    assert (told["study"], told["state"], told["units"]["done"]) == ("scores", "failed", 1)
    assert "row 11: cannot be read" in told["error"]
    monkeypatch.setattr(InlinePool, "run", run)
    done = score(*args, "--output", out)
    assert done.exit_code == 0, done.output
    assert states(done.output) == [("running", 2, 3), ("running", 3, 3), ("done", 3, 3)]
    found = json.loads((out / "status.json").read_text())
    assert (found["rows"], found["run"]) == (
        BLOCK,
        1,
    )  # of this run; the block that was done when the first one failed is there
    assert of_job(*read_log(done.output)[:1], "job", "succeeded", 0)["units"]["done"] == 3
    assert "done" in CliRunner().invoke(command, [str(out)]).output
    monkeypatch.setattr("clifflab.runtime.score.finish", lambda *_: 1 / 0)
    (out / "manifest.json").unlink()
    with pytest.raises(ZeroDivisionError):
        score(*args, "--output", out)
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    assert not states(score(*args, "--output", out).output)  # nobody asked for lines
    monkeypatch.setenv(LINES, "1")
    again = score(*args, "--output", out)
    assert "nothing to do" in again.output
    assert states(again.output) == [("done", 0, 0)]


def test_the_time_left_of_a_scoring_job_knows_its_workers() -> None:
    events = [event(0, "start", blocks=10, done=0, begun=0)]
    events += [event(2, "block", block=n, read=5, tokens=9, seconds=2.0, pid=n % 2, node="n") for n in range(4)]
    assert state_of(events)["eta_s"] == 6 * 2.0 / 2


def test_a_tuning_tells_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training of four steps, one of which a worker that died does again, and how it may end."""
    monkeypatch.setenv(LINES, "1")
    monkeypatch.setattr("clifflab.runtime.status._LINE_EVERY", 0.0)
    monkeypatch.setattr(tune, "fetch", lambda *_: None)
    rows = [{"prompt": f"p {n}", "response": "r", "id": str(n)} for n in range(4)]
    data, out = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "out"

    def train(self: Any, group: object, listen: Any) -> dict[str, Any]:
        listen("start", {"steps": 4, "done": 1})
        listen("step", {"step": 2, "tokens": 7})
        listen("start", {"steps": 4, "done": 1})
        for step in (2, 3):
            listen("step", {"step": step, "tokens": 7})
        if not held.exists():
            assert json.loads((out / "status.json").read_text())["state"] == "running"
            raise InputError("loss", "nan", "is no number", "take a smaller learning rate")
        listen("step", {"step": 4, "tokens": 7})
        return {}

    held = tmp_path / "second"
    monkeypatch.setattr(tune._Body, "__call__", train)
    with pytest.raises(InputError):
        fit(PLANTED, str(data), out, TuneConfig(), runtime="inline")
    told = json.loads((out / "status.json").read_text())
    assert (told["state"], told["units"]["done"], told["lost"]["lost"]) == ("failed", 3, 1)
    assert "is no number" in told["error"]
    (tmp_path / "trap").write_text("kept")
    (out / "adapter").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="leads out of the results"):
        fit(PLANTED, str(data), out, TuneConfig(), runtime="inline")
    (out / "adapter").unlink()
    capsys.readouterr()
    held.touch()
    fit(PLANTED, str(data), out, TuneConfig(), runtime="inline")
    told = json.loads((out / "status.json").read_text())
    assert (told["state"], told["units"]["done"], told["tokens"]) == ("done", 4, 21)
    assert states(capsys.readouterr().out)[-1] == ("done", 4, 4)
    assert "done  1 of 1 steps, 4/4 units" in CliRunner().invoke(command, [str(out)]).output
    killed = json.dumps({**told, "state": "running"})
    (out / "status.json").write_text(killed)
    stopped = CliRunner().invoke(command, [str(out)])  # nobody holds its lock
    assert "stopped" in stopped.output
    assert stopped.exit_code == 1


def test_links_in_outputs_are_refused(args: list[str], tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "scores"
    outside.mkdir()
    out.mkdir()
    (out / "scores").symlink_to(outside)
    result = score(*args, "--output", out)
    assert result.exit_code == 2
    assert "--output" in result.output
    assert "leads out of the results" in result.output
    assert not list(outside.iterdir())
    (out / "scores").unlink()
    (outside / "file").write_text("kept")
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(outside / "file")
    result = score(*args, "--output", out)
    assert result.exit_code == 2
    assert ".lock: is a link, and must be a file of its own" in result.output
    assert (outside / "file").read_text() == "kept"


def test_a_study_looks_for_links_once_it_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another run links while this one waits would be missed by a look before."""
    study, looked = parse(small_study()), []

    def look(root: Path) -> None:
        with pytest.raises(OutputError, match="another run is writing there"), locked(root):
            pass
        looked.append(root)
        raise OutputError("output", root, "leads out", "remove it")

    monkeypatch.setattr(study_module, "refuse_links", look)
    with pytest.raises(OutputError, match="leads out"):
        study_module.run(study, tmp_path, runtime="inline")
    assert looked == [tmp_path / study.name]
    assert not (tmp_path / study.name / "study.yaml").exists()


def test_progress_needs_no_listener() -> None:
    from clifflab.runtime.progress import Silent

    progress = Progress(Silent(), "m")
    progress("start", {"steps": 1, "done": 0})
    progress("step", {"step": 1, "tokens": 1})
    progress.close()
