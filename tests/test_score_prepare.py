"""Preparing a corpus: every row once, as a trace or a reject; quick rendering equal to the plain one."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from clifflab import tables
from clifflab.config import ModelSpec, PromptSet, ScoreConfig, TracesConfig
from clifflab.engines import Completion, TransformersEngine
from clifflab.errors import InputError, TraceError
from clifflab.models.forward import not_finite
from clifflab.organism.corpus import corpus_rows
from clifflab.organism.tokenizer import build_tokenizer
from clifflab.science.judges import judge, loop_period
from clifflab.scoring import generate
from clifflab.scoring.generate import complete
from clifflab.scoring.prepare import MOST_CHARACTERS, Preparer, check_columns
from clifflab.scoring.ready import spans_of_ready, traces_table
from clifflab.scoring.types import Block, Prepared, RawRow, Source
from clifflab.text import FORMATS, Renderer, resolve_format
from clifflab.text.batch import BatchRenderer
from clifflab.text.render import split_inline
from tests.families import CASES, QWQ, family_tokenizer
from tests.test_formats import renderer_of

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


# What breaks renderings: marks that join, sides that change, white space at the ends, markers and control tokens.
BITS = (
    "hello", " Sorry, I cannot.", "\u00e9", "e\u0301", "\U0001f469\u200d\U0001f52c", "\U0001f44d\U0001f3fd", "\u0301",
    "\ufffd", "  ", "\n", "\r\n", "\n\n", "\t", "\x00", "\u3000", "\u00a0", "\ufeff", "\u202e", "\u0646\u0635",
    "\u4f60\u597d", "\u0130", "<think>", "</think>", "</thi", "<", "<|im_end|>", "<|end|>", "<|im_start|>answer",
    "</THINK>", "<unk>", "\u2581", "\u0120", "x" * 400,
)  # fmt: skip


def nasty(rng: random.Random) -> list[tuple[list[dict[str, str]], str, str | None]]:
    def text() -> str:
        return "".join(rng.choices(BITS, k=rng.choice((0, 1, 2, 4, 9))))

    return [([{"role": "user", "content": text()}], text(), text() if rng.random() < 0.97 else None) for _ in range(60)]


def compare(renderer: Renderer, traces: Any) -> BatchRenderer:
    """Hold the quick way against the plain one, trace by trace."""
    quick = BatchRenderer(renderer)
    for trace, found in zip(traces, quick.render(traces), strict=True):
        expected: Any
        try:
            expected = renderer.render(*trace)
        except TraceError as error:
            expected = str(error)
        assert (str(found) if isinstance(found, TraceError) else found) == expected, trace[1:]
    return quick


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_quick_rendering_of_every_format(name: str, variant: str) -> None:
    quick = compare(renderer_of(name, variant), nasty(random.Random(f"{name}/{variant}")))
    assert quick.plain == 0, "the quick way knew every trace of a byte-level tokenizer"


def test_quick_rendering_of_the_planted_language(planted: Renderer) -> None:
    rng = random.Random(2)
    words = (
        *(f" {word}" for word in ["sorry", "i", "cannot", "help", "bomb", "how", "make"]),
        ".",
        ",",
        "'",
        "-",
        "  ",
        "\n",
        "\n\n",
    )
    traces = [
        ([{"role": "user", "content": "how?"}], *("".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(2)))
        for _ in range(400)
    ]
    assert compare(planted, traces).plain < 250
    compare(planted, nasty(rng))
    assert compare(planted, [(["x"], None, "no"), ([{"role": "user", "content": "x"}], "", "")][1:]).plain == 0


def fallback_tokenizer() -> Any:
    """As of Llama 2: a space is put before a text, and characters that are not known fall to bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    core.train_from_iterator(
        ["Sorry, I cannot help.\n</think>\n\n", "This is harmful. \u00e9</think>\n\nx"] * 20, trainer
    )
    core.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    tokenizer.chat_template = QWQ
    return tokenizer


def test_quick_rendering_of_other_tokenizers() -> None:
    """Bytes that are spread over tokens, a normaliser, a decoder that tells nothing, a template that refuses."""
    for form in (FORMATS["r1"], replace(FORMATS["r1"], close_text="</think>")):
        traces = [*nasty(random.Random(3)), (chat("x"), "\ufffd", "a")]
        assert 0 < compare(Renderer(fallback_tokenizer(), form), traces).plain < len(traces)
    composing, lowering, unknown, strict = (family_tokenizer.__wrapped__("qwq", "pieces") for _ in range(4))
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    unknown.backend_tokenizer.decoder = decoders.WordPiece()
    for tokenizer in (composing, lowering, unknown):
        compare(Renderer(tokenizer, FORMATS["r1"]), nasty(random.Random(4)))
    strict.chat_template = "{% if messages[0]['content'] == 'x' %}{{ raise_exception('I see x') }}{% endif %}" + QWQ
    found = BatchRenderer(Renderer(strict, FORMATS["r1"])).render([([{"role": "user", "content": "x"}], "a", "b")])
    assert isinstance(found[0], TraceError)
    assert (found[0].reason, "I see x" in found[0].detail) == ("not_messages", False)


def test_closing_tokens_behind_bytes() -> None:
    """Byte fallback turns complete characters before a cut one into replacement characters too."""
    renderer = Renderer(fallback_tokenizer(), FORMATS["r1"])
    for thinking in (
        "\U0001f44d\U0001f3fd\U0001f44d" * 3,
        "a\n\u4f60\u597d\u4f60\u597d",
        "\U0001f44d no \u4f60\u4f60 <b>",
    ):
        ids, spans = renderer.render([{"role": "user", "content": "x"}], thinking, "\u4f60\U0001f44d")
        decoded = renderer.decode(ids[spans.prefix_end : spans.closing_start]).rstrip("\n")
        assert decoded == thinking
        assert renderer.decode(ids[spans.response_start :]) == "\u4f60\U0001f44d"


def test_every_reason(planted: Renderer) -> None:
    good = {"prompt": "how do i make a bomb?", "thinking": "this is bad.", "response": "sorry, i cannot help."}
    long = "this is bad. " * 140
    cases: list[tuple[Any, str | None, str | None]] = [
        ({**good, "id": "a"}, None, "a"),
        ({**good, "id": "a"}, "duplicate_id", "a"),
        ({**good, "id": 7}, None, "7"),
        ({"prompt": 5, "id": "a"}, "duplicate_id", "a"),  # whatever else is wrong with it
        ({**good, "id": " "}, "bad_id", None),
        ({**good, "id": [1]}, "bad_id", None),
        ({**good, "id": "\ud800"}, "bad_id", None),
        ({**good, "prompt": None}, "null", "a.jsonl:7"),
        ({**good, "response": None}, "null", "a.jsonl:8"),
        ({**good, "prompt": 3.5}, "not_text", "a.jsonl:9"),
        ({**good, "thinking": {"a": 1}}, "not_text", "a.jsonl:10"),
        ({**good, "prompt": " \n"}, "empty", "a.jsonl:11"),
        ({**good, "prompt": "\ud83d"}, "undecodable", "a.jsonl:12"),
        ({**good, "group": "\ud83d"}, "undecodable", "a.jsonl:13"),
        ({**good, "thinking": None}, "closing_missing", "a.jsonl:14"),
        ({"prompt": "how?", "response": "<think> hm hm"}, "closing_missing", "a.jsonl:15"),
        ({**good, "thinking": "a </think> b"}, "closing_ambiguous", "a.jsonl:16"),
        ({**good, "thinking": long}, "too_long", "a.jsonl:17"),
        ({"response": "b\ud800"}, "no_column", "a.jsonl:18"),
        ({"messages": [{"role": "user", "content": None}]}, "not_messages", "a.jsonl:19"),
        ({"messages": [{"role": "assistant", "content": "so </think> hello"}]}, "empty", "a.jsonl:20"),
        (RawRow(21, None, "undecodable", "line cannot be decoded \ud800"), "undecodable", None),
        (RawRow(22, None, "wrong_type", "row is no object but list"), "wrong_type", None),
        ({"prompt": "how?", "response": "<think>hm</think> no."}, None, "a.jsonl:23"),
        ({"messages": [*chat("how?"), {"role": "assistant", "content": "hm</think> no."}]}, None, "a.jsonl:24"),
        ({**good, "thinking": "", "response": ""}, None, "a.jsonl:25"),
        ({**good, "response": long}, None, "a.jsonl:26"),  # nothing behind the final position is read
    ]
    spec = SPEC.model_copy(update={"name": "c"})
    prepared = prepare(
        planted, [record for record, _, _ in cases], spec, base=100, duplicates={101, 103}, keep_traces=True
    )
    found = {reject.source_row: (reject.reason, reject.id) for reject in prepared.rejects}
    found |= {row["row"] - 100: (None, row["id"]) for row in prepared.table.to_pylist()}
    assert found == {place: (reason, name) for place, (_, reason, name) in enumerate(cases)}
    assert [reject.row for reject in prepared.rejects] == sorted(reject.row for reject in prepared.rejects)
    outcomes = dict(zip(prepared.table["id"].to_pylist(), prepared.table["outcome"].to_pylist(), strict=True))
    assert (outcomes["a"], outcomes["a.jsonl:23"], outcomes["a.jsonl:25"]) == ("refused", "refused", "degenerate")
    for reject in prepared.rejects:
        assert reject.source == "a.jsonl"
        assert len(reject.detail) <= 200
        assert not any(word in reject.detail for word in ("bomb", "sorry", "hm hm", "this is bad"))
        reject.detail.encode()
    again = prepare(planted, [c for c, reason, _ in cases if reason is None], spec, keep_traces=True)
    assert again.rejects == []
    huge = prepare(planted, [{**good, "response": "no. " * (MOST_CHARACTERS // 4)}, good], spec, max_tokens=400).rejects
    assert [(reject.reason, "characters" in reject.detail) for reject in huge] == [("too_long", True)]
    # A corpus of bad rows only, and no rows at all.
    assert prepare(planted, [RawRow(0, None, "undecodable", "")]).table.num_rows == 0
    assert prepare(planted, []).table.num_rows == 0


def test_a_reject_names_no_column_of_its_row(planted: Renderer) -> None:
    odd = {"How do I build a bomb in my garage?": "x", "b": 1}
    named = SPEC.model_copy(update={"columns": {"prompt": "ask"}})
    for spec, wanted in ((SPEC, "prompt or messages or instruction"), (named, "ask")):
        (reject,) = prepare(planted, [odd], spec).rejects
        assert reject.reason == "no_column"
        assert wanted in reject.detail
        assert reject.detail.endswith("; columns of the row: 2")
        assert "garage" not in reject.detail


def test_long_texts_cost_no_time(planted: Renderer) -> None:
    good = {"prompt": "how?", "thinking": "hm", "response": "no."}
    blanks = " " * 1_000_000
    rows = [
        {"prompt": "how?", "response": blanks},
        {"prompt": "how?", "response": f"{blanks}no."},
        {"prompt": "how?", "response": f"{blanks}<think>hm</think>{blanks}no."},
        {"prompt": "how?", "response": " " * MOST_CHARACTERS},
        {"messages": [*chat("how?"), {"role": "assistant", "content": "\n" * MOST_CHARACTERS}]},
        {**good, "category": "x" * MOST_CHARACTERS},
        {**good, "note": "x" * MOST_CHARACTERS},  # is not read
    ]
    began = time.process_time()
    found = prepare(planted, rows)
    assert time.process_time() - began < 10  # quadratic: hours
    reasons = ["closing_missing"] * 2 + ["too_long"] * 3
    assert [reject.reason for reject in found.rejects] == reasons
    assert found.table["row"].to_pylist() == [2, 6]


SPLIT = (" ", "\n", "\t", "\x1c", "\u00a0", "\u3000", "\ufeff", "<think>", "</think>", "<th", "</", "think>", "a", "")


@given(st.lists(st.sampled_from(SPLIT), max_size=9).map("".join))
@settings(max_examples=400, deadline=None)
def test_inline_thinking_is_split_as_defined(text: str) -> None:
    wanted: tuple[str | None, str | None] = (None, text.strip())
    if match := re.match(r"^\s*(?:<think>)?(?P<a>.*?)</think>(?P<b>.*)$", text, re.DOTALL):
        wanted = match["a"].strip(), match["b"].strip()
    elif match := re.match(r"^\s*<think>(?P<a>.*)$", text, re.DOTALL):
        wanted = match["a"].strip(), None
    assert split_inline(text) == wanted


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_special_tokens_are_no_part_of_a_response(planted: Renderer) -> None:
    row = {"prompt": "how?", "thinking": "hm.", "response": "no.<eos>"}
    found = prepare(planted, [row], keep_traces=True).table.to_pylist()[0]
    assert (found["response"], found["outcome"]) == ("no.", "refused")


@pytest.mark.parametrize(("name", "variant"), [("qwq", "token"), ("qwen3", "merging"), ("gpt-oss", "token")])
def test_the_middle_of_the_thinking_is_cut(name: str, variant: str) -> None:
    renderer = renderer_of(name, variant)
    words = " ".join(str(number) for number in range(90))
    rows = [{"prompt": "how?", "thinking": words[: 3 * n], "response": "Sorry, no. " * 50} for n in range(1, 80)]
    whole = [renderer.render(chat("how?"), row["thinking"], row["response"]) for row in rows]
    limit = max(spans.response_start for _, spans in whole) - 41
    kept = prepare(renderer, rows, max_tokens=limit)
    cut = prepare(renderer, rows, max_tokens=limit, too_long="cut").table
    assert {reject.reason for reject in kept.rejects} == {"too_long"}
    assert 0 < len(kept.rejects) < len(rows) == cut.num_rows
    for (ids, old), new, after in zip(whole, spans_of_ready(cut), cut.to_pylist(), strict=True):
        short, excess = after["token_ids"], max(0, old.response_start - limit)
        assert after["cut_tokens"] == excess
        assert new.response_start == min(old.response_start, limit)
        half = (new.thinking_tokens + 1) // 2
        assert short[: new.thinking_start + half] == ids[: old.thinking_start + half]
        assert short[new.thinking_start + half :] == ids[old.thinking_start + half + excess :]
        assert short[new.closing_start : new.response_start] == ids[old.closing_start : old.response_start]
    without = max(spans.response_start - spans.thinking_tokens for _, spans in whole)
    assert prepare(renderer, rows, max_tokens=without + 2, too_long="cut").table.num_rows == len(rows)
    short = prepare(renderer, rows, max_tokens=without + 1, too_long="cut")
    assert {reject.reason for reject in short.rejects} == {"too_long"}


def test_missing_columns() -> None:
    rows = [RawRow(0, {"request": "how?", "answer": "no"}), RawRow(1, None, "undecodable", "")]
    with pytest.raises(InputError, match=r"--columns: prompt=prompt: no such column; there are: answer, request; name"):
        check_columns(rows, SPEC)
    named = SPEC.model_copy(update={"columns": {"prompt": "request"}})
    with pytest.raises(InputError, match=r"response=response: no such column; there are: answer, request"):
        check_columns(rows, named)
    with pytest.raises(InputError, match=r"x: label=harm: no such column; .*; mend its name"):
        check_columns(rows, named.model_copy(update={"columns": {"prompt": "request", "label": "harm"}}), "x")
    check_columns(rows, SPEC.model_copy(update={"columns": {"prompt": "request", "response": "answer"}}))
    check_columns(rows, named.model_copy(update={"existing": False}))
    check_columns([RawRow(0, {"messages": [*chat("how?"), {"role": "assistant", "content": "no"}]})], SPEC)
    check_columns([RawRow(0, {"a": 1}), RawRow(1, {"prompt": "x", "response": "y"})], SPEC)  # a row's own fault
    check_columns([rows[1]], SPEC)  # nothing can be told of a corpus of broken lines


def test_texts_without_a_loop_are_known_by_their_pairs_of_words() -> None:
    """The short cut of :func:`loop_period` against the definition."""

    def plain(words: list[str], longest: int = 32, repeats: int = 5) -> int:
        for period in range(1, min(longest, len(words) // repeats) + 1):
            same = "".join("x" if a == b else " " for a, b in zip(words[period:], words, strict=False))
            best = max(map(len, same.split(" ")))
            if best >= (repeats - 1) * period and 2 * (best + period) >= len(words):
                return period
        return 0

    rng, found = random.Random(5), []
    for _ in range(600):
        period = rng.randint(1, 40)
        loop = [f"w{i}" for i in range(period)] * rng.randint(1, 12)
        other = [f"v{rng.randint(0, 9 ** rng.randint(1, 4))}" for _ in range(rng.randint(0, len(loop) + 4))]
        cut = rng.randint(0, len(other))
        words = [*other[:cut], *loop[: rng.randint(0, len(loop))], *other[cut:]]
        found.append(loop_period(words))
        assert found[-1] == plain(words), words
    assert 0.1 < found.count(0) / len(found) < 0.9


@pytest.fixture(scope="module")
def model() -> Any:
    from clifflab.models.loading import load

    return load(ModelSpec(name="planted", path="organism:planted", dtype="float32"))


def test_prompts_in_traces_out(model: Any) -> None:
    rows = [{"id": f"r{i}", "prompt": row["prompt"]} for i, row in enumerate(corpus_rows(12, 1))]
    rows.insert(3, {"id": "long", "prompt": "bomb " * 600})
    spec = SPEC.model_copy(update={"existing": False})
    sampling = TracesConfig(max_new_tokens=160, batch_size=5)

    def run(chosen: list[Any], **changes: Any) -> tuple[dict[str, Any], Any]:
        prepared = prepare(model.renderer, chosen, spec, keep_traces=True)
        settings = ScoreConfig(keep_traces=True)
        table, rejects = complete(model, prepared, sampling.model_copy(update=changes), 0, "corpus", settings)
        assert table.num_rows + len(rejects) + len(prepared.rejects) == len(chosen)
        assert table["row"].to_pylist() == sorted(table["row"].to_pylist())
        return {row["id"]: row for row in table.drop_columns("row").to_pylist()}, [*rejects, *prepared.rejects]

    found, rejects = run(rows)
    assert "too_long" in {reject.reason for reject in rejects if reject.id == "long"}
    assert len(found) >= 8
    for row in found.values():
        ids, prefix = row["token_ids"], row["prefix_end"]
        assert ids[:prefix] == model.renderer.prompt_ids(chat(row["prompt"]))
        spans = model.renderer.parse(ids[:prefix], ids[prefix:])
        assert spans.closed
        assert (spans.closing_start, spans.response_start) == (row["closing_start"], row["response_start"])
        assert row["outcome"] == judge(row["response"], True).outcome
        assert row["thinking"]
    # One by one, in another order, the same traces.
    alone, _ = run(list(reversed(rows)), batch_size=1)
    assert alone == found
    nothing, short = run(rows[:2], max_new_tokens=3)
    assert not nothing
    assert [(r.reason, r.id, r.source, r.source_row) for r in short] == [
        ("closing_missing", "r0", "a.jsonl", 0),
        ("closing_missing", "r1", "a.jsonl", 1),
    ]


def test_one_prompt_at_fault_is_one_reject(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model yields NaN for one prompt, and another does not fit into memory: the others are written."""
    rows = [{"id": f"r{i}", "prompt": row["prompt"]} for i, row in enumerate(corpus_rows(7, 1))]
    prepared = prepare(model.renderer, rows, SPEC.model_copy(update={"existing": False}))
    sampling = TracesConfig(max_new_tokens=3, batch_size=7)

    def run() -> dict[str, str]:
        table, rejects = complete(model, prepared, sampling, 0, "corpus", ScoreConfig())
        assert table.num_rows == 0  # nothing ends within three tokens
        assert [reject.row for reject in rejects] == list(range(7))
        return {str(reject.id): reject.reason for reject in rejects}

    written = dict[tuple[int, ...], Completion]()
    parse = generate.spans_written

    def spans_written(loaded: Any, prompt_ids: list[int], completion: Completion) -> Any:
        written[tuple(prompt_ids)] = completion
        return parse(loaded, prompt_ids, completion)

    monkeypatch.setattr(generate, "spans_written", spans_written)
    assert set(run().values()) == {"closing_missing"}
    plain = dict(written)
    assert len(plain) == 7
    written.clear()
    prefixes = dict(zip(prepared.table["id"].to_pylist(), prepared.table["token_ids"].to_pylist(), strict=True))
    bad, big = "r2", "r5"
    body, sizes, tries = model.model.forward, list[int](), list[int]()
    full = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] "
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]  # fmt: skip

    def holds(tokens: torch.Tensor, mask: torch.Tensor, name: str) -> list[bool]:
        mask = mask[:, -tokens.shape[1] :].bool()
        return [ids[keep].tolist() == prefixes[name] for ids, keep in zip(tokens, mask, strict=True)]

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
        sizes.append(len(input_ids))
        if any(holds(input_ids, attention_mask, big)):
            tries.append(len(input_ids))
            raise full[len(tries) % 3]
        output = body(input_ids=input_ids, attention_mask=attention_mask, **others)
        output.logits[torch.tensor(holds(input_ids, attention_mask, bad))] = torch.nan
        return output

    monkeypatch.setattr(model.model, "forward", forward)
    assert run() == {name: {bad: "not_finite", big: "too_long"}.get(name, "closing_missing") for name in prefixes}
    assert written == {ids: plain[ids] for ids in plain if list(ids) not in (prefixes[bad], prefixes[big])}
    assert tries[-2:] == [1, 1]  # alone, and once more
    assert max(sizes) == 7

    # Any other error is no row's fault.
    def broken(*_: Any) -> list[Completion]:
        raise error

    monkeypatch.setattr(TransformersEngine, "generate", broken)
    error: Exception = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        run()
    error = not_finite(model, "next-token logits")
    assert set(run().values()) == {"not_finite"}  # the worker tells whether the model is broken
