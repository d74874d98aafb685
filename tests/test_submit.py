"""Sending work to a cluster, without one: what is uploaded, under which name, what is refused, what comes back."""

from __future__ import annotations

import asyncio
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

import aiohttp
import pytest
import yaml

from clifflab.artifacts import locked
from clifflab.cli import main
from clifflab.errors import ClusterError, InputError, OutputError
from clifflab.runtime.nodes import NodeReport, refuse_unseen, sees, sees_output
from clifflab.runtime.status import PREFIX
from clifflab.runtime.status.state import RunState
from clifflab.runtime.storage import open_store
from clifflab.runtime.storage.check import left_probe, refuse_held
from clifflab.runtime.submit.address import is_loopback
from clifflab.runtime.submit.check import examine
from clifflab.runtime.submit.follow import _Feed, compact
from clifflab.runtime.submit.here import package_folder
from clifflab.runtime.submit.ids import JobView, decide, job_id, pick, place_hash
from clifflab.runtime.submit.package import Package
from clifflab.runtime.submit.send import parse_env
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


@pytest.mark.parametrize("mode", ["", "token", "disabled"])
def test_a_token_goes_only_to_those_who_ask(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)

    def own(headers: dict[str, str]) -> dict[str, str]:
        """What Ray's client does in a process that began with that variable, which it reads once."""
        return {"authorization": f"Bearer {TOKEN}"} if mode == "token" and "Authorization" not in headers else {}

    monkeypatch.setattr("ray.dashboard.modules.dashboard_sdk.get_auth_headers_if_auth_enabled", own)
    server.token, server.next = None, Job({}, "SUCCEEDED", "done\n", 0)
    assert call("ls", "--address", server.address)[0] == 0
    assert call("submit", "-f", str(study))[0] == 0
    assert any(path.endswith("/tail") for _, path, _, _ in server.asked)
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


def test_a_token_is_not_sent_on(call: Call, study: Path, server: JobServer) -> None:
    other = JobServer(TOKEN)
    try:
        call("submit", "--no-check", str(study))
        server.elsewhere = other.address
        for words in (("ls",), ("logs", "-f", "small"), ("submit", "--no-check", str(study))):
            refused(call(*words), server.address, "sends elsewhere")
        assert not other.asked

        async def tail() -> None:
            async for _ in connect(None).tail("some"):
                pass

        from clifflab.runtime.submit.client import connect

        with pytest.raises(aiohttp.ClientConnectionError, match="elsewhere"):
            asyncio.run(tail())
        assert not other.asked
    finally:
        other.close()


def test_a_password_file_takes_no_tokens_place(call: Call, server: JobServer, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine 127.0.0.1 login me password pa55\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert call("ls") == (0, "no jobs\n", "")


@pytest.mark.parametrize("bad", ["two\nlines", "two words", "t\u00f6ken"])
def test_an_odd_token_is_not_shown(call: Call, server: JobServer, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", bad)
    done = call("ls")
    refused(done, "token", "no token has")
    assert not any(part in done[2] for part in ("two", "ken_", bad))
    assert not server.asked


def test_a_token_that_is_switched_off(call: Call, server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    refused(call("ls"), "asks for a token, and RAY_AUTH_MODE=disabled", "unset RAY_AUTH_MODE")


def test_a_token_that_all_can_read(call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "plain HTTP" not in call("submit", str(study))[2]
    monkeypatch.setattr("clifflab.runtime.submit.send.is_loopback", lambda address: False)
    assert call("submit", str(study))[2].count("plain HTTP") == 1


@pytest.mark.parametrize(
    ("address", "stays"),
    [("http://127.0.0.1:1", True), ("http://127.9.0.1", True), ("http://[::1]:1", True), ("http://localhost", True),
     ("http://10.0.0.1:1", False), ("http://localhost.example.org", False)],
)  # fmt: skip
def test_what_stays_on_this_machine(address: str, stays: bool) -> None:
    assert is_loopback(address) == stays


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
    os.mkfifo(tmp_path / "pipe.json")
    (home / ".config").mkdir()
    (home / ".config" / "rows.json").write_text("[]")
    (tmp_path / "linked.json").symlink_to(home / ".config" / "rows.json")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "mine.json").write_text(TOKEN)
    (tmp_path / "my.token").symlink_to(tmp_path / "tokens" / "mine.json")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "tokens" / "mine.json"))
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
        Path("/proc/self/environ"): "system",
        Path("/sys/kernel"): "system",
        tmp_path / "pipe.json": "no plain file",
        home / ".config" / "rows.json": "hidden below the home",
        tmp_path / "linked.json": "hidden below the home",
        tmp_path / "my.token": "RAY_AUTH_TOKEN_PATH names",
        tmp_path / "tokens": "RAY_AUTH_TOKEN_PATH names",
        data / "gone": "no such file",
    }.items():
        with pytest.raises(InputError, match=words):
            Package().add("prompts.path", str(path), "files")
    beside = Package(beside=home / ".config" / "studies")
    beside.add("prompts.path", str(home / ".config" / "rows.json"), "files")
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


def test_a_file_that_grows_is_not_sent_whole(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    package = Package(1)
    package.add("prompts.path", str(rows), "files")
    rows.write_bytes(bytes(2 << 20))
    with pytest.raises(InputError, match=r"rows\.json: holds more than it said"):
        package.write(tmp_path / "package.zip")


def test_a_template_is_named_like_one(call: Call, study: Path, server: JobServer) -> None:
    (study.parent / "id_rsa").write_text("key")
    guard = "judge.guard={path: nobody/guard, template: id_rsa}"
    refused(call("submit", str(study), "--set", guard), "judge.guard.template", ".jinja")
    assert not server.asked
    (study.parent / "id_rsa").rename(study.parent / "guard.jinja")
    assert call("submit", str(study), "--set", guard.replace("id_rsa", "guard.jinja"))[0] == 0


def test_links_keep_the_names_they_have(call: Call, study: Path, server: JobServer, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (study.parent / "mine.jsonl").rename(tmp_path / "blobs" / "0a1b")
    (study.parent / "mine.jsonl").symlink_to(tmp_path / "blobs" / "0a1b")
    assert load_study(study).prompts[-1].path == str(study.parent / "mine.jsonl")
    assert call("submit", str(study))[0] == 0
    (archive,) = server.packages.values()
    assert names(archive) == ["files/prompts/mine/mine.jsonl", "study.yaml"]
    server.packages.clear()
    for number, suffix in enumerate((".safetensors", ".json")):
        (tmp_path / "blobs" / str(number)).write_text(suffix)
        (tmp_path / "here" / f"probes{suffix}").symlink_to(tmp_path / "blobs" / str(number))
    options = ("--model", "organism:planted", "--input", "rows/*.jsonl", "--output", "scored")
    assert call("submit", "score", *options, "--probes", "probes.safetensors")[0] == 0
    (archive,) = server.packages.values()
    assert names(archive) == ["files/probes/1/probes.json", "files/probes/1/probes.safetensors"]


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
    with pytest.raises(ClusterError, match=r"2 jobs are called that.*a \(succeeded, \), c \(running, \)"):
        pick([old, live], "small", alone=True)
    assert pick([old, new], "small", alone=True) is new
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


def test_nobody_elses_job_is_stopped(call: Call, study: Path, server: JobServer) -> None:
    mine = call("submit", str(study), "--out", "/mine")[1].strip()
    server.of()[0].status = "SUCCEEDED"
    theirs = call("submit", str(study), "--out", "/theirs")[1].strip()
    refused(call("stop", "small"), "2 jobs are called that", f"{mine} (succeeded, /mine/small)", theirs, "/theirs")
    assert server.of()[1].status == "RUNNING"
    code, out, _ = call("stop", theirs)
    assert (code, server.of()[1].status) == (0, "STOPPED")
    assert "/theirs/small" in out


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


class Lines:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def status(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def test_the_end_of_a_log_is_shown_after_a_break() -> None:
    screen = Lines()
    feed = _Feed(screen)
    feed.take("one\ntw")
    feed.again()  # this connection ends before it comes as far
    feed.take("on")
    feed.rest("one\ntwo\nthree\nfour")
    assert screen.lines == ["one", "two", "three", "four"]


def test_a_half_open_connection_is_left(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clifflab.runtime.submit.wire._SILENCE", 0.3)
    monkeypatch.setattr("clifflab.runtime.submit.follow._PAUSE", 0.05)
    server.half_open, server.next = True, Job({}, "RUNNING", "one\n")

    def end() -> None:
        while not any(path.endswith("/tail") for _, path, _, _ in server.asked):
            time.sleep(0.02)
        job = server.of()[0]
        job.log, job.status, job.code = "one\ntwo\n", "SUCCEEDED", 0

    threading.Thread(target=end, daemon=True).start()
    began = time.monotonic()
    code, out, _ = call("submit", "-f", "--no-check", str(study))
    assert (code, out.splitlines()[1:]) == (0, ["one", "two"])
    assert time.monotonic() - began < 10


ODD = {"type": "SUBMISSION", "submission_id": "odd", "entrypoint": "x", "metadata": {"clifflab": "1"}}


def test_odd_jobs_harm_nobody(call: Call, study: Path, server: JobServer) -> None:
    call("submit", "--no-check", str(study))
    mine = json.loads(call("ls", "--json")[1])
    server.listed = [
        5, None, "x", [], {}, ODD, {**ODD, "status": 7}, {**ODD, "status": "RUNNING", "metadata": 5},
        {**ODD, "status": "RUNNING", "metadata": None}, {**ODD, "status": "RUNNING", "submission_id": [1]},
    ]  # fmt: skip
    assert json.loads(call("ls", "--json")[1]) == mine
    wrong = {"clifflab": 1, "name": 5, "out": ["a"], "base": None, "kind": {}, "digest": 1.5}
    times: dict[str, Any] = {"start_time": 1e300, "end_time": "x", "driver_exit_code": "3", "message": 5}
    server.listed = [{**ODD, "status": "FAILED", "metadata": wrong, **times}]
    code, out, err = call("ls")
    assert (code, err, len(out.splitlines())) == (0, "", 3)
    for answer in ("5", '{"jobs": 1}', "no JSON", '"text"', "[" * 100_000):
        server.answer = answer
        for words in (("ls",), ("logs", "small"), ("stop", "small"), ("submit", str(study))):
            refused(call(*words), server.address)
    server.listed, server.answer = [], None
    for part in ("logs", "submit"):
        server.answer, server.answer_to = "5", part
        given = ["submit", "--no-check", "--set", "name=other", str(study)] if part == "submit" else [part, "small"]
        refused(call(*given), server.address)


def test_nothing_of_a_job_drives_the_terminal(
    call: Call, study: Path, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clifflab.runtime.submit.follow._EXIT_CODE", 0.1)
    evil = "\x1b]0;owned\x07\nclifflab: all is well\u202e"
    metadata = {"clifflab": "1", "name": evil, "kind": evil, "out": evil, "base": evil, "output": "o", "digest": "d"}
    server.listed = [
        {**ODD, "submission_id": f"a{evil}", "status": "RUNNING", "metadata": metadata, "start_time": 1},
        {**ODD, "status": f"RUNNING{evil}", "metadata": metadata, "message": evil},
    ]
    server.found["code"] = evil
    server.next = Job({}, "FAILED", "", None)
    server.message = evil
    for words in (("ls",), ("stop", "odd"), ("stop", "small"), ("submit", "-f", str(study)), ("logs", "nobody")):
        _, out, err = call(*words)
        for character in "\x1b\x07\u202e":
            assert character not in out + err, words
        assert "\nclifflab: all is well" not in out + err


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


# What the nodes say.


def test_findings_of_the_check(call: Call, study: Path, server: JobServer) -> None:
    send = ("submit", str(study), "--out", "/shared/runs")
    good = server.found["nodes"][0]
    changes: dict[str, dict[str, Any]] = {
        "blind": {"sees_output": False, "problem": "not seen"},
        "bare": {"clifflab": None, "sees_output": False, "problem": "clifflab cannot be imported there"},
        "old": {"clifflab": "0.0.9+abc"},
    }
    for bad, words in {
        "blind": ("--out", "10.0.0.2 (bbbb2222) cannot see it", "s3://"),
        "bare": ("10.0.0.2", "clifflab cannot be imported"),
        "old": ("versions of clifflab", "0.0.9"),
    }.items():
        server.found["nodes"] = [good, node(node="bbbb2222", address="10.0.0.2", **changes[bad])]
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


RIGHT = {
    "score": {"--model": "organism:planted", "--probes": "/p", "--input": "/rows/*.jsonl", "--output": "/scored"},
    "tune": {"--model": "nobody/model", "--data": "/train.jsonl", "--out": "/tuned"},
}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("score", {"--model": None}, ("--model", "is required")),
        ("score", {"--probes": None}, ("--probes", "is required")),
        ("score", {"--input": None}, ("--input", "is required")),
        ("score", {"--output": None}, ("--output", "is required")),
        ("score", {"--probe": "nonsense"}, ("--probe", "nonsense")),
        ("score", {"--max-new-tokens": "7"}, ("--generate",)),
        ("score", {"--column": "prompt"}, ("--column", "ROLE=NAME")),
        ("score", {"--input": "/scored/**"}, ("--output", "lies where --input looks")),
        ("score", {"--workers": "1", "--min-workers": "2"}, ("--min-workers",)),
        ("score", {"--follow": ""}, ("--follow", "give it before score")),
        ("score", {"-f": ""}, ("-f", "give it before score")),
        ("score", {"--out": "/x"}, ("--out", "score calls it --output")),
        ("tune", {"--name": "mine"}, ("--name", "give it before tune")),
        ("tune", {"--set": "epochs=-1"}, ("epochs", "-1")),
        ("tune", {"--thinking-format": "none-such"}, ("--thinking-format",)),
        ("tune", {"--data": "~nobody-here/x"}, ("--data", "no user here")),
        ("tune", {"--model": "~nobody-here/x"}, ("--model", "no user here")),
        ("tune", {"--data": "x" * 5000}, ("--data", "too long")),
        ("score", {"--probes": "~nobody-here/x"}, ("--probes", "no user here")),
        ("score", {"--output": "/out\udcff"}, ("--output", "UTF-8")),
    ],
)
def test_a_wrong_task_is_not_sent(
    call: Call, server: JobServer, kind: str, changes: dict[str, str | None], words: tuple[str, ...]
) -> None:
    options = {**RIGHT[kind], **changes}
    given = [word for name, value in options.items() if value is not None for word in (name, value) if word]
    refused(call("submit", kind, *given), *words)
    assert not server.asked


def test_a_right_task_is_sent(call: Call, server: JobServer) -> None:
    for kind, options in RIGHT.items():
        assert call("submit", kind, *(word for pair in options.items() for word in pair))[0] == 0
    for kind in RIGHT:
        done = call("submit", kind, "--model", "m")
        assert done[0] == 2
    assert len(server.jobs) == 2


@pytest.mark.parametrize("path", ["~nobody-here/x", "x" * 5000])
def test_no_path_is_a_bug(call: Call, study: Path, server: JobServer, path: str) -> None:
    for words in (
        ("submit", str(study), "--data", path),
        ("run", str(study), "--data", path),
        ("submit", str(study), "--set", f"judge.labels={path}"),
        ("submit", str(study), "--set", f"judge.guard={{path: g/uard, template: '{path}'}}"),
        ("submit", str(study), "--set", f"judge.guard={{path: '{path}'}}"),
        ("submit", str(study), "--out", path),
        ("tune", "--model", "nobody/model", "--data", path, "--out", "x"),
        ("tune", "--model", path, "--data", "x.jsonl", "--out", "x"),
    ):
        refused(call(*words))
    refused(call("submit", "x" * 5000), "study", "too long")
    assert not server.asked


def test_a_name_that_is_no_text(call: Call, study: Path, server: JobServer) -> None:
    folder = study.parent / "rows"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "a\udcff.json").write_text("[]")
    refused(call("submit", str(study), "--set", "prompts.3.path=rows"), "prompts.path", "not UTF-8")
    refused(call("submit", str(study), "--out", "runs\udcff"), "--out", "not UTF-8")
    assert not server.jobs


def test_an_output_that_a_run_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **given: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr("clifflab.runtime.nodes.check_nodes", lambda *given: [])
    asked = {"out": str(tmp_path), "name": "small", "paths": [], "seconds": 1}
    assert "error" not in examine(asked)
    assert not (tmp_path / "small").exists(), "nothing is left"
    with locked(tmp_path / "small"):
        field, value, problem, _ = examine(asked)["error"]
    assert (field, value) == ("output", str(tmp_path / "small"))
    assert "another run is writing there (since 20" in problem
    assert f"process {os.getpid()} on host {socket.gethostname()}" in problem
    assert "error" not in examine(asked), "it is held no longer"


def test_a_remote_output_that_a_run_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://held", "small")
    refuse_held("memory://held", "small")
    with store.lock(), pytest.raises(OutputError, match="another run is writing there"):
        refuse_held("memory://held", "small")
    refuse_held("memory://held", "small")
    store.close()


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
    assert parse_env(["MONKEYS=1", "TOKENIZERS_PARALLELISM=0", "HF_HOME=/data/hf_cache", "AUTHOR=me", "BYPASS=1"])
    for value in (
        "hf_" + "a" * 34, "AKIA" + "A" * 16, "https://host/x?sv=1&sig=abc", "https://u:pw1@host/", "sig=abc",
        "ghp_" + "a" * 36, "https://host/x?y",
    ):  # fmt: skip
        done = call("submit", str(study), "--env", f"PLAIN={value}")
        refused(done, "--env", "PLAIN", "holds a credential")
        assert value not in done[2]
    refused(call("submit", str(study), "--env", "RAY_AUTH_MODE=disabled"), "RAY_AUTH_MODE", "cluster's own")
    for bad in (
        "HF_TOKEN=x", "AWS_SECRET_ACCESS_KEY=x", "my_password=x", "GOOGLE_APPLICATION_CREDENTIALS=/f", "DB_PASS=x",
        "MYSQL_PWD=x", "HTTP_AUTH=x", "AZURE_SAS=x", "OPENAI_API_KEY=x",
    ):  # fmt: skip
        done = call("submit", str(study), "--env", bad)
        refused(done, bad.partition("=")[0], "looks like a secret", "where ray start runs")
    refused(call("submit", str(study), "--env", "P=http://u:pw1@host/"), "--env", "credential")
    refused(call("submit", str(study), "--out", "s3://u:pw1@bucket/runs"), "--out", "credential")
    assert "pw1" not in call("submit", str(study), "--out", "s3://u:pw1@bucket/runs")[2]


SECRET_ADDRESSES = ("https://me:pl4nted@host/x", "s3://pl4nted@bucket/x.jsonl", "https://host/x.jsonl?sig=pl4nted")


@pytest.mark.parametrize("address", SECRET_ADDRESSES)
def test_no_address_of_a_study_holds_a_secret(call: Call, study: Path, server: JobServer, address: str) -> None:
    choice = f"[{{name: c, path: '{address}'}}]"
    corpus = f"[{{name: c, path: '{address}', label: harmful}}]"
    for setting in (
        f"models.0.path={address}", f"models.0.adapter={address}", f"prompts.0.path={address}",
        f"judge.labels={address}", f"judge.guard={{path: '{address}'}}",
        f"judge.guard={{path: g/uard, template: '{address}'}}", f"repair.corpus={corpus}",
        f"repair.evaluate.choices={choice}",
    ):  # fmt: skip
        done = call("submit", str(study), "--set", setting)
        refused(done, setting.split("=")[0].split(".")[0], "credential")
        assert "pl4nted" not in done[2]
        done = call("run", str(study), "--dry-run", "--set", setting)
        refused(done, "credential")
        assert "pl4nted" not in done[2]
    score = {"--model": "organism:planted", "--probes": "/p", "--input": "/rows/*.jsonl", "--output": "/scored"}
    tune = {"--model": "nobody/model", "--data": "/train.jsonl", "--out": "/tuned"}
    for kind, options in (("score", score), ("tune", tune)):
        for option in options:
            words = [word for pair in {**options, option: address}.items() for word in pair]
            done = call("submit", kind, *words)
            refused(done, option, "credential")
            assert "pl4nted" not in done[2]
    assert not server.asked, "nothing was sent"
