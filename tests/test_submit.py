"""Sending work to a cluster, without one: what is uploaded, under which name, what is refused, what comes back."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clifflab.cli import main
from clifflab.errors import ClusterError, InputError
from clifflab.runtime.nodes import NodeReport, refuse_unseen, sees, sees_output
from clifflab.runtime.status import PREFIX, status_line
from clifflab.runtime.status.state import RunState
from clifflab.runtime.storage.check import left_probe
from clifflab.runtime.submit.follow import compact
from clifflab.runtime.submit.here import package_folder
from clifflab.runtime.submit.ids import JobView, decide, job_id, pick, place_hash
from clifflab.runtime.submit.package import Package
from clifflab.studyfile import load_study
from tests.jobserver import Job, JobServer, node
from tests.studies import small_study

TOKEN = "t0ken-of-the-cluster"
SECRETS = {"HF_TOKEN": "hf_planted", "AWS_SECRET_ACCESS_KEY": "aws_planted", "RAY_AUTH_TOKEN": TOKEN}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    found = JobServer(TOKEN)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", found.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    yield found
    found.close()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """``clifflab ARGS`` in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clifflab", *args])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study with a file of its own beside it."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "mine.jsonl").write_text('{"prompt": "a"}\n')
    data = small_study()
    data["prompts"].append({"name": "mine", "path": "mine.jsonl", "label": "harmful"})
    (folder / "s.yaml").write_text(yaml.safe_dump(data))
    return folder / "s.yaml"


def refused(done: tuple[int, str, str], *words: str) -> None:
    code, out, err = done
    assert (code, out) == (2, ""), done
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("clifflab: ")
    for word in words:
        assert word in err, err


# Reaching a cluster.


def test_what_is_wrong_is_said_within_seconds(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    refused(call("submit", str(study)), server.address, "the token is wrong", "RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    refused(call("submit", str(study)), "asks for a token", "none was found")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/token")
    refused(call("submit", str(study)), "RAY_AUTH_TOKEN_PATH", "/no/such/token")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    server.version = "2.9.3"
    refused(call("ls"), "runs Ray 2.9.3")
    refused(call("ls", "--address", "http://127.0.0.1:1"), "nothing listens there")
    refused(call("ls", "--address", "http://no-such-host.invalid"), "no machine of that name")
    refused(call("ls", "--address", "ray://127.0.0.1:10001"), "takes no jobs", "http://HOST:8265")
    done = call("ls", "--address", "http://me:pa55word@127.0.0.1:8265")
    refused(done, "holds a password")
    assert "pa55word" not in done[2]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        began_silent = time.monotonic()
        refused(call("ls", "--address", f"127.0.0.1:{silent.getsockname()[1]}"), "does not answer within")
        assert time.monotonic() - began_silent < 4.5
    assert time.monotonic() - began < 12
    assert not server.jobs


def test_a_token_goes_only_to_those_who_ask(call: Call, server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = None
    code, _, _ = call("ls", "--address", server.address)
    assert code == 0
    assert not any(TOKEN in str(headers) for _, _, headers, _ in server.asked)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        place = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"

        def answer() -> None:
            connection, _ = elsewhere.accept()
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {server.address}/stolen\r\n\r\n".encode())
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        refused(call("ls", "--address", place), "no Ray dashboard", "302")
    assert not any(path == "/stolen" for _, path, _, _ in server.asked)


def test_the_address_given_wins(call: Call, server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    assert call("ls", "--address", server.address)[:2] == (0, "no jobs\n")
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:2"


# What is uploaded.


def names(archive: bytes) -> list[str]:
    return sorted(zipfile.ZipFile(io.BytesIO(archive)).namelist())


def test_only_what_the_study_names_is_uploaded(call: Call, study: Path, server: JobServer, tmp_path: Path) -> None:
    (study.parent / "other.txt").write_text("not named")
    code, out, _ = call("submit", str(study), "--out", "/shared/runs")
    assert code == 0
    (job,) = server.of()
    assert out.strip() == job.sent["submission_id"] == job_id("small", "/shared/runs/small")
    assert shlex.split(job.sent["entrypoint"]) == [
        "python", "-m", "clifflab", "run", "study.yaml", "--out", "/shared/runs", "--address", "auto",
    ]  # fmt: skip
    (archive,) = server.packages.values()
    assert names(archive) == ["files/prompts/mine/mine.jsonl", "study.yaml"]
    assert job.sent["runtime_env"]["env_vars"]["CLIFFLAB_STATUS_LINES"] == "1"
    assert not server.of("submit.check"), "the check is deleted"
    zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path / "there")
    there = load_study(tmp_path / "there" / "study.yaml")
    assert Path(there.prompts[-1].path).read_text() == '{"prompt": "a"}\n'
    assert there.prompts[:-1] == load_study(study).prompts[:-1]


def test_the_same_content_is_the_same_package(tmp_path: Path) -> None:
    made = []
    for folder in ("one", "two"):
        (tmp_path / folder / "set").mkdir(parents=True)
        for name in ("b.jsonl", "a.jsonl") if folder == "one" else ("a.jsonl", "b.jsonl"):
            (tmp_path / folder / "set" / name).write_text(name)
        os.utime(tmp_path / folder / "set" / "a.jsonl", (1, 1))
        package = Package()
        package.text("study.yaml", "x: 1")
        package.add("prompts.path", str(tmp_path / folder / "set"), "files")
        package.write(tmp_path / f"{folder}.zip")
        made.append((package.hashes(), (tmp_path / f"{folder}.zip").read_bytes()))
    assert made[0] == made[1]


def test_what_is_never_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, data = tmp_path / "home", tmp_path / "data"
    for folder in (home / ".ssh", data / ".git", data / "deep"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / ".ssh" / "id.json").write_text("key")
    (home / "secret.json").write_text("secret")
    (data / ".git" / "config").write_text("url")
    (data / ".env").write_text("HF_TOKEN=x")
    (data / "deep" / "rows.json").write_text("[]")
    for path, words in {
        home: "home folder",
        tmp_path: "home folder",
        Path("/"): "home folder",
        home / ".ssh": "credentials",
        home / ".ssh" / "id.json": "credentials",
        Path("/dev/null"): "no plain file",
        data / "gone": "no such file",
    }.items():
        with pytest.raises(InputError, match=words):
            Package().add("prompts.path", str(path), "files")
    package = Package()
    package.add("prompts.path", str(data), "files")
    assert list(package.hashes()) == ["files/data/deep/rows.json"]
    assert len(package.notes) == 1
    assert ".git" in package.notes[0]
    (data / "deep" / "inside.json").symlink_to(data / "deep" / "rows.json")
    assert len(package.hashes()) == 1
    Package().add("prompts.path", str(data), "files")
    (data / "out.json").symlink_to(home / "secret.json")
    with pytest.raises(InputError, match=r"out\.json.*leads out"):
        Package().add("prompts.path", str(data), "files")
    (data / "out.json").unlink()
    (data / "folder").symlink_to(home)
    with pytest.raises(InputError, match="link to a folder"):
        Package().add("prompts.path", str(data), "files")


def test_an_upload_has_a_limit(call: Call, study: Path, server: JobServer) -> None:
    (study.parent / "mine.jsonl").write_bytes(b'{"prompt": "a"}\n' * (2 << 16))
    server.found["nodes"][1] = node(address="10.0.0.2", missing=[str(study.parent / "mine.jsonl")])
    refused(call("submit", str(study), "--max-upload", "1"), "prompts.path", "mine.jsonl is 2", "limit is 1")
    assert not server.of()
    server.found["nodes"][1] = node(address="10.0.0.2")  # too large to send, and every node has it
    assert call("submit", str(study), "--max-upload", "1")[0] == 0
    (archive,) = server.packages.values()
    assert names(archive) == ["study.yaml"]


def test_models_are_read_in_place_or_uploaded(
    call: Call, study: Path, server: JobServer, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = checkpoints["llama"]
    args = ("submit", str(study), "--set", f"models.0.path={model}", "--out", str(tmp_path / "runs"))
    assert call(*args)[0] == 0
    (job,) = server.of()
    archives = list(server.packages.values())
    assert names(archives[0]) == ["files/prompts/mine/mine.jsonl", "study.yaml"]
    digest = job.sent["metadata"]["digest"]
    job.status = "STOPPED"
    server.found["nodes"][1] = node(address="10.0.0.2", missing=[str(model)])
    code, _, err = call(*args)
    assert code == 0
    assert "not seen by every node" in err
    again = server.of()[1]
    assert again.sent["submission_id"] == f"{job.sent['submission_id']}-2"
    assert again.sent["metadata"]["digest"] == digest, "where a model is read does not make another job"
    archive = zipfile.ZipFile(io.BytesIO(list(server.packages.values())[1]))
    assert f"files/models/planted/{model.name}/config.json" in archive.namelist()
    assert f"files/models/planted/{model.name}" in archive.read("study.yaml").decode()
    again.status = "STOPPED"
    server.found["nodes"][1] = node(address="10.0.0.2", missing=["/no/model"])
    refused(call("submit", str(study), "--set", "models.0.path=/no/model"), "models.path", "/no/model", "10.0.0.2")
    two = "[{name: whole, path: 'organism:planted'}, {name: lost, path: /no/model}]"
    code, _, err = call("submit", str(study), "--set", f"models={two}")
    assert code == 0, "the other model is worth it"
    assert "lost: /no/model: node 10.0.0.2 (aaaa1111) cannot see it, so this model will fail" in err


# Names.


def view(submission_id: str, **changes: Any) -> JobView:
    made = {"base": submission_id.split("#")[0], "name": "small", "kind": "study", "status": "succeeded", **changes}
    return JobView(id=submission_id.replace("#", "-"), **made)


def test_the_same_study_is_the_same_job() -> None:
    base, place = job_id("small", "/out/small"), "/out/small"
    same = {"output": place_hash(place), "digest": "d"}
    assert decide([], "small", place, "d") == base
    assert decide([view(base, **same)], "small", place, "d") == f"{base}-2"
    assert decide([view(base, **same), view(f"{base}#10", **same)], "small", place, "e") == f"{base}-11"
    running = view(f"{base}#2", **same, status="pending")
    assert decide([view(base, **same), running], "small", place, "d") is running
    with pytest.raises(ClusterError, match="another study"):
        decide([running], "small", place, "e")
    with pytest.raises(ClusterError, match="same output"):
        decide([running], "other", place, "d")
    assert job_id("small", "/out/small") != job_id("small", "/elsewhere/small")


def test_a_job_is_found_by_its_name() -> None:
    old, new, other = view("a", started=1.0), view("a#2", started=2.0), view("b", started=3.0, name="b")
    assert pick([old, new, other], "small") is new
    assert pick([old, new, other], "a") is old
    twin = view("c", started=4.0)
    with pytest.raises(ClusterError, match="2 jobs are called that"):
        pick([old, twin], "small")
    live = view("c", started=0.5, status="running")
    assert pick([old, live], "small") is live
    with pytest.raises(ClusterError, match="no job is called that"):
        pick([old], "nope")


def test_twice_is_once(call: Call, study: Path, server: JobServer) -> None:
    code, first, _ = call("submit", str(study))
    assert code == 0
    code, again, err = call("submit", str(study))
    assert (code, again) == (0, first)
    assert "runs already" in err
    assert len(server.of()) == 1
    refused(call("submit", str(study), "--set", "seed=7"), "another study", "clifflab stop")
    refused(call("submit", str(study), "--name", "other"), "same output")
    code, out, _ = call("stop", "small")
    assert (code, "stopped" in out) == (0, True)
    assert call("submit", str(study), "--set", "seed=7")[1].strip() == f"{first.strip()}-2"
    assert first.strip() in call("ls")[1]


@pytest.mark.parametrize("late", ["same", "other"])
def test_two_at_the_same_moment(call: Call, study: Path, server: JobServer, late: str) -> None:
    server.late = late
    done = call("submit", str(study))
    assert len(server.of()) == 1
    if late == "same":
        assert done[0] == 0
        assert "runs already" in done[2]
    else:
        refused(done, "another study")


# What comes back.


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 4, 4), ("FAILED", -9, 137), ("FAILED", None, 1),
     ("STOPPED", None, 130)],
)  # fmt: skip
def test_exit_codes(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch, status: str, code: int | None,
    exit_code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("clifflab.runtime.submit.follow._EXIT_CODE", 0.1)
    server.next = Job({}, status, "first\nlast", code)
    done, out, err = call("submit", "--follow", "--no-check", str(study))
    assert done == exit_code
    assert out.splitlines()[1:] == ["first", "last"]
    assert (f"exit code {exit_code}" in err) == bool(exit_code)
    assert call("logs", "small")[1].splitlines() == ["first", "last"]


def test_a_broken_connection_shows_nothing_twice(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clifflab.runtime.submit.follow._PAUSE", 0.05)
    units = {"total": 9, "done": 4, "failed": 1, "queued": 4}
    step = {"step": "traces", "model": "planted", "state": "running", "units": units, "rows": 0, "tokens": 0}
    status = {**RunState("small").snapshot(0.0), "units": units, "eta_s": 61.0, "steps": [{**step, "busy_s": 0.0}]}
    lines = ["one", PREFIX + json.dumps(status), "two", PREFIX + json.dumps(status), "three"]
    log = "\n".join(lines) + "\n"
    server.next, server.break_after = Job({}, "SUCCEEDED", log, 0), [2, 0, len(log) - 3]
    server.next.status = "RUNNING"
    done: list[int] = []

    def end() -> None:
        while not server.of() or server.break_after:
            time.sleep(0.02)
        job = server.of()[0]
        job.log += "\x1b[31mfour\n"
        job.status, job.code = "SUCCEEDED", 0
        done.append(1)

    threading.Thread(target=end, daemon=True).start()
    code, out, err = call("submit", "-f", "--no-check", str(study))
    assert (code, done) == (0, [1])
    assert out.splitlines()[1:] == ["one", "two", "three", "\\x1b[31mfour"]
    assert err.count("4/9 units") == 1
    assert compact(status) == "small: running, traces planted, 4/9 units, 1 failed, about 61 s left"
    assert "the connection broke" in err


def test_following_ends_when_the_cluster_is_gone(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clifflab.runtime.submit.follow._PAUSE", 0.05)
    from clifflab.runtime.submit.client import connect, find_job
    from clifflab.runtime.submit.follow import follow

    call("submit", str(study), "--no-check")
    cluster = connect(None)
    job = find_job(cluster, "small")
    server.close()

    class Quiet:
        def line(self, text: str) -> None: ...

        status = note = line

    with pytest.raises(ClusterError, match="does not answer any more; the job goes on"):
        follow(cluster, job, Quiet(), patience=0.3)


def test_the_last_status_of_a_job(call: Call, study: Path, server: JobServer) -> None:
    from clifflab.runtime.submit.client import connect, find_job, last_status

    call("submit", str(study), "--no-check")
    cluster = connect(None)
    assert last_status(cluster, find_job(cluster, "small")) is None
    told = RunState("small").snapshot(0.0)
    server.of()[0].log = f'{status_line(told)}\nlast\n{PREFIX}{{"cut'
    assert last_status(cluster, find_job(cluster, "small")) == told


# What the nodes say.


def test_findings_of_the_check(call: Call, study: Path, server: JobServer) -> None:
    send = ("submit", str(study), "--out", "/shared/runs")
    good = server.found["nodes"][0]
    for bad, words in {
        "blind": ("--out", "10.0.0.2 (bbbb2222) cannot see it", "s3://"),
        "bare": ("10.0.0.2", "clifflab cannot be imported"),
        "old": ("versions of clifflab", "0.0.9"),
    }.items():
        changes = {
            "blind": {"sees_output": False, "problem": "not seen"},
            "bare": {"clifflab": None, "sees_output": False, "problem": "clifflab cannot be imported there"},
            "old": {"clifflab": "0.0.9+abc"},
        }[bad]
        server.found["nodes"] = [good, node(node="bbbb2222", address="10.0.0.2", **changes)]
        refused(call(*send), *words)
    server.found["nodes"] = [good]
    refused(call(*send, "--set", "models.0.gpus=2"), "models.gpus", "largest node has 0")
    server.found["error"] = ["--out", "/shared/runs", "the head node cannot write there", "choose another"]
    refused(call(*send), "the head node cannot write there")
    server.check_log = "Running entrypoint\n/usr/bin/python: No module named clifflab\n"
    refused(call(*send), "--python", "finds no clifflab on the cluster")
    assert not server.jobs, "nothing was sent, and the checks are deleted"
    server.check_log, server.found["token"], server.found["free"] = None, False, {"CPU": 0.0, "GPU": 0.0}
    del server.found["error"]
    code, _, err = call(*send)
    assert code == 0
    assert "asks for no token" in err
    assert "all CPU cores are busy" in err


def test_an_output_is_seen_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clifflab.runtime.nodes._SETTLE", 0.1)
    here, there = str(tmp_path / "runs"), str(tmp_path / "other disk")
    with left_probe(here, "small", "t", "driver"):
        assert sees_output(here, "small", "t", "n1") == ""
        assert "not seen" in sees_output(there, "small", "t", "n2")
        assert "cannot be written" in sees_output("/proc/runs", "small", "t", "n3")
    assert not (tmp_path / "runs").exists(), "nothing is left"


def test_paths_on_a_node(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert sees(str(tmp_path / "a.jsonl"))
    assert sees(str(tmp_path / "*.jsonl"))
    assert not sees(str(tmp_path / "*.csv"))
    assert sees(f"file://{tmp_path}/a.jsonl")
    assert not sees(f"file://{tmp_path}/b.jsonl")
    lacking = NodeReport(**{**node(), "missing": ("/m",)})
    with pytest.raises(InputError, match=r"/m: node 10\.0\.0\.1"):
        refuse_unseen([lacking], "/out")


# Tasks.


def test_a_scoring_is_sent(call: Call, server: JobServer, tmp_path: Path) -> None:
    probes = tmp_path / "run" / "planted"
    probes.mkdir(parents=True)
    for name in ("probes.safetensors", "probes.json", "traces.parquet"):
        (probes / name).write_text(name)
    options = ("--model", "organism:planted", "--probes", str(probes), "--input", "rows/*.jsonl", "--output", "scored")
    code, _, _ = call("submit", "score", *options, "--keep-traces", "--sample", "0.5", "--column", "prompt=q")
    assert code == 0
    (job,) = server.of("clifflab score")
    here = tmp_path / "here"
    words = shlex.split(job.sent["entrypoint"])[3:]
    given = dict(itertools.pairwise(words))
    assert words[0] == "score"
    assert given["--input"] == str(here / "rows/*.jsonl")
    assert given["--output"] == str(here / "scored")
    assert given["--probes"] == "files/probes/1/probes.safetensors"
    assert (given["--sample"], given["--column"], given["--address"]) == ("0.5", "prompt=q", "auto")
    assert "--keep-traces" in words
    assert (job.sent["metadata"]["kind"], job.sent["metadata"]["name"]) == ("score", "scored")
    (archive,) = server.packages.values()
    assert names(archive) == ["files/probes/1/probes.json", "files/probes/1/probes.safetensors"]
    job.status = "SUCCEEDED"
    server.found["nodes"][1] = node(address="10.0.0.2", missing=[str(here / "rows/*.jsonl")])
    refused(call("submit", "score", *options), "--input", "10.0.0.2")
    refused(call("submit", "score", "--verify", "scored"), "--verify", "is not submitted")
    refused(call("submit", "score", "--model", "m"), "--output", "is required")
    refused(call("submit", "--out", "x", "score", *options), "--out", "give it after score")


def test_a_scoring_takes_a_model_of_a_study(
    call: Call, server: JobServer, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    models = [{"name": name, "path": str(checkpoints[name])} for name in ("llama", "qwen2")]
    (tmp_path / "here" / "two.yaml").write_text(yaml.safe_dump(small_study(models=models)))
    server.found["nodes"][1] = node(address="10.0.0.2", missing=[str(checkpoints["qwen2"])])
    options = ("--probes", "/shared/probes", "--input", "s3://bucket/rows", "--output", "/shared/scored")
    code, _, err = call("submit", "score", "--study", "two.yaml", "--model", "qwen2", *options)
    assert code == 0, err
    words = shlex.split(server.of("clifflab score")[0].sent["entrypoint"])
    given = dict(itertools.pairwise(words))
    assert (given["--study"], given["--model"], given["--input"]) == ("study.yaml", "qwen2", "s3://bucket/rows")
    (archive,) = server.packages.values()
    there = yaml.safe_load(zipfile.ZipFile(io.BytesIO(archive)).read("study.yaml"))
    assert [model["path"] for model in there["models"]] == [str(checkpoints["llama"]), "files/models/qwen2/qwen2"]
    assert not any("llama" in name for name in names(archive)), "only what is scored"
    refused(call("submit", "score", *options, "--model", "m", "--output", "s3://bucket/out"), "--output", "no folder")


def test_a_tuning_is_sent(call: Call, server: JobServer, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    code, out, _ = call(
        "submit", "--name", "mine", "tune", "--model", "nobody/model", "--data", str(data), "--out", "/shared/tuned",
        "--set", "epochs=1",
    )  # fmt: skip
    assert code == 0
    assert out.startswith("clifflab-mine-")
    (job,) = server.of("clifflab tune")
    assert shlex.split(job.sent["entrypoint"])[3:] == [
        "tune", "--model", "nobody/model", "--data", "files/data/train.jsonl", "--out", "/shared/tuned", "--set",
        "epochs=1", "--address", "auto",
    ]  # fmt: skip


def test_files_that_were_unpacked_anew_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()
    monkeypatch.chdir(sent)
    monkeypatch.setenv("PWD", str(sent))
    assert package_folder() == ""
    monkeypatch.setenv("CLIFFLAB_PACKAGE", "1")
    sent.rmdir()  # as another node of this machine does, which unpacks the same files
    sent.mkdir()
    assert package_folder() == os.getcwd() == str(sent)
    sent.rmdir()
    with pytest.raises(FileNotFoundError):
        package_folder()


# Secrets.


def test_no_secret_leaves_this_machine(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    server.next = Job({}, "SUCCEEDED", "done\n", 0)
    code, out, err = call("submit", "-f", str(study), "--env", "HF_HUB_OFFLINE=1", "--env", "TOKENIZERS_PARALLELISM=0")
    assert code == 0
    packed = [zipfile.ZipFile(io.BytesIO(archive)) for archive in server.packages.values()]
    contents = [zipped.read(name).decode() for zipped in packed for name in zipped.namelist()]
    bodies = [body.decode(errors="replace") for _, _, _, body in server.asked]
    told = " ".join([out, err, str([job.told() for job in server.jobs.values()]), *contents, *bodies])
    for value in SECRETS.values():
        assert value not in told
    assert server.of()[0].sent["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "1"
    for bad in ("HF_TOKEN=x", "AWS_SECRET_ACCESS_KEY=x", "my_password=x", "GOOGLE_APPLICATION_CREDENTIALS=/f"):
        done = call("submit", str(study), "--env", bad)
        refused(done, bad.partition("=")[0], "looks like a secret", "where ray start runs")
    refused(call("submit", str(study), "--env", "P=http://u:pw1@host/"), "--env", "credential")
    refused(call("submit", str(study), "--out", "s3://u:pw1@bucket/runs"), "--out", "credential")
    assert "pw1" not in call("submit", str(study), "--out", "s3://u:pw1@bucket/runs")[2]
