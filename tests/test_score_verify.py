"""``clifflab score --verify``: whatever a writer could get wrong is found, with checksums that fit; nothing else is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from clifflab.artifacts import file_hash, fingerprint, write_parquet
from clifflab.models.loading import load, resolve_spec
from clifflab.scoring import verify_again
from clifflab.scoring.commit import PARTS_SCHEMA
from tests.score_files import PLANTED, practice, score, write_jsonl, write_probes

ROWS, BLOCK = 48, 12
KINDS = ("scores", "rejects", "traces")


def run(corpus: Path, probes: Path, out: Path, *more: object) -> None:
    result = score(
        "--model", PLANTED.path, "--probes", probes, "--input", corpus, "--output", out, "--runtime", "inline", *more
    )
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, probes, and the finished results of two probes."""
    root = tmp_path_factory.mktemp("job")
    rows: list[Any] = practice(ROWS)
    rows[7] = {**rows[7], "thinking": None, "response": None}
    rows[11] = {**rows[11], "id": rows[3]["id"]}
    rows[20] = '{"id": "broken", "prompt": '
    rows[30] = {**rows[30], "prompt": ""}
    rows[31] = {**rows[31], "id": rows[30]["id"]}
    rows[40] = {**rows[40], "thinking": " ".join(["nice"] * 600)}
    (root / "in").mkdir()
    write_jsonl(root / "in/corpus.jsonl", rows)
    write_probes(root / "probes")
    more = ("--keep-traces", "--probe", "all", "--probe", "final", "--too-long", "cut", "--block-rows", BLOCK)
    run(root / "in/*.jsonl", root / "probes", root / "out", *more)
    return root


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Any:
    """The model is loaded once for all tests."""
    model = load(resolve_spec(PLANTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_again, "load", lambda _: model)
        yield


@pytest.fixture
def out(job: Path, tmp_path: Path) -> Path:
    """A copy of the results, to be damaged."""
    return Path(shutil.copytree(job / "out", tmp_path / "out"))


def verified(out: Path, rows: int = 500) -> tuple[int, str]:
    result = score("--verify", out, "--rows", rows)
    return result.exit_code, result.output


def failed(out: Path, check: str, *texts: str) -> None:
    """The named check fails, in one line that holds the texts, and is the last."""
    code, output = verified(out)
    assert code == 1, output
    lines = re.findall(r"^(?:ok  |FAIL)  .*$", output, re.MULTILINE)
    assert [line for line in lines if line.startswith("FAIL")] == lines[-1:], output
    assert lines[-1].split()[1] == check, output
    for text in texts:
        assert text in lines[-1], output


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def manifest(out: Path, **entries: Any) -> None:
    edit(out / "manifest.json", lambda about: about.update(entries))


def counted(out: Path, **more: int) -> None:
    """Move counts of the manifest."""
    edit(out / "manifest.json", lambda about: about.update({name: about[name] + by for name, by in more.items()}))


def sign(out: Path, change: Callable[[list[dict[str, Any]]], Any] = lambda _: None) -> None:
    """Rewrite the list of files and the checksums, as the writer of damaged files would have."""
    parts = []
    for kind in KINDS:
        for path in sorted((out / kind).glob("*.parquet")):
            try:
                rows = pq.read_metadata(path).num_rows
            except pa.ArrowInvalid:
                rows = 0
            about = {"block": int(path.stem[5:]), "kind": kind, "file": f"{kind}/{path.name}", "rows": rows}
            parts.append({**about, "bytes": path.stat().st_size, "sha256": file_hash(path)})
    change(parts)
    write_parquet(out / "parts.parquet", pa.Table.from_pylist(parts, schema=PARTS_SCHEMA))
    listed = {"file": "parts.parquet", "files": len(parts), "sha256": file_hash(out / "parts.parquet")}
    manifest(out, parts=listed, sides={name: file_hash(out / name) for name in ("blocks.parquet", "duplicates.npy")})


def part(out: Path, block: int, kind: str = "scores") -> Path:
    return out / f"{kind}/part-{block:08d}.parquet"


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change a table's rows, in place."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    write_parquet(path, pa.Table.from_pylist(rows, schema=table.schema))


def damage(out: Path, block: int, change: Callable[[list[dict[str, Any]]], Any], kind: str = "scores") -> None:
    rewrite(part(out, block, kind), change)
    sign(out)


def set_on(out: Path, place: int, kind: str = "scores", block: int = 1, **values: Any) -> None:
    damage(out, block, lambda rows: rows[place].update(values), kind)


def test_a_sound_job_passes(job: Path, out: Path) -> None:
    code, output = verified(out)
    assert code == 0, output
    assert "43 scored + 5 rejected = 48 read; 2 probes each" in output
    assert "2 repeated" in output
    assert "4 of 4 blocks prepared anew, 5 rejects as before" in output
    assert "43 rows scored the plain way" in output
    assert "8 rows scored the plain way" in verified(out, 8)[1]
    sign(out)  # the tests' own signature changes nothing
    assert verified(out, 4)[0] == 0
    assert score("--verify", job / "nothing").exit_code == 2
    (out / "manifest.json").unlink()
    result = score("--verify", out)
    assert result.exit_code == 2
    assert "not finished" in result.output


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "no probes": (lambda m: m.pop("probes"), "identity", "no count 'probes'"),
    "a count below 0": (lambda m: m.update(padding=-1), "identity", "no count 'padding'"),
    "no sides": (lambda m: m.pop("sides"), "identity", "no entry 'sides'"),
    "status": (lambda m: m.update(status="begun"), "identity", "status 'begun'"),
    "fingerprint": (lambda m: m.update(fingerprint="0" * 64), "identity", "do not belong together"),
    "identity": (lambda m: m["identity"].update(seed=5), "identity", "do not belong together"),
    "probes": (lambda m: m.update(probes=3), "identity", "other probes than the 3"),
    "one side": (lambda m: m["sides"].pop("duplicates.npy"), "files", "duplicates.npy has no checksum"),
    "files": (lambda m: m["parts"].update(files=3), "files", "3 were written"),
    "blocks": (lambda m: m.update(blocks=5), "files", "4 blocks, 5 were scored"),
    "read": (lambda m: m.update(read=49), "counts", "49 read, the files hold 48"),
    "scored": (lambda m: m.update(scored=42), "counts", "42 scored, the files hold 43"),
    "rejected": (lambda m: m.update(rejected=6), "counts", "6 rejected, the files hold 5"),
    "reasons": (lambda m: m["reasons"].update(null=2), "counts", "other reasons"),
    "cut": (lambda m: m.update(cut=2), "counts", "2 traces were cut"),
    "cut too few": (lambda m: m.update(cut=0), "counts", "0 traces were cut"),
    "ways": (lambda m: m.update(ways={"packed": 3}), "counts", "3 blocks by their way"),
    "padding": (lambda m: m.update(ways={"packed": 4}, padding=7), "counts", "7 tokens of padding"),
    "few tokens": (lambda m: m.update(tokens=10), "counts", "10 tokens"),
    "tokens": (lambda m: m.update(tokens=m["tokens"] + 1), "rejects", "tokens, the input has"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_wrong_manifest(out: Path, case: str) -> None:
    change, check, text = MANIFESTS[case]
    edit(out / "manifest.json", change)
    failed(out, check, text)


def test_a_job_that_is_not_its_identity(out: Path) -> None:
    edit(out / "job.json", lambda about: about["job"].update(window=[0.1, 0.9]))
    failed(out, "identity", "differ in window")
    edit(out / "job.json", lambda about: about["job"].update(strange=1))
    failed(out, "identity", "strange is nothing that this version")
    edit(out / "job.json", lambda about: about.pop("identity"))
    failed(out, "identity", "do not belong together")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["parts.parquet", "blocks.parquet", "duplicates.npy", "scores/part-00000001.parquet"])
def test_files_that_are_changed_damaged_or_gone(out: Path, name: str) -> None:
    flip(out / name)
    failed(out, "files", f"{name} is changed", "score again")
    if name != "parts.parquet":  # bytes that are no table, signed
        for junk in (b"", b"junk" * 9):
            (out / name).write_bytes(junk)
            sign(out)
            failed(out, "counts" if name == "duplicates.npy" else "files", f"{name} is damaged", "score again")
    (out / name).unlink()
    failed(out, "files", f"{name} is missing", "score again")


def test_files_of_no_block_and_blocks_without_files(out: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        shutil.copy(part(out, 0, kind), part(out, 9, kind))
        failed(out, "files", f"{kind}/part-00000009.parquet belongs to no block")
        part(out, 9, kind).unlink()
    shutil.copy(part(out, 0), part(out, 9))
    sign(out)
    failed(out, "files", "part-00000009.parquet, which is no file of a block")
    part(out, 9).unlink()
    for kind in ("scores", "traces"):
        kept = part(out, 2, kind).rename(tmp_path / "kept")
        sign(out)
        failed(out, "files", f"block 2 has no file of {kind}")
        kept.rename(part(out, 2, kind))
    sign(out, lambda parts: parts.append(parts[0]))
    failed(out, "files", "named twice")
    for name, value in (("rows", 3), ("bytes", 3)):
        sign(out, lambda parts, name=name, value=value: parts[0].update({name: value}))  # type: ignore[misc]
        failed(out, "files", "other rows or bytes")
    write_parquet(part(out, 1), pq.read_table(part(out, 1)).drop_columns(["cut_tokens"]))
    sign(out)
    failed(out, "counts", "scores/part-00000001.parquet has no column cut_tokens")


@pytest.mark.parametrize("change", [{"number": 2}, {"start": 13}, {"stop": 23}, {"base": 1}, {"start": 24}])
def test_blocks_with_gaps(out: Path, change: dict[str, int]) -> None:
    rewrite(out / "blocks.parquet", lambda rows: rows[1].update(change))
    sign(out)
    failed(out, "files", "does not follow the one before")


def test_a_probe_of_a_row_lost_doubled_or_another(out: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copy(part(out, 1), tmp_path / "kept"))
    for change, text in (
        (lambda rows: rows.pop(3), "is missing"),
        (lambda rows: rows.append(rows[3]), "is there 2 times"),
        (lambda rows: rows[3].update(train_positions="all"), "is there 2 times"),
        (lambda rows: rows[3].update(layer=0), "is missing"),
        (lambda rows: [row.update(layer=0) for row in rows if row["train_positions"] == "all"], "are not the job's 2"),
        (lambda rows: rows.__setitem__(slice(None), rows[::2]), "1 probes, which are not the job's 2"),
        (lambda rows: rows[3].update(id="x"), "id of a row is not the same for all probes"),
        (lambda rows: rows[3].update(cut_tokens=4), "cut_tokens of a row is not the same"),
        (lambda rows: rows[3].update(probe=None), "probe is null"),
    ):  # fmt: skip
        shutil.copy(kept, part(out, 1))
        damage(out, 1, change)
        failed(out, "counts", text)


def test_rows_lost_doubled_or_out_of_place(out: Path, tmp_path: Path) -> None:
    """The manifest counts along with every damage."""

    def moved(old: int, new: int) -> Callable[[list[dict[str, Any]]], Any]:
        return lambda rows: [row.update(row=new) for row in rows if row["row"] == old]

    def fresh() -> None:
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)

    shutil.copytree(out, tmp_path / "kept")
    damage(out, 1, moved(13, 26))
    failed(out, "counts", "block 1 holds row 26")
    damage(out, 1, moved(26, 99))
    failed(out, "counts", "block 1 holds row 99")
    fresh()
    damage(out, 1, lambda rows: rows.__setitem__(slice(2, 4), []))
    counted(out, scored=-1, read=-1)
    failed(out, "counts", "traces/part-00000001.parquet: other traces than those that are scored")
    damage(out, 1, lambda rows: rows.pop(1), "traces")
    failed(out, "counts", "block 1: row 13 is neither scored nor rejected")
    fresh()
    damage(out, 0, lambda rows: rows.append({**rows[0], "row": 2, "source_row": 2}), "rejects")
    counted(out, rejected=1, read=1)
    failed(out, "counts", "row 2 is both scored and rejected")
    fresh()
    damage(out, 0, lambda rows: rows.append(rows[0]), "rejects")
    failed(out, "counts", "row 7 is rejected twice")
    fresh()
    set_on(out, 0, "rejects", block=0, source_row=3)
    failed(out, "counts", "another source_row")
    set_on(out, 0, "rejects", block=0, source_row=7, reason=None)
    failed(out, "counts", "reason is null")


def test_duplicates_are_those_of_their_file(out: Path) -> None:
    np.save(out / "duplicates.npy", np.asarray([11], dtype=np.int64))
    sign(out)
    failed(out, "counts", "row 31 is rejected as duplicate_id, which it is not in duplicates.npy")
    np.save(out / "duplicates.npy", np.asarray([11, 12, 31], dtype=np.int64))
    sign(out)
    failed(out, "counts", "row 12 is in duplicates.npy and not rejected")
    np.save(out / "duplicates.npy", np.asarray([31, 11], dtype=np.int64))
    sign(out)
    failed(out, "counts", "no ascending numbers")


def test_ids_come_once_and_repeat_an_earlier_one(out: Path) -> None:
    ids = {row["row"]: row["id"] for row in pq.read_table(part(out, 1)).to_pylist()}

    def name(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["row"] == 14:
                row["id"] = ids[13]

    damage(out, 1, name)
    failed(out, "ids", "rows 13 and 14 have the same id")


@pytest.mark.parametrize("name", ["nowhere", "later"])
def test_a_duplicate_has_an_earlier_row(out: Path, name: str) -> None:
    later = pq.read_table(part(out, 3))["id"][0].as_py()
    rejects = pq.read_table(part(out, 0, "rejects")).to_pylist()
    (place,) = [n for n, row in enumerate(rejects) if row["reason"] == "duplicate_id"]
    set_on(out, place, "rejects", block=0, id=later if name == "later" else name)
    failed(out, "ids", "row 11 is rejected as duplicate_id, and no row before it has its id")


def repoint(out: Path, **paths: Any) -> None:
    """Let the job look for its input or probes elsewhere."""
    edit(out / "job.json", lambda about: about["job"].update(paths))


def test_what_changed_since_is_named(job: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(job / "in", tmp_path / "in")
    repoint(out, input=str(tmp_path / "in/*.jsonl"))
    assert verified(out, 1)[0] == 0  # copied with its time of change
    corpus = tmp_path / "in/corpus.jsonl"
    stat = corpus.stat()
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    failed(out, "inputs", "corpus.jsonl has changed (another time of change)")
    corpus.write_text(corpus.read_text() + "{}\n")
    failed(out, "inputs", "corpus.jsonl has changed (another size)")
    shutil.copy2(job / "in/corpus.jsonl", corpus)
    shutil.copy2(corpus, tmp_path / "in/more.jsonl")
    failed(out, "inputs", "more.jsonl is new")
    corpus.unlink()
    failed(out, "inputs", "corpus.jsonl is gone")
    shutil.rmtree(tmp_path / "in")
    failed(out, "inputs", "--input")


def test_probes_and_model_that_changed_are_named(job: Path, out: Path, tmp_path: Path) -> None:
    write_probes(tmp_path / "other", seed=1)
    repoint(out, probes=[str(tmp_path / "other/probes.safetensors")])
    failed(out, "inputs", f"the probes {str(tmp_path)[:20]}", "have changed")
    shutil.rmtree(tmp_path / "other")
    failed(out, "inputs", "--probes", "no such file")
    write_probes(tmp_path / "other", layer=2)
    failed(out, "inputs", "probes.json has changed")
    repoint(out, probes=[str(job / "probes/probes.safetensors")])
    model = json.loads((out / "job.json").read_text())["job"]["model"]
    repoint(out, model={**model, "dtype": "bfloat16"})
    failed(out, "inputs", "the model organism:planted has changed (dtype)")
    repoint(out, model={**model, "path": str(tmp_path / "nowhere")})
    failed(out, "inputs", "no such folder")


def test_rejects_are_made_anew(out: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(out, tmp_path / "kept"))

    def fresh() -> None:
        shutil.rmtree(out)
        shutil.copytree(kept, out)

    set_on(out, 0, "rejects", block=0, reason="empty")
    reasons = json.loads((out / "manifest.json").read_text())["reasons"]
    null = reasons.pop("null")
    manifest(out, reasons={**reasons, "empty": reasons["empty"] + null})
    failed(out, "rejects", "row 7 is rejected with reason empty, anew with null")
    fresh()
    set_on(out, 0, "rejects", block=0, id="x")
    failed(out, "rejects", "row 7 is rejected with id x, anew with")
    fresh()
    set_on(out, 0, "rejects", block=0, source="x")
    failed(out, "rejects", "row 7 is rejected with source x, anew with corpus.jsonl")
    fresh()
    # A good row as a reject, and with a reason that only the model can give.
    one = pq.read_table(part(out, 1)).to_pylist()[0]
    for kind in ("scores", "traces"):
        damage(out, 1, lambda rows: [rows.pop(0) for row in rows[:2] if row["trace_id"] == one["trace_id"]], kind)
    about = {"row": 12, "source": "corpus.jsonl", "source_row": 12, "id": one["id"], "reason": "null", "detail": ""}
    damage(out, 1, lambda rows: rows.append(about), "rejects")
    manifest(out, reasons={**reasons, "null": 2})
    counted(out, scored=-1, rejected=1)
    failed(out, "rejects", "row 12 is rejected (null), and is no reject when prepared anew")
    damage(out, 1, lambda rows: rows[-1].update(reason="not_finite"), "rejects")
    manifest(out, reasons={**reasons, "null": 1, "not_finite": 1})
    code, output = verified(out, 4)
    assert code == 0, output


def test_a_reject_that_was_scored_is_found(out: Path) -> None:
    """Row 30 is empty: a writer that scores it gives it the values of another row."""
    rejects = pq.read_table(part(out, 2, "rejects")).to_pylist()
    about = next(row for row in rejects if row["row"] == 30)
    new = {"row": 30, "id": about["id"], "trace_id": f"corpus/{about['id']}#0"}
    damage(out, 2, lambda rows: rows.remove(about), "rejects")
    for kind, many in (("scores", 2), ("traces", 1)):
        damage(out, 2, lambda rows, many=many: rows.extend([{**row, **new} for row in rows[:many]]), kind)  # type: ignore[misc]
    edit(out / "manifest.json", lambda found: found["reasons"].pop("empty"))
    counted(out, scored=1, rejected=-1)
    failed(out, "rejects", "row 30 is scored, and rejected (empty) when prepared anew")


SCORES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plateau": lambda row: row["plateau"] + 2e-4,
    "misalignment_logit": lambda row: row["misalignment_logit"] + 0.1,
    "final_logit": lambda row: row["final_logit"] + 0.1,
    "closing_drops": lambda row: [row["closing_drops"][0], *(drop + 2e-4 for drop in row["closing_drops"][1:])],
    "closing_drops_logit": lambda row: [*row["closing_drops_logit"][:-1], row["closing_drops_logit"][-1] - 0.1],
    "cliff": lambda row: None,
    "reported": lambda row: not row["reported"],
    "outcome": lambda row: "unclear" if row["outcome"] != "unclear" else "refusal",
    "thinking_tokens": lambda row: row["thinking_tokens"],
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_plain_way(out: Path, name: str) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[5][name] = SCORES[name](rows[5])
        if name == "thinking_tokens":  # of all probes, as it must be
            rows[4][name] = rows[5][name] = rows[5][name] + 1

    damage(out, 0, change)
    failed(out, "scores", f"row 2: {name} is")


def test_rounding_is_no_difference(out: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["final"] += 2e-5
            row["cliff_logit"] += 2e-4

    damage(out, 1, change)
    code, output = verified(out, 8)
    assert code == 0, output


def test_another_version_is_compared_all_the_same(out: Path) -> None:
    for name in ("job.json", "manifest.json"):
        edit(out / name, lambda about: about["identity"].update(code="0" * 12, settings={}))
        edit(out / name, lambda about: about["identity"]["packages"].update(torch="1.0"))
        edit(out / name, lambda about: about.update(fingerprint=fingerprint(about["identity"])))
    code, output = verified(out, 8)
    assert code == 0, output
    assert "written by another version of clifflab, torch 1.0, compared all the same" in output
    set_on(out, 2, block=0, plateau=0.5)
    failed(out, "scores", "row 1: plateau is 0.5", "written by another version of clifflab")


def test_no_more_rows_than_asked_for(out: Path) -> None:
    repoint(out, max_rows=40)
    for name in ("job.json", "manifest.json"):
        edit(out / name, lambda about: about["identity"].update(max_rows=40))
        edit(out / name, lambda about: about.update(fingerprint=fingerprint(about["identity"])))
    failed(out, "counts", "more rows than --max-rows 40")


def test_only_bad_rows_no_rows_and_a_sample(job: Path, tmp_path: Path) -> None:
    bad = write_jsonl(
        tmp_path / "bad.jsonl", ["{", "[]", json.dumps({"prompt": None, "thinking": "a", "response": ""})]
    )
    run(bad, job / "probes", tmp_path / "bad", "--block-rows", 2)
    run(write_jsonl(tmp_path / "none.jsonl", []), job / "probes", tmp_path / "none")
    run(job / "in/*.jsonl", job / "probes", tmp_path / "some", "--sample", 0.5, "--max-rows", 40, "--block-rows", 9)
    for name, text in (("bad", "3 rejects as before"), ("none", "there are none"), ("some", "scored the plain way")):
        code, output = verified(tmp_path / name)
        assert code == 0, output
        assert text in output
    first = pq.read_table(part(tmp_path / "some", 0))["row"][0].as_py()
    other = next(row for row in range(9) if row not in pq.read_table(part(tmp_path / "some", 0))["row"].to_pylist())
    rewrite(part(tmp_path / "some", 0), lambda rows: [row.update(row=other) for row in rows if row["row"] == first])
    sign(tmp_path / "some")
    failed(tmp_path / "some", "counts", f"block 0 holds row {other}")
    set_on(tmp_path / "bad", 0, "rejects", block=0, reason="null")
    manifest(tmp_path / "bad", reasons={"null": 2, "wrong_type": 1})
    failed(tmp_path / "bad", "rejects", "row 0 is rejected with reason null, anew with undecodable")


def test_what_is_not_checked_of_generated_traces_is_said(job: Path, tmp_path: Path) -> None:
    prompts: list[Any] = [{"id": f"p{i}", "prompt": row["prompt"]} for i, row in enumerate(practice(4))]
    prompts[2]["prompt"] = ""
    corpus = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    run(corpus, job / "probes", tmp_path / "out", "--generate", "--max-new-tokens", 64)
    code, output = verified(tmp_path / "out")
    assert code == 0, output
    assert "NOT checked: traces that the model wrote" in output
    assert "NOT scored anew" in output
    rejects = pq.read_table(part(tmp_path / "out", 0, "rejects"))
    (place,) = np.flatnonzero(pc.equal(rejects["id"], "p2").to_numpy(zero_copy_only=False))
    set_on(tmp_path / "out", int(place), "rejects", block=0, id="p9")
    failed(tmp_path / "out", "rejects", "row 2 is rejected with id p9, anew with p2")
