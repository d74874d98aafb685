"""Where a run stands, told by what nobody can trust to be well formed, and by jobs that are no studies."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from clifflab.cli.jobs import logs
from clifflab.cli.status import command
from clifflab.errors import ClifflabError
from clifflab.runtime.status import PREFIX, RunFolder, of_job, parse_line, render, status_line
from clifflab.runtime.status.view import summary_line
from clifflab.runtime.submit.follow import compact
from tests.jobserver import JobServer
from tests.test_status import begun, event, running, send, server, state_of, unit, write

__all__ = ["server"]


def invoke(*args: str) -> Result:
    return CliRunner().invoke(command, args)


def show(snapshot: dict[str, Any]) -> str:
    """All that is ever made of a snapshot."""
    out = StringIO()
    Console(file=out, width=100).print(render(snapshot), summary_line(snapshot), compact(snapshot))
    return out.getvalue()


def full() -> dict[str, Any]:
    """A snapshot with something in every list, as a status line carries it."""
    events = [*running(), *begun(1009, "cliff", "one", 3), unit(1010, "cliff", "one", "0")]
    events.append(event(1011, "model_failed", model="two", step="traces", error="died"))
    found: dict[str, Any] = json.loads(json.dumps(state_of(events)))
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a snapshot."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(snapshot: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(snapshot)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return found


ODD: tuple[Any, ...] = (
    None,
    True,
    "x",
    5,
    -1,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
    KeyError,
)


def test_whatever_a_line_holds_it_is_shown_or_is_none() -> None:
    """Each place of a snapshot takes each odd value in turn."""
    whole, kept, none = full(), 0, 0
    assert parse_line(status_line(whole)) is not None
    for path in places(whole):
        for odd in ODD:
            found = parse_line(PREFIX + json.dumps(changed(whole, path, odd)))
            if found is None:
                none += 1
            else:
                kept += 1
                show(found)
    assert none > 500
    assert kept > 100  # what changes nothing that is shown


@pytest.mark.parametrize(
    "text",
    [
        '{"study": "a", "state": "running"}', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "null", '"x"',
        json.dumps({**full(), "units": [1]}), json.dumps({**full(), "steps": 5}), json.dumps({**full(), "eta_s": "x"}),
        json.dumps({**full(), "state": "\x1b[2J"}),
    ],
    ids=range(10),
)  # fmt: skip
def test_odd_lines_hide_nobody_elses_status(server: JobServer, tmp_path: Path, text: str) -> None:
    assert parse_line(PREFIX + text) is None
    good = status_line(full())
    send(server, "odd", log=f"{good}\n{PREFIX}{text}\n")
    send(server, "none", log=f"{PREFIX}{text}\n")
    for name in ("odd", "none"):
        assert invoke(name, "--address", server.address).exit_code == 0
        shown = CliRunner().invoke(logs, [name, "--address", server.address])
        assert shown.exit_code == 0
    assert "of 6 steps" in invoke("odd", "--address", server.address).output
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / "status.json").write_text(text)
    assert RunFolder(tmp_path / "runs" / "odd").snapshot(1.0)["units"]["total"] == 0
    (tmp_path / "runs" / "odd" / "events.jsonl").write_text(text + "\n")
    assert invoke().exit_code == 0


def test_the_line_of_a_followed_job_says_at_least() -> None:
    told = state_of(running(), 1010)
    assert told["eta_at_least"]
    assert compact(told).endswith("at least 17 s left")
    assert compact({**told, "eta_at_least": False}).endswith("about 17 s left")


LINE = status_line(state_of(running()))
RAY_SAYS = "Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars):\n"
REASON = "models.path: /models/none: there is no such folder; give one"


@pytest.mark.parametrize(
    ("log", "code", "message", "error"),
    [
        (f"{'noise ' * 100}\nclifflab: {REASON}\n", 2, f"{RAY_SAYS}{'noise ' * 100}\nclifflab: {REASON}\n", REASON),
        ("", 2, f"{RAY_SAYS}{'noise ' * 100}\nclifflab: {REASON}\n", REASON),
        (f"{LINE}\nTraceback (most recent call last):\n  x\nKeyError: 'a'\n{LINE}\n", 1, RAY_SAYS, "KeyError: 'a'"),
        ("clifflab: a warning\nTraceback (most recent call last):\nOSError: b", 1, "", "OSError: b"),
        ("clifflab: a warning\n", None, "the node died", "the node died"),
        ("", 1, "x " * 500 + "the end", "the end"),
        ("clifflab: \x1b[2Jx", 1, "", "\\x1b[2Jx"),
    ],
)
def test_a_failed_job_says_why(server: JobServer, log: str, code: int | None, message: str, error: str) -> None:
    send(server, "broke", status="FAILED", code=code, log=log, message=message)
    found = invoke("broke", "--address", server.address)
    assert found.exit_code == 1
    assert error in " ".join(found.output.split())
    assert "\x1b" not in found.output
    shown = json.loads(invoke("broke", "--address", server.address, "--json").output)
    assert shown["error"] == error or (len(shown["error"]) <= 300 and shown["error"].endswith(error))


def test_a_job_that_fails_behind_its_last_step_is_not_done() -> None:
    done = state_of([*running(), event(1011, "run_done", state="done")])
    assert of_job(done, "a", "failed", 1, "", "no space")["state"] == "failed"
    assert of_job(done, "a", "failed", 1, "", "no space")["error"] == "no space"
    assert of_job(done, "a", "failed", 3)["state"] == "done"


def test_a_job_that_tells_nothing_is_not_called_whole(server: JobServer) -> None:
    for name, status in {"ended": "SUCCEEDED", "fresh": "RUNNING"}.items():
        send(server, name, status=status, code=0, log="hello\n")
        shown = invoke(name, "--address", server.address).output
        assert "nothing was told of its progress" in shown
        assert "already" not in shown
        assert " 0 s" not in shown
        assert "0 of 0" not in shown


def test_the_list_asks_for_no_log_and_names_the_ids(
    server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(server, "one", status="FAILED", code=4)
    send(server, "two")
    assert isinstance(invoke().exception, ClifflabError)  # no cluster is named
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
    jobs = [["clifflab-one-12345678", "partial", "/results"], ["clifflab-two-12345678", "running", "/results"]]
    assert [line.split() for line in invoke().output.splitlines()] == jobs
    write(tmp_path / "runs" / "here", [*running(), event(1011, "run_done", state="done")])
    here, *others = invoke().output.splitlines()
    assert here.startswith("here ")
    assert [line.split() for line in others] == jobs
    told = [json.loads(line) for line in invoke("--json").output.splitlines()]
    assert [(each.get("study"), each.get("job"), each["state"]) for each in told] == [
        ("here", None, "done"), (None, jobs[0][0], "partial"), (None, jobs[1][0], "running")
    ]  # fmt: skip
    assert not [path for _, path, _, _ in server.asked if path.endswith("/logs")]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    found = invoke()
    assert found.exit_code == 0
    assert here in found.output.splitlines()
    assert "clifflab: the jobs of the cluster are not shown: " in found.output
