"""Scoring a corpus in one process: every row once, resumed, verified; one clear line for wrong input."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clifflab import tables
from clifflab.runtime import score as running
from clifflab.scoring import commit as committing
from clifflab.scoring import worker
from tests.score_files import PLANTED, practice, score, write_jsonl, write_probes

ROWS = 120


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_probes(tmp_path_factory.mktemp("probes") / "planted")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[Any] = practice(ROWS)
    rows[7] = {**rows[7], "thinking": None, "response": None}
    rows[11] = {**rows[11], "id": rows[3]["id"]}
    rows[40] = '{"id": "broken", "prompt": '
    rows[41] = [1, 2, 3]
    rows[90] = {**rows[90], "prompt": 5}
    rows[91] = {**rows[91], "thinking": " ".join(["nice"] * 600)}
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


BAD = {"duplicate_id": 1, "not_text": 1, "null": 1, "too_long": 1, "undecodable": 1, "wrong_type": 1}


def run(corpus: Path, probes: Path, out: Path, *more: object) -> Any:
    return score(
        "--model", PLANTED.path, "--probes", probes, "--input", corpus, "--output", out, "--runtime", "inline",
        "--block-rows", 25, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(corpus: Path, probes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    result = run(corpus, probes, out, "--keep-traces")
    assert result.exit_code == 0, result.output
    return out


def read(out: Path, kind: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((out / kind).glob("*.parquet")))


def files(out: Path) -> dict[str, bytes]:
    kept = ("scores", "rejects", "traces")
    return {str(f.relative_to(out)): f.read_bytes() for kind in kept for f in sorted((out / kind).glob("*"))}


def test_every_row_comes_out_once(finished: Path, corpus: Path) -> None:
    scores, rejects = read(finished, "scores"), read(finished, "rejects")
    assert scores.schema == tables.SCORED
    assert sorted(scores["row"].to_pylist() + rejects["row"].to_pylist()) == list(range(ROWS))
    assert Counter(rejects["reason"].to_pylist()) == BAD
    manifest = json.loads((finished / "manifest.json").read_text())
    assert (manifest["read"], manifest["scored"], manifest["reasons"]) == (ROWS, ROWS - len(BAD), BAD)
    assert not (finished / "receipts").exists()
    # A reject names the row and never shows its text.
    nice = rejects.filter(pa.compute.equal(rejects["reason"], "too_long")).to_pylist()[0]
    assert nice["source_row"] == 91
    assert "nice nice" not in nice["detail"]


def test_a_finished_job_returns_at_once(finished: Path, corpus: Path, probes: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(worker, "load", lambda _: pytest.fail("the model was loaded"))
    before = files(finished)
    result = run(corpus, probes, finished, "--keep-traces")
    assert result.exit_code == 0
    assert "nothing to do" in result.output
    assert files(finished) == before


@pytest.mark.parametrize("after", ["scores", "receipt"])
def test_an_interrupted_job_goes_on(
    after: str, finished: Path, corpus: Path, probes: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped between a block's files and its receipt, or just behind it: the rest is done, and nothing twice."""
    written = [0]
    original = committing.write_json if after == "receipt" else committing.write_parquet
    name = original.__name__

    def stop(path: Path, data: Any) -> None:
        original(path, data)
        written[0] += "receipts" in path.parts or "scores" in path.parts
        if written[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(committing, name, stop)
    assert run(corpus, probes, tmp_path / "out", "--keep-traces").exit_code != 0
    monkeypatch.setattr(committing, name, original)
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out/receipts").glob("*.json")}
    assert len(done) == (3 if after == "receipt" else 2)
    result = run(corpus, probes, tmp_path / "out", "--keep-traces")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == files(finished)
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    blocks = Counter(event["block"] for event in events if event["event"] == "block")
    assert set(blocks.values()) == {1}


def test_another_job_is_refused_unless_overwritten(corpus: Path, probes: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(corpus, probes, out, "--max-rows", 30).exit_code == 0
    before = files(out)
    for more, what in (
        (("--max-rows", 31), "another --max-rows"),
        (("--max-rows", 30, "--dtype", "bfloat16"), "another model"),
        (("--max-rows", 30, "--probe", "final"), "other settings"),
    ):
        result = run(corpus, probes, out, *more)
        assert result.exit_code == 2
        assert what in result.output
        assert "--overwrite" in result.output
    other = write_probes(tmp_path / "other", seed=9)
    result = run(corpus, other, out, "--max-rows", 30)
    assert result.exit_code == 2
    assert "other probes" in result.output
    assert files(out) == before
    assert run(corpus, other, out, "--max-rows", 30, "--overwrite").exit_code == 0
    assert files(out) != before


def test_other_probes_are_noticed_by_what_they_read(corpus: Path, probes: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(probes, tmp_path / "mine")
    assert run(corpus, mine, tmp_path / "out", "--max-rows", 30).exit_code == 0
    about = json.loads((mine / "probes.json").read_text())
    about["probes"]["all.logistic"]["reported_layer"] = 1
    (mine / "probes.json").write_text(json.dumps(about))
    result = run(corpus, mine, tmp_path / "out", "--max-rows", 30)
    assert result.exit_code == 2
    assert "other probes" in result.output


def test_a_wrong_command_throws_nothing_away(corpus: Path, probes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(corpus, probes, out, "--column", "prompt=nope").exit_code == 2
    assert run(corpus, probes, out, "--max-rows", 30).exit_code == 0, "nothing was scored: no --overwrite needed"
    before = files(out)
    assert run(corpus, probes, out, "--column", "prompt=nope", "--overwrite").exit_code == 2
    assert files(out) == before
    assert "nothing to do" in run(corpus, probes, out, "--max-rows", 30).output
    # Without a sample or generation the seed decides nothing.
    assert "nothing to do" in run(corpus, probes, out, "--max-rows", 30, "--seed", 5).output


def test_what_a_killed_run_was_writing_is_cleared(corpus: Path, probes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "scores").mkdir(parents=True)
    for name in (".job.json.123-abcd.tmp", "scores/.part-00000000.parquet.9-ab.tmp"):
        (out / name).write_text("cut sho")
    assert run(corpus, probes, out, "--max-rows", 30, "--overwrite").exit_code == 0
    assert not list(out.rglob("*.tmp"))


def test_a_part_that_is_lost_is_done_again(corpus: Path, probes: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    lost = sorted((out / "scores").glob("*"))[1]
    lost.unlink()
    result = run(corpus, probes, out, "--keep-traces")
    assert result.exit_code == 2
    assert f"scores/{lost.name} is missing" in result.output
    assert run(corpus, probes, out, "--keep-traces", "--overwrite").exit_code == 0
    assert files(out) == files(finished)


def test_a_lost_part_of_an_unfinished_job(
    corpus: Path, probes: Path, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(running, "finish", lambda *_: pytest.exit("stopped"))
    with pytest.raises(pytest.exit.Exception):
        run(corpus, probes, out, "--keep-traces")
    monkeypatch.undo()
    sorted((out / "scores").glob("*"))[2].unlink()
    assert run(corpus, probes, out, "--keep-traces").exit_code == 0
    assert files(out) == files(finished)


def test_an_input_that_moved_is_the_same(corpus: Path, probes: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    shutil.copy2(corpus, first / "c.jsonl")
    assert run(first / "c.jsonl", probes, tmp_path / "out", "--max-rows", 30).exit_code == 0
    first.rename(second)
    assert "nothing to do" in run(second / "c.jsonl", probes, tmp_path / "out", "--max-rows", 30).output
    assert score("--verify", tmp_path / "out", "--rows", 5).exit_code == 0


def test_broken_numbers_are_rejected_row_by_row(corpus: Path, probes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    original = worker.Kernel.score
    broken = {"every": False}

    def spoil(kernel: Any, ids: Any, spans: Any) -> Any:
        found = original(kernel, ids, spans)
        for n in range(len(found.problem)):
            if broken["every"] or n % 2:
                found.problem[n] = "not_finite"
        return found

    monkeypatch.setattr(worker.Kernel, "score", spoil)
    assert run(corpus, probes, tmp_path / "half", "--max-rows", 30).exit_code == 0
    reasons = json.loads((tmp_path / "half/manifest.json").read_text())["reasons"]
    assert reasons["not_finite"] == 13  # every other one of 23 good rows in the first block and of 5 in the second
    broken["every"] = True
    monkeypatch.setattr(worker, "_MANY", 40)
    result = run(corpus, probes, tmp_path / "all")
    assert result.exit_code == 2
    assert "not finite" in result.output


def test_a_folder_of_something_else_is_left_alone(corpus: Path, probes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    for more in ((), ("--overwrite",)):
        result = run(corpus, probes, tmp_path, *more)
        assert result.exit_code == 2
        assert "holds other files (mine.txt)" in result.output
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_wrong_input_is_one_line(corpus: Path, probes: Path, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    out = tmp_path / "out"

    def line(*args: object) -> str:
        result = score(*args, "--output", out, "--runtime", "inline")
        assert result.exit_code == 2
        (found,) = result.output.strip().splitlines()
        return str(found)

    planted = ("--model", PLANTED.path, "--probes", probes)
    assert "--input" in line(*planted, "--input", tmp_path / "none*.jsonl")
    unnamed = write_jsonl(tmp_path / "unnamed.jsonl", [{"question_text": "a", "answer": "b"}] * 3)
    found = line(*planted, "--input", unnamed)
    assert "question_text" in found
    assert "answer" in found
    found = line("--model", checkpoints["llama"], "--probes", probes, "--input", corpus)
    assert "--probes" in found
    assert "another model" in found
    assert "--probes" in line("--model", PLANTED.path, "--probes", tmp_path / "nowhere", "--input", corpus)
    assert "--model" in line("--model", tmp_path / "nowhere", "--probes", probes, "--input", corpus)
    assert "--probe" in line(*planted, "--input", corpus, "--probe", "middle")
    assert "--input: (absent)" in line(*planted)
    assert not list(out.glob("scores/*"))


def test_every_table_needs_the_columns(probes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(practice(5)), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"ask": "a", "response": "b"}]), folder / "b.parquet")
    result = run(folder, probes, tmp_path / "out")
    assert result.exit_code == 2
    assert "b.parquet has no such column; there are: ask, response" in result.output
    (folder / "b.parquet").unlink()
    assert run(folder, probes, tmp_path / "out").exit_code == 0


def test_only_bad_rows_and_no_rows(probes: Path, tmp_path: Path) -> None:
    bad = write_jsonl(
        tmp_path / "bad.jsonl", ["{", "[]", json.dumps({"prompt": None, "thinking": "a", "response": "b"})]
    )
    result = run(bad, probes, tmp_path / "bad")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "bad/manifest.json").read_text())
    assert (manifest["read"], manifest["scored"], manifest["rejected"]) == (3, 0, 3)
    result = run(write_jsonl(tmp_path / "none.jsonl", []), probes, tmp_path / "none")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "none/manifest.json").read_text())["read"] == 0


def test_compressed_and_plain_files_score_alike(finished: Path, probes: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    result = run(folder / "*.gz", probes, tmp_path / "out")
    assert result.exit_code == 0, result.output
    a, b = read(tmp_path / "out", "scores"), read(finished, "scores")
    for name in ("row", "id", "plateau", "final", "cliff", "closing_drops"):
        assert a[name].equals(b[name]), name


def test_a_block_at_which_workers_die_is_given_up(corpus: Path, probes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its attempts are counted before it is scored, so that a worker's death counts."""

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker.Kernel, "score", die)
        patch.setattr(running, "remove", lambda _: None)  # attempts count within a run: here, over several
        for _ in range(worker.MAX_ATTEMPTS):
            assert run(corpus, probes, tmp_path / "out").exit_code == 1
        result = run(corpus, probes, tmp_path / "out")
    assert result.exit_code == 1
    assert "block 0 was begun 5 times" in result.output
    assert run(corpus, probes, tmp_path / "out").exit_code == 0, "a new run tries anew"


def test_other_blocks_are_done_beside_one_that_cannot_be(tmp_path: Path, monkeypatch: Any) -> None:
    from clifflab.config import RuntimeConfig
    from clifflab.errors import InputError, WorkerError
    from clifflab.runtime.score_pool import RayPool
    from clifflab.scoring.wire import failed_receipt, receipt_row

    class Rows:
        def __init__(self, rows: list[Any]) -> None:
            self.iter_rows = rows.__iter__

    def got(*rows: Any) -> tuple[list[int], str]:
        monkeypatch.setattr(RayPool, "_dataset", lambda *_: Rows(list(rows)))
        found = []
        try:
            for receipt in RayPool(RuntimeConfig()).run(None, tmp_path, "", None, []):  # type: ignore[arg-type]
                found.append(receipt["block"])
        except (WorkerError, InputError) as error:
            return found, str(error)
        return found, ""

    one, two = receipt_row({"block": 1}), receipt_row({"block": 2})
    assert got(one, failed_receipt(WorkerError("poison")), two) == ([1, 2], "poison")
    wrong = failed_receipt(InputError("--input", "x", "changed", "copy it again"))
    assert got(one, wrong, two) == ([1], "--input: x: changed; copy it again")


def test_several_probes_in_one_pass(corpus: Path, probes: Path, finished: Path, tmp_path: Path) -> None:
    other = write_probes(tmp_path / "other", seed=3)
    specs = [arg for spec in ("all", "final:difference", "all:logistic:every") for arg in ("--probe", spec)]
    result = run(corpus, probes, tmp_path / "out", "--probes", other, "--max-rows", 20, *specs)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "out", "scores").to_pylist()
    traces = Counter(row["trace_id"] for row in rows)
    # A probe of one name is read once, in every layer: 8 layers of one kind, one of the other, from each of two files.
    assert set(traces.values()) == {2 * 9}
    assert Counter(row["reported"] for row in rows)[True] == 2 * len(traces)
    first = {row["row"]: row for row in read(finished, "scores").to_pylist()}
    for row in rows:
        if row["reported"] and row["train_positions"] == "all":
            assert row["cliff"] == pytest.approx(first[row["row"]]["cliff"], abs=1e-5)


def test_a_sample_is_drawn_by_the_seed(corpus: Path, probes: Path, tmp_path: Path) -> None:
    found = []
    for name, seed, rows in (("a", 1, 25), ("b", 1, 40), ("c", 2, 25)):
        result = run(corpus, probes, tmp_path / name, "--sample", 0.3, "--seed", seed, "--block-rows", rows)
        assert result.exit_code == 0, result.output
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert 15 < manifest["read"] < 60
        found.append(read(tmp_path / name, "scores")["row"].to_pylist())
    assert found[0] == found[1] != found[2]


def test_prompts_are_answered_first(probes: Path, tmp_path: Path) -> None:
    prompts = [{"id": f"p{i}", "prompt": row["prompt"]} for i, row in enumerate(practice(12))]
    prompts[5]["prompt"] = ""
    corpus = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    result = run(corpus, probes, tmp_path / "out", "--generate", "--max-new-tokens", 96, "--keep-traces")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["read"] == 12
    assert manifest["reasons"]["empty"] == 1
    assert manifest["scored"] >= 8
    assert set(read(tmp_path / "out", "traces").column_names) >= {"thinking", "response", "token_ids"}
    # The same rows in other blocks get the same traces.
    result = run(corpus, probes, tmp_path / "other", "--generate", "--max-new-tokens", 96, "--block-rows", 5)
    assert result.exit_code == 0
    a, b = read(tmp_path / "out", "scores"), read(tmp_path / "other", "scores")
    assert a["thinking_tokens"].equals(b["thinking_tokens"])


def test_examples_are_chosen_from_its_scores(finished: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from clifflab.cli import cli

    args = ["select", "--scores", f"{finished}/scores/*.parquet", "--traces", f"{finished}/traces/*.parquet"]
    args += ["--out", str(tmp_path / "out"), "--budget", "4", "--plateau", "0", "--benign", "0", "--runtime", "inline"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, (result.output, result.exception)
    assert len((tmp_path / "out/train.jsonl").read_text().splitlines()) == 4
