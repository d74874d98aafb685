"""Preparing a corpus: every row once, as a trace or a reject; quick rendering equal to the plain one."""

from __future__ import annotations

from typing import Any

import pytest

from clifflab import tables
from clifflab.config import PromptSet, ScoreConfig
from clifflab.organism.corpus import corpus_rows
from clifflab.organism.tokenizer import build_tokenizer
from clifflab.science.judges import judge
from clifflab.scoring.prepare import Preparer
from clifflab.scoring.ready import spans_of_ready, traces_table
from clifflab.scoring.types import Block, Prepared, RawRow, Source
from clifflab.text import Renderer, resolve_format

SOURCE = Source("/x/a.jsonl", "a.jsonl", "jsonl")
SPEC = PromptSet(name="corpus", path="a.jsonl", label="unlabelled", existing=True)


@pytest.fixture(scope="module")
def planted() -> Renderer:
    tokenizer = build_tokenizer()
    return Renderer(tokenizer, resolve_format("auto", tokenizer))


def prepare(
    renderer: Renderer, records: list[Any], spec: PromptSet = SPEC, base: int = 0, duplicates: Any = (), **settings: Any
) -> Prepared:
    raw = [r if isinstance(r, RawRow) else RawRow(i, r) for i, r in enumerate(records)]
    block = Block(0, 0, 0, len(raw), base, 0, 0)
    prepared = Preparer(renderer, 512, spec, ScoreConfig(**settings)).prepare(block, SOURCE, raw, set(duplicates))
    assert prepared.read == len(raw) == prepared.table.num_rows + len(prepared.rejects)
    assert prepared.table.schema == tables.READY
    rows = prepared.table["row"].to_pylist() + [reject.row for reject in prepared.rejects]
    assert sorted(rows) == [base + item.row for item in raw]
    return prepared


def test_traces_are_those_of_the_plain_way(planted: Renderer) -> None:
    rows = list(corpus_rows(150, 3))
    spec = SPEC.model_copy(update={"columns": {"label": "label"}})
    prepared = prepare(planted, rows, spec, base=40, keep_traces=True)
    assert not prepared.rejects
    spans = spans_of_ready(prepared.table)
    for i, (row, found) in enumerate(zip(rows, prepared.table.to_pylist(), strict=True)):
        ids, borders = planted.render([{"role": "user", "content": row["prompt"]}], row["thinking"], row["response"])
        assert (found["token_ids"], spans[i]) == (ids, borders)
        assert {name: found[name] for name in ("id", "label", "group", "prompt", "response")} == {
            name: row[name] for name in ("id", "label", "group", "prompt", "response")
        }
        assert (found["thinking"], found["response"]) == planted.texts(ids, borders)
        assert found["outcome"] == judge(row["response"], True).outcome
        assert (found["row"], found["cut_tokens"], found["finish_reason"]) == (40 + i, 0, "stop")
    traces = traces_table(prepared.table, "m", "corpus")
    assert traces.schema == tables.TRACES
    assert traces["trace_id"][0].as_py() == "corpus/corpus-3-0000000#0"
    bare = prepare(planted, rows, spec, base=40)
    assert bare.table["response"].null_count == 150
    assert bare.table.drop_columns(["prompt", "thinking", "response"]) == prepared.table.drop_columns(
        ["prompt", "thinking", "response"]
    )
