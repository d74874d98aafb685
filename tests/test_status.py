"""Watching: events become a state, the state is told in a file, in a job's log and on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from clifflab.cli.status import command
from clifflab.errors import ClifflabError
from clifflab.runtime import status
from clifflab.runtime.events import EventLog, EventReader, read_events
from clifflab.runtime.status import LINES, PREFIX, RunFolder, Watcher, of_job, parse_line, render, status_line
from clifflab.runtime.status.state import RunState
from tests.buckets import writable
from tests.jobserver import Job, JobServer

HOSTILE = "[red]x[/nonsense] \x1b[2J\u202e"
Events = list[dict[str, Any]]


def event(time: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": name, **fields}


def begun(time: float, step: str, model: str | None, units: int, missing: int | None = None) -> Events:
    missing = units if missing is None else missing
    about = {"step": step, "model": model}
    return [
        event(time, "step_start", **about, units=units, missing=missing),
        event(time, "ready", **about, units=missing, key=model),
    ]


def unit(time: float, step: str, model: str | None, name: str, seconds: float = 2.0, **fields: Any) -> dict[str, Any]:
    about = {"step": step, "model": model, "unit": name, "seconds": seconds, "worker": "a"}
    return event(time, "unit", **{**about, "rows": 10, "tokens": 100, **fields})


def state_of(events: Events, now: float | None = None, **options: bool) -> dict[str, Any]:
    state = RunState("study")
    for each in events:
        state.add(each)
    return state.snapshot(events[-1]["time"] if now is None else now, **options)


PLAN = [["prompts", None], ["traces", "one"], ["cliff", "one"], ["traces", "two"], ["cliff", "two"], ["report", None]]


def running() -> Events:
    """Two models whose steps run at the same time; one unit of each is done."""
    return [
        event(1000, "run_start", runtime="ray", steps=6, plan=PLAN, models=["one", "two"], address="10.0.0.1:6379"),
        event(1001, "workers", gpus=2, places=3),
        event(1002, "worker_start", worker="a", kind="model", node="n1", pid=5, gpu_ids=["0"], seconds=1.0),
        event(1002, "worker_start", worker="b", kind="model", node="n2", pid=5, gpu_ids=["0"], seconds=1.0),
        event(1002, "model_load", worker="a", model="one", seconds=1.0),
        *begun(1003, "prompts", None, 1),
        unit(1004, "prompts", None, "0", 0.5, tokens=0),
        event(1004, "step_done", step="prompts", model=None, prompts=10),
        *begun(1004, "traces", "one", 10, missing=8),
        *begun(1004, "traces", "two", 5),
        unit(1006, "traces", "one", "2"),
        unit(1006, "traces", "two", "0", 4.0),
        unit(1008, "traces", "one", "3", 4.0),
    ]


def by(entries: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    return {f"{entry[key]}": entry for entry in entries}


def test_steps_of_several_models_run_at_the_same_time() -> None:
    found = state_of(running(), 1010)
    assert found["state"] == "running"
    assert found["progress"] == {"done": 1, "begun": 3, "total": 6}
    steps = {(step["step"], step["model"]): step for step in found["steps"]}
    assert steps["traces", "one"]["units"] == {"total": 10, "done": 4, "failed": 0, "queued": 6}
    assert steps["traces", "two"]["units"] == {"total": 5, "done": 1, "failed": 0, "queued": 4}
    assert steps["traces", "one"]["rows"] == 20
    assert steps["traces", "one"]["tokens"] == 200
    assert steps["traces", "one"]["busy_s"] == 6.0
    models = by(found["models"], "model")
    assert {name: model["state"] for name, model in models.items()} == {"one": "running", "two": "running"}
    assert models["one"]["steps"] == {"done": 0, "total": 2}
    assert found["workers"]["now"] == found["workers"]["nodes"] == 2
    assert by(found["workers"]["list"], "worker")["a"]["model"] == "one"
    assert found["throughput"] == {"window_s": 10.0, "units_per_s": 0.4, "rows_per_s": 4.0, "tokens_per_s": 30.0}


def test_time_left_is_what_is_measured_and_the_rest_is_called_unknown() -> None:
    found = state_of(running(), 1010)
    assert found["eta_s"] == (6 * 3.0 + 4 * 4.0) / 2  # the units left, at their model's mean, over two workers
    assert found["eta_at_least"]
    assert found["eta_unknown"] == 3  # two cliffs and the report
    untimed = state_of([*running(), *begun(1010, "cliff", "one", 4)])
    assert (untimed["eta_s"], untimed["eta_unknown"]) == (17.0, 3)  # begun, but no unit of it was timed anywhere
    other = state_of([*running(), *begun(1010, "cliff", "one", 4), *begun(1010, "cliff", "two", 4), *[
        unit(1011, "cliff", "one", "0", 8.0)
    ]])  # fmt: skip
    assert other["eta_s"] == (18.0 + 16.0 + 3 * 8 + 4 * 8) / 2  # of the other model's too
    assert state_of(running()[:5])["eta_s"] is None
    last = [*running(), *(unit(1011, "traces", "one", f"{n}") for n in range(4, 10))]
    assert state_of([*last, *(unit(1011, "traces", "two", f"{n}") for n in range(1, 4))])["eta_s"] == 2.5  # one unit


def test_speed_is_that_of_the_last_minutes() -> None:
    many = [unit(1010 + n, "traces", "one", f"u{n}") for n in range(500)]
    found = state_of([*running(), *many], 1509)
    assert found["throughput"]["units_per_s"] == pytest.approx(1.0, abs=0.02)
    assert state_of([*running(), *many], 1900)["throughput"]["units_per_s"] < 0.7  # nothing came for long
    done = state_of([*running(), event(1100, "run_done", state="done")], 9999)
    assert done["elapsed_s"] == 100
    assert done["throughput"]["units_per_s"] == 0.04


def test_a_resume_begins_anew_and_counts_what_was_done() -> None:
    resumed = [*running(), event(2000, "run_start", runtime="ray", steps=1, models=["one"])]
    resumed += [*begun(2001, "traces", "one", 10, missing=6), unit(2002, "traces", "one", "4")]
    found = state_of(resumed)
    assert found["run"] == 2
    assert found["units"] == {"total": 10, "done": 5, "failed": 0, "queued": 5}
    assert [step["step"] for step in found["steps"]] == ["traces"]
    assert found["workers"]["now"] == 0
    assert found["eta_s"] == 10.0


def test_a_unit_told_twice_counts_once() -> None:
    found = state_of([*running(), unit(1009, "traces", "one", "3", attempt=2)])
    assert by(found["models"], "model")["one"]["units"]["done"] == 4


def test_a_failed_model_and_how_the_run_ends() -> None:
    failing = [
        *running(),
        event(1010, "unit_failed", step="traces", model="two", unit="1", attempts=4, error="died"),
        event(1010, "model_failed", step="traces", model="two", unit=None, error=f"cannot be\nread {HOSTILE}"),
    ]
    found = state_of(failing)
    models = by(found["models"], "model")
    assert (models["two"]["state"], models["two"]["step"]) == ("failed", "traces")
    assert models["two"]["error"] == "cannot be read [red]x[/nonsense] \\x1b[2J\\u202e"
    assert models["two"]["units"]["failed"] == 1
    assert models["one"]["state"] == found["state"] == "running"
    assert found["eta_s"] == 9.0  # of the other model alone
    assert found["eta_unknown"] == 2  # and so are the steps to come
    rest = [*failing, event(1011, "step_done", step="traces", model="one"), *begun(1011, "cliff", "one", 0)]
    rest += [event(1012, "step_done", step="cliff", model="one")]
    assert by(state_of(rest)["models"], "model")["one"]["state"] == "done"
    told = [{"model": "two", "step": "traces", "error": "cannot be read"}]
    partial = state_of([*rest, event(1013, "run_done", state="partial", failed=told)])
    assert partial["state"] == "partial"
    assert {m["model"]: m["state"] for m in partial["models"]} == {"one": "done", "two": "failed"}
    assert len(partial["failures"]) == 2
    failed = state_of([*running(), event(1011, "run_done", state="failed", error="workers died everywhere")])
    assert (failed["state"], failed["error"]) == ("failed", "workers died everywhere")
    assert {m["state"] for m in failed["models"]} == {"unfinished"}


def test_what_follows_from_a_failed_model_fails_with_it() -> None:
    events = [*running(), *begun(1009, "traces", "one-after", 4)]
    events += [event(1010, "model_failed", model="one", models=["one", "one-after"], step="traces", error="died")]
    found = state_of(events)
    assert {m["model"]: m["state"] for m in found["models"]} == {
        "one": "failed", "two": "running", "one-after": "failed"
    }  # fmt: skip
    assert found["eta_s"] == 8.0
    assert len(found["failures"]) == 1


def test_models_wait_run_and_are_done() -> None:
    states = [{m["model"]: m["state"] for m in state_of(running()[:stop])["models"]} for stop in (1, 5, len(running()))]
    assert states == [
        {"one": "waiting", "two": "waiting"},
        {"one": "running", "two": "waiting"},
        {"one": "running", "two": "running"},
    ]
    assert by(state_of([*running(), event(1011, "run_done")])["models"], "model")["one"]["state"] == "done"


def test_lost_and_hung_workers_count_once() -> None:
    lost = {"step": "traces", "model": "one", "attempt": 1}
    found = state_of([
        *running(),
        event(1009, "worker_lost", worker="a", unit="4", reason="the actor died", **lost),
        event(1009, "worker_stop", worker="a", reason="lost"),
        event(1010, "worker_stop", worker="b", reason="hung"),
        event(1010, "worker_lost", worker="b", unit="5", reason="no progress for 30 s", **lost),
    ])  # fmt: skip
    assert found["lost"] == {"lost": 1, "hung": 1, "retried": 2}
    assert found["workers"]["now"] == 0


def test_a_scoring_job_is_a_run_of_one_step() -> None:
    found = state_of([
        event(1, "start", blocks=10, done=2, begun=0),
        event(3, "block", block=2, read=50, scored=49, tokens=500, seconds=2.0, pid=4, node="n"),
    ])  # fmt: skip
    assert found["units"] == {"total": 10, "done": 3, "failed": 0, "queued": 7}
    assert (found["rows"], found["tokens"], found["eta_s"]) == (50, 500, 14.0)
    assert state_of([event(1, "start", blocks=0, done=0), event(2, "end")])["state"] == "done"


def test_a_log_that_a_killed_driver_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).write("run_start", steps=1)
    with path.open("a") as handle:
        handle.write('{"time": 3, "event": "un')
    told: Events = []
    reader = EventReader(path)
    assert [e["event"] for e in reader.new()] == ["run_start"]
    log = EventLog(path, [told.append])
    log.write("run_start", steps=2)
    log.write("run_done", state="done")
    assert [(e["event"], e.get("steps")) for e in reader.new()] == [("run_start", 2), ("run_done", None)]
    assert [e["event"] for e in told] == ["run_start", "run_done"]
    with path.open("ab") as handle:
        handle.write(b"[1]\n\xff\n\n")
    assert len(read_events(path)) == 3
    assert read_events(tmp_path / "none.jsonl") == []


def test_status_is_written_and_told_once_in_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LINES, "1")
    now, written, told = [0.0], [], []
    monkeypatch.setattr(status, "write_status", lambda root, snapshot: written.append(now[0]))
    watcher = Watcher(tmp_path, "study", clock=lambda: now[0])
    for second in range(0, 2 * 3600, 2):
        now[0] = float(second)
        watcher.add(unit(now[0], "traces", "one", str(second)) if second else event(0, "run_start", steps=1))
        if capsys.readouterr().out:
            told.append(second)
    assert told[:3] == [0, 10, 20]
    assert told[-3:] == [7070, 7130, 7190]
    assert len(told) == 360 + 60
    assert written[:3] == [0, 6, 12]
    monkeypatch.undo()
    watcher.add(event(now[0] + 1, "run_done", state="done"))
    last = parse_line(capsys.readouterr().out)
    assert last is not None
    assert last["state"] == "done"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    watcher.close()
    assert not capsys.readouterr().out


def test_a_run_that_fails_by_a_bug_says_so_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watcher = Watcher(tmp_path, "study")
    for each in running():
        watcher.add(each)
    watcher.close()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    assert not capsys.readouterr().out  # nobody asked for lines


def test_a_full_disk_does_not_end_what_is_watched(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "file" / "below", "study")
    (tmp_path / "file").write_text("")
    watcher.add(event(1, "run_start", steps=1))


def test_lines_of_a_job_are_found_among_others() -> None:
    snapshot = state_of(running())
    line = status_line(snapshot)
    assert "\n" not in line
    assert parse_line(line) == parse_line(f"\x1b[36m(driver)\x1b[0m {line}\n")
    found = parse_line(line)
    assert found is not None
    assert found["units"] == snapshot["units"]
    for wrong in ("hello", line[:-9], PREFIX + "[1]", PREFIX + "{}", ""):
        assert parse_line(wrong) is None


def test_how_a_job_ended_is_told_too() -> None:
    told = state_of(running())
    states = {
        ("running", None): "running", ("stopped", None): "stopped", ("succeeded", 0): "done", ("failed", 1): "failed",
        ("failed", 4): "partial", ("failed", 3): "done", ("failed", None): "failed",
    }  # fmt: skip
    for (ended, code), state in states.items():
        assert of_job(told, "study", ended, code, "the driver died")["state"] == state
    assert of_job(told, "study", "failed", 1, "the driver died")["error"] == "the driver died"
    assert of_job(None, "study", "pending")["state"] == "waiting"
    assert of_job({**told, "state": "partial"}, "study", "failed", 1)["state"] == "partial"
    shown(of_job(None, "study", "failed", None, HOSTILE))


def shown(snapshot: dict[str, Any], width: int = 100) -> str:
    out = StringIO()
    Console(file=out, width=width, highlight=False).print(render(snapshot))
    return out.getvalue()


def test_what_is_shown_fits_and_cannot_steer_the_terminal() -> None:
    name = "a-model-with-a-very-long-name-" * 3
    events = running()
    events[0]["models"] = ["one", "two", name, HOSTILE]
    events += begun(1009, f"step {HOSTILE}", HOSTILE, 3)
    events += [event(1010, "model_failed", step="traces", model=HOSTILE, error=f"cannot be read: {HOSTILE}; mend it")]
    events += [event(1010, "worker_start", worker="c", kind="model", node=HOSTILE, pid=1, gpu_ids=["0", HOSTILE])]
    text = shown(state_of(events))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]x[/nonsense]" in text
    assert "running" in text
    assert "at least 11 s (3 steps not timed yet)" in text
    assert [line for line in text.splitlines() if line.startswith("[red]x[/nonsense] \\x1b[2J\\u202e failed at traces")]
    assert text.count("failed  traces") == 1
    assert "node n1: GPU 0 one" in text
    shown(state_of([event(1, "nothing")]))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(command, args)


def write(folder: Path, events: Events) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    return folder


def test_the_command_reads_a_folder_and_its_exit_code_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    endings = {"done": 0, "partial": 4, "failed": 1}
    for state, code in endings.items():
        folder = write(tmp_path / "runs" / state, [*running(), event(1011, "run_done", state=state)])
        for name in (state, f"runs/{state}", str(folder)):
            result = invoke(name)
            assert (result.exit_code, state in result.output) == (code, True)
    listed = invoke()
    assert listed.exit_code == 0
    assert [line.split()[:2] for line in listed.output.splitlines()] == [[s, s] for s in ("done", "failed", "partial")]
    assert json.loads(invoke("done", "--json").output)["units"]["done"] == 6
    assert invoke("done", "--watch").exit_code == 0
    gone = invoke("nope", "--audit")
    assert "events.jsonl" in str(gone.exception)


def test_a_run_whose_driver_is_gone_is_stopped(tmp_path: Path) -> None:
    folder = write(tmp_path / "study", running())
    assert RunFolder(folder).snapshot(2000)["state"] == "stopped"
    result = invoke(str(folder))
    assert result.exit_code == 1
    assert "the same command continues" in result.output
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        reader = RunFolder(folder)
        assert reader.snapshot(2000)["state"] == "running"
        assert "nothing heard for" in invoke(str(folder)).output
        with (folder / "events.jsonl").open("a") as handle:
            handle.write(json.dumps(event(2001, "run_done", state="done")) + "\n")
        assert reader.snapshot(2002)["state"] == "done"


def test_a_folder_without_its_log_tells_what_was_told_last(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path, "study")
    for each in [*running(), event(1011, "run_done", state="partial")]:
        watcher.add(each)
    assert invoke(str(tmp_path)).exit_code == 4
    (tmp_path / "status.json").write_text('{"study"')
    assert RunFolder(tmp_path).snapshot(1.0)["units"]["total"] == 0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    """A job server, named nowhere; the working folder and the home are empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = JobServer()
    yield found
    found.close()


def send(server: JobServer, name: str, **job: Any) -> None:
    sent = {"submission_id": f"clifflab-{name}-12345678", "entrypoint": "clifflab run", "metadata": {}}
    sent["metadata"] = {"clifflab": "0.1.0", "name": name, "kind": "study", "out": "/results"}
    server.jobs[sent["submission_id"]] = Job(sent, **job)


def test_a_job_on_a_cluster_is_read_from_its_log(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [status_line(state_of(running()[:stop])) for stop in (3, len(running()))]
    send(server, "busy", log="\n".join(["hello", lines[0], "more", lines[1], PREFIX + '{"study": "cut"']))
    send(server, "broke", status="FAILED", code=1, log=lines[1] + "\n")
    send(server, "half", status="FAILED", code=4, log=lines[1] + "\n")
    send(server, "fresh", status="PENDING")
    codes = {"busy": 0, "broke": 1, "half": 4, "fresh": 0}
    for name, code in codes.items():
        assert invoke(name, "--address", server.address).exit_code == code
    busy = invoke("busy", "--address", server.address)
    assert "study  running  1 of 6 steps, 6/16 units" in busy.output
    assert "fresh  waiting" in invoke("fresh", "--address", server.address).output
    listed = invoke("--address", server.address).output.splitlines()
    assert [line.split() for line in listed] == [
        ["clifflab-busy-12345678", "running", "/results"],
        ["clifflab-broke-12345678", "failed", "/results"],
        ["clifflab-half-12345678", "partial", "/results"],
        ["clifflab-fresh-12345678", "waiting", "/results"],
    ]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
    assert invoke("busy").output == busy.output
    none = invoke("other")
    assert isinstance(none.exception, ClifflabError)
    assert none.exception.exit_code == 2
    write(Path("runs/busy"), [*running(), event(1011, "run_done", state="done")])
    assert invoke("busy").output.startswith("busy  done")  # what is here comes first


def test_without_a_run_and_a_cluster_one_line_says_so(server: JobServer) -> None:
    for arguments in (("nope",), (), ("nope", "--audit"), ("nope", "--address", "http://127.0.0.1:9")):
        error = invoke(*arguments).exception
        assert isinstance(error, ClifflabError)
        assert error.exit_code == 2
        assert "\n" not in str(error)


def test_a_run_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clifflab.scoring import filesystems

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setattr(filesystems, "_ATTEMPTS", 1)
    local = write(tmp_path / "local", [*running(), event(1011, "run_done", state="partial")])
    with writable() as held:
        monkeypatch.setenv("AWS_ENDPOINT_URL", held.endpoint)
        filesystems._remote.cache_clear()
        log = (local / "events.jsonl").read_bytes()
        held.put("runs/far/events.jsonl", log[: log.rindex(b'{"time": 1011')])
        assert "far  running" in invoke("s3://shelf/runs/far").output  # its lock is not seen from here
        folder = RunFolder.at("s3://shelf/runs/far/")
        assert folder.snapshot(1012)["state"] == "running"
        held.put("runs/far/events.jsonl", log)
        assert folder.snapshot(1012)["state"] == "partial"
        assert invoke("s3://shelf/runs/far", "--watch").exit_code == 4
        assert "every rule that the log can show" in invoke("s3://shelf/runs/far", "--audit").output
        error = invoke("s3://shelf/runs/near").exception
    filesystems._remote.cache_clear()
    assert isinstance(error, ClifflabError)
    assert "no run wrote there yet" in str(error)


def test_watching_a_long_log_costs_little(tmp_path: Path) -> None:
    os.environ.pop(LINES, None)
    state, start = RunState("study"), time.process_time()
    for each in [*running(), *(unit(1010 + n / 10, "traces", "one", f"u{n}") for n in range(20_000))]:
        state.add(each)
    assert len(status_line(state.snapshot(4000))) < 4000
    assert time.process_time() - start < 3
