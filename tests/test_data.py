"""Prompt sets: every source row comes out once, as a prompt or as a reject with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clifflab.config import PromptSet
from clifflab.data import read_prompts
from clifflab.errors import InputError


def spec(path: Path | str, **fields: Any) -> PromptSet:
    return PromptSet(**{"name": "s", "path": str(path), "label": "harmful", **fields})


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "Goal"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
def test_formats(tmp_path: Path, kind: str, column: str) -> None:
    rows = [
        {column: "how do i bake?", "id": "a", "group": "g"},
        {column: "two\nlines, and a comma", "id": "b", "group": "g"},
    ]
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        write(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        body = "\n".join(f'"{r[column]}",{r["id"]},{r["group"]}' for r in rows)
        path.write_text(f"{column},id,group\n{body}\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    prompts, rejects = read_prompts(spec(path), "prompts.0")
    assert not rejects
    assert [p["messages"] for p in prompts] == [[{"role": "user", "content": r[column]}] for r in rows]
    assert [(p["id"], p["group"], p["label"], p["set"]) for p in prompts] == [
        (r["id"], "g", "harmful", "s") for r in rows
    ]


def test_ids_and_groups_are_derived(tmp_path: Path) -> None:
    prompts, _ = read_prompts(spec(write(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": "x"}])), "prompts.0")
    assert [p["id"] for p in prompts] == ["s-000000", "s-000001"]
    assert len({p["group"] for p in prompts}) == 1, "the same request is one group"
    other, _ = read_prompts(
        spec(write(tmp_path / "q.jsonl", [{"prompt": " X\n"}, {"prompt": "y"}]), name="t"), "prompts.1"
    )
    assert [p["group"] == prompts[0]["group"] for p in other] == [True, False]


def test_messages_and_mapping(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    path = write(tmp_path / "p.jsonl", [{"talk": turns, "key": 7, "kind": "Benign"}])
    columns = {"messages": "talk", "id": "key", "label": "kind"}
    prompts, _ = read_prompts(spec(path, columns=columns), "prompts.0")
    assert prompts[0]["messages"] == turns[:2]
    assert (prompts[0]["id"], prompts[0]["label"]) == ("7", "benign")


BAD: dict[str, Any] = {"null": None, "not_text": 5, "empty": "  \n", "not_messages": [{"role": "x", "content": "y"}]}


def test_bad_rows_are_rejected_with_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "good"}, *({"prompt": v, "id": k} for k, v in BAD.items())])
    with path.open("ab") as handle:
        handle.write(b'{"prompt": "cut\n\xff\xfe not text\n["a list"]\n')
    prompts, rejects = read_prompts(spec(path), "prompts.0")
    assert [p["messages"][0]["content"] for p in prompts] == ["good"]
    assert [r["reason"] for r in rejects] == [*BAD, "undecodable", "undecodable", "undecodable"]
    assert [r["source_row"] for r in rejects] == list(range(1, 8))
    assert [r["id"] for r in rejects][: len(BAD)] == list(BAD)


@given(st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=5)), min_size=1, max_size=20))
def test_every_row_once(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    path = write(tmp_path_factory.mktemp("p") / "p.jsonl", [{"prompt": v} for v in [*values, "good"]])
    prompts, rejects = read_prompts(spec(path), "prompts.0")
    rows = [int(p["id"].removeprefix("s-")) for p in prompts] + [r["source_row"] for r in rejects]
    assert sorted(rows) == list(range(len(values) + 1))


def test_existing_traces(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "response": "<think>\nhm\n</think>\n\nsure"},
        {"question": "q", "thinking": "hm", "response": "sure"},
        {"question": "q", "response": "hm\n</think>\n\nsure"},
        {"question": "q", "response": "<think>\nhm hm"},
        {"question": "q", "thinking": "hm", "response": ""},
        {"question": "q", "response": "sure"},
        {"question": "q", "thinking": None, "response": "sure"},
        {"question": "q", "thinking": "hm", "response": None},
    ]
    prompts, rejects = read_prompts(spec(write(tmp_path / "p.jsonl", rows), existing=True), "prompts.0")
    whole = [("hm", "sure")] * 3
    odd = [("hm hm", None), ("hm", ""), (None, "sure"), (None, "sure")]
    assert [(p["thinking"], p["response"]) for p in prompts] == [*whole, *odd]
    assert all(p["existing"] for p in prompts)
    assert [(r["source_row"], r["reason"]) for r in rejects] == [(7, "null")]


def test_odd_rows_never_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    deep = b"[" * 100_000
    lines = [
        b'\xef\xbb\xbf{"prompt": "first"}',
        b'{"id": "5"}',
        b'{"prompt": "a\\ud800"}',
        b'{"prompt": %s}' % (b"9" * 5000),
        deep,
    ]
    path.write_bytes(b"\n".join(lines))
    prompts, rejects = read_prompts(spec(path), "prompts.0")
    assert [p["messages"][0]["content"] for p in prompts] == ["first"]
    assert [r["reason"] for r in rejects] == ["no_column", "undecodable", "undecodable", "undecodable"]


def test_odd_csv(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'prompt,id\n"caf\xe9",1\n"' + b"long " * 40_000 + b'",2\n')
    prompts, rejects = read_prompts(spec(path), "prompts.0")
    assert [p["id"] for p in prompts] == ["2"]
    assert [(r["id"], r["reason"]) for r in rejects] == [("1", "undecodable")]


def test_errors(tmp_path: Path) -> None:
    def fails(path: Path | str, match: str, **fields: Any) -> None:
        with pytest.raises(InputError, match=match):
            read_prompts(spec(path, **fields), "prompts.0")

    good = write(tmp_path / "good.jsonl", [{"prompt": "x", "id": "1"}, {"prompt": "y", "id": "1"}])
    fails(good, r"prompts\.0\.id: 1: duplicate id in rows 0 and 1")
    fails(tmp_path / "none.jsonl", "no such file")
    fails(write(tmp_path / "empty.jsonl", []), "empty prompt set: has no rows")
    fails(write(tmp_path / "bad.jsonl", [{"prompt": None}]), "all 1 rows are rejected, the first as null")
    fails(write(tmp_path / "p.txt", []), "unknown kind of file")
    fails(write(tmp_path / "cols.jsonl", [{"request": "x"}]), "there are: request")
    (tmp_path / "b.json").write_text("{")
    fails(tmp_path / "b.json", "is not JSON")
    fails("organism:nothing", "organism:nothing", limit=3)
    fails("organism:harmful", "organism:harmful", limit=10**9)
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"prompt": [f"row {i}" for i in range(1000)]}), whole)
    half = tmp_path / "half.parquet"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    fails(half, "is not a whole Parquet file")
    fails(tmp_path, "is not a saved dataset")


def test_the_planted_corpus_brings_its_labels_unless_they_are_to_be_hidden() -> None:
    fields = {"name": "safety", "limit": 200, "seed": 3}
    rows, rejects = read_prompts(spec("organism:corpus", **fields), "repair.corpus.0")
    assert not rejects
    assert {row["label"] for row in rows} == {"harmful", "benign"}
    assert all(row["set"] == "safety" for row in rows)
    assert {"plain", "borderline", "benign_lookalike"} <= {row["category"] for row in rows}
    hidden, _ = read_prompts(spec("organism:corpus", label="unlabelled", **fields), "repair.corpus.0")
    assert {row["label"] for row in hidden} == {"unlabelled"}
    assert [row["messages"] for row in hidden] == [row["messages"] for row in rows]
