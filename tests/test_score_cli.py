"""Options of ``clifflab score``: what cannot be meant is one line that names the option, before anything is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from clifflab.errors import InputError, OutputError
from clifflab.scoring import commit as committing
from tests.score_files import PLANTED, practice, score, write_jsonl, write_probes


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_probes(tmp_path_factory.mktemp("probes") / "planted")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return write_jsonl(tmp_path / "in" / "corpus.jsonl", practice(6))


def refused(*args: object) -> str:
    result = score(*args)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return str(line).removeprefix("clifflab: ")


def run(corpus: object, probes: Path, out: object, *more: object) -> Any:
    given = ("--model", PLANTED.path, "--probes", probes, "--input", corpus, "--output", out)
    return score(*given, *(() if "--runtime" in more else ("--runtime", "inline")), *more)


def not_run(corpus: object, probes: Path, out: object, *more: object) -> str:
    result = run(corpus, probes, out, *more)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return str(line).removeprefix("clifflab: ")


@pytest.mark.parametrize("place", ["s3://bucket/out", "gs://b/o", "memory://o", "file://host/o", "S3://key:pw@b/o"])
def test_results_go_to_a_local_folder(
    place: str, corpus: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = place.replace("key:pw@", "<credentials>@")
    for line in (not_run(corpus, probes, place), refused("--verify", place).replace("--verify", "--output")):
        assert line.startswith(f"--output: {shown}: is no local folder; ")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_results_go_where_a_file_address_says(corpus: Path, probes: Path, tmp_path: Path) -> None:
    result = run(f"file://{corpus}", probes, f"file://{tmp_path}/out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert score("--verify", f"file://{tmp_path}/out", "--rows", 2).exit_code == 0


@pytest.mark.parametrize(
    "pattern", ["in", "in/**", "**/*.parquet", "in/*/scores/*", "in/out/traces", "file:in/**/*.jsonl"]
)
def test_results_lie_outside_of_the_input(pattern: str, corpus: Path, probes: Path, tmp_path: Path) -> None:
    """They would be rows of the next run, and the interrupted job would be another's."""
    scheme, _, rest = pattern.rpartition(":")
    given = f"{scheme}://{tmp_path}/{rest}" if scheme else f"{tmp_path}/{rest}"
    line = not_run(given, probes, tmp_path / "in" / "out")
    assert line.startswith(f"--output: {tmp_path}/in/out: lies where --input looks")
    assert os.listdir(corpus.parent) == ["corpus.jsonl"]


def test_results_may_lie_beside_the_input(corpus: Path, probes: Path) -> None:
    """A pattern that does not reach them is the same input in every run; an interrupted job goes on."""
    out = corpus.parent / "out"

    def stop(path: Path, data: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committing, "write_json", stop)
        assert run(corpus.parent / "*", probes, out).exit_code != 0
    assert list(out.glob("scores/*"))
    result = run(corpus.parent / "*", probes, out)
    assert result.exit_code == 0, result.output
    assert "nothing to do" in run(corpus.parent / "*", probes, out).output


def test_addresses_with_credentials(probes: Path, tmp_path: Path) -> None:
    line = not_run("http://user:hush@127.0.0.1:9/a.jsonl", probes, tmp_path / "out")
    assert line.startswith("--input: http://<credentials>@127.0.0.1:9/a.jsonl: holds a credential; ")
    assert "hush" not in line
    assert not (tmp_path / "out").exists()


def test_errors_name_the_options_of_score(
    corpus: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    line = not_run(corpus, probes, file)
    assert line.startswith(f"--output: {file}: cannot be written (")
    assert line.endswith("; choose a writable --output")
    busy = OutputError("output", tmp_path, "another run is writing there", "wait for it, or choose another --out")
    gone = InputError("output", tmp_path, "is missing", "run the study again: it is computed anew")
    for error, remedy in ((busy, "wait for it, or choose another --output"), (gone, "run again: it is computed anew")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("clifflab.runtime.score.score", fail)
        monkeypatch.setattr("clifflab.scoring.verify.verify", fail)
        assert not_run(corpus, probes, tmp_path / "out") == f"--output: {tmp_path}: {error.problem}; {remedy}"
        assert refused("--verify", tmp_path) == f"--verify: {tmp_path}: {error.problem}; {remedy}"


MANY = 10_000


@pytest.mark.parametrize(
    ("more", "field", "problem"),
    [
        (("--rows", 5), "--rows: 5", "belongs to --verify"),
        (("--max-new-tokens", 5), "--max-new-tokens: 5", "belongs to --generate"),
        (("--column", "prompt=a", "--column", "prompt=b"), "--column: prompt=b", "a second time"),
        (("--name", " "), "--name: ", "is empty"),
        (("--workers", 2), "--workers: 2", "in one process"),
        (("--min-workers", 1), "--min-workers: 1", "in one process"),
        (("--object-store", 100), "--object-store: 100", "in one process"),
        (("--runtime", "ray", "--workers", 2, "--min-workers", 3), "--min-workers: 3", "is above --workers"),
        (("--runtime", "ray", "--min-workers", MANY), f"--min-workers: {MANY}", "places of this machine"),
    ],
)
def test_options_that_would_do_nothing(
    more: tuple[object, ...], field: str, problem: str, corpus: Path, probes: Path, tmp_path: Path
) -> None:
    line = not_run(corpus, probes, tmp_path / "out", *more)
    assert line.startswith(field)
    assert problem in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [("--model", "m"), ("--output", "o"), ("--seed", 0), ("--generate",), ("--runtime", "ray"), ("--probe", "all")],
)
def test_verify_takes_all_from_the_job(more: tuple[object, ...], tmp_path: Path) -> None:
    line = refused("--verify", tmp_path, *more)
    assert line.startswith(f"{more[0]}: ")
    assert "does not go with --verify" in line
