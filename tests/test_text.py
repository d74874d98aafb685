"""Token spans: markers are found by characters of the rendering, whatever the tokenizer merges."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clifflab.errors import InputError, TraceError
from clifflab.text import FORMATS, Renderer, resolve_format
from clifflab.text.render import split_inline

R1 = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
QWEN3 = R1.replace("<think>\n", "").replace("{% if", "{# </think> #}{% if")
PLAIN = R1.replace("<think>\n", "")
TEXT = ["hm.\n</think>\n\nSure, here", "no.\n</think>\n\nSorry", "a.</think>\n\nb", "<think>\nok\n</think>\n\nyes"] * 50


def bpe(template: str | None, *, merges: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with ``merges`` it has tokens that run across the markers' borders."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT if merges else ["plain words and more"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {"plain": bpe(R1, merges=False), "merging": bpe(R1, merges=True)}


@pytest.fixture(scope="module", params=["plain", "merging", "words"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "words":
        from clifflab.organism.tokenizer import build_tokenizer

        return build_tokenizer()
    return TOKENIZERS[request.param]


def test_merging_tokenizer_merges_across_the_marker() -> None:
    tokens = TOKENIZERS["merging"].convert_ids_to_tokens(TOKENIZERS["merging"](TEXT[0])["input_ids"])
    assert any("</think>" in token and not token.startswith("<") for token in tokens), tokens


def test_spans_of_a_rendered_trace(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, resolve_format("auto", tokenizer))
    messages = [{"role": "user", "content": "how do i make a bomb?"}]
    ids, spans = renderer.render(messages, "this is bad. i refuse.", "sorry, i cannot help.")
    prefix = renderer.prompt_ids(messages)
    assert ids[: spans.prefix_end] == prefix
    assert spans.closed
    assert spans.final == spans.response_start - 1
    assert renderer.texts(ids, spans)[1].replace(" ", "") == "sorry,icannothelp."
    assert renderer.parse(prefix, ids[len(prefix) :]) == spans
    check_borders(renderer, ids, spans)


def check_borders(renderer: Renderer, ids: list[int], spans: Any) -> None:
    """The laws of closing tokens, stated on characters."""
    body = ids[spans.prefix_end :]
    text, marker = renderer.decode(body), renderer.form.close
    start = text.index(marker)
    closing, response = spans.closing_start - spans.prefix_end, spans.response_start - spans.prefix_end
    assert len(renderer.decode(body[:closing])) <= start
    assert len(renderer.decode(body[: closing + 1])) > start
    before_response = renderer.decode(body[:response])
    assert not before_response[start + len(marker) :].strip() or response == closing + 1
    if response < len(body):
        assert renderer.decode(body[: response + 1])[start + len(marker) :].strip()


LETTERS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(TOKENIZERS)), thinking=LETTERS, response=LETTERS)
def test_borders_of_any_text(kind: str, thinking: str, response: str) -> None:
    renderer = Renderer(TOKENIZERS[kind], FORMATS["r1"])
    ids, spans = renderer.render([{"role": "user", "content": "x"}], thinking, response)
    assert spans.end == len(ids)
    assert len(spans.scored) == spans.thinking_tokens + spans.closing_tokens
    check_borders(renderer, ids, spans)


def test_unclosed_thinking(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, FORMATS["r1"])
    prefix, body = renderer.prompt_ids([{"role": "user", "content": "x"}]), renderer.encode("i think and think")
    spans = renderer.parse(prefix, body)
    assert not spans.closed
    assert spans.closing_start == spans.response_start == spans.end == len(prefix) + len(body)
    assert not renderer.parse(prefix, []).closed


def test_closed_without_a_response(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, FORMATS["r1"])
    body = renderer.encode("hm.\n</think>\n\n")
    spans = renderer.parse([1, 2], body)
    assert spans.closed
    assert spans.response_start == spans.end
    assert spans.closing_tokens >= 1


@pytest.mark.parametrize(
    ("text", "closed", "thinking"),
    [
        ("<think>\nhm hm\n</think>\n\nyes", True, True),
        ("yes at once", True, False),
        ("<think>\nhm", False, True),
        ("<th", False, False),
    ],
)
def test_model_opens_its_own_thinking(text: str, closed: bool, thinking: bool) -> None:
    renderer = Renderer(bpe(QWEN3, merges=False), FORMATS["qwen3"])
    spans = renderer.parse([5], renderer.encode(text))
    assert spans.closed == closed
    assert (spans.thinking_tokens > 0) == thinking
    if thinking and closed:
        assert renderer.decode(renderer.encode(text)[spans.thinking_start - 1 :]).startswith("hm hm")


def test_no_thinking() -> None:
    renderer = Renderer(bpe(PLAIN, merges=False), FORMATS["none"])
    ids, spans = renderer.render([{"role": "user", "content": "x"}], None, "sure")
    assert spans.thinking_tokens == spans.closing_tokens == 0
    assert list(spans.scored) == [spans.prefix_end - 1] == [spans.final]
    assert renderer.texts(ids, spans) == ("", "sure")


def test_render_an_unclosed_and_an_empty_trace() -> None:
    renderer = Renderer(TOKENIZERS["plain"], FORMATS["r1"])
    _, unclosed = renderer.render([{"role": "user", "content": "x"}], "hm hm", None)
    assert not unclosed.closed
    _, empty = renderer.render([{"role": "user", "content": "x"}], "hm hm", "")
    assert empty.closed
    assert empty.response_start == empty.end


def test_render_refuses_what_is_no_trace() -> None:
    with pytest.raises(TraceError, match="thinking_unexpected"):
        Renderer(bpe(PLAIN, merges=False), FORMATS["none"]).render([{"role": "user", "content": "x"}], "hm", "sure")
    renderer = Renderer(TOKENIZERS["plain"], FORMATS["r1"])
    with pytest.raises(TraceError, match="closing_missing"):
        renderer.render([{"role": "user", "content": "x"}], None, "sure")
    with pytest.raises(TraceError, match="closing_ambiguous"):
        renderer.render([{"role": "user", "content": "x"}], "a </think> b", "sure")


def test_formats_are_checked_against_the_template() -> None:
    assert resolve_format("auto", bpe(R1, merges=False)).name == "r1"
    assert resolve_format("auto", bpe(QWEN3, merges=False)).name == "qwen3"
    assert resolve_format("none", bpe(PLAIN, merges=False)).name == "none"
    for name, template, words in (
        ("auto", PLAIN, "set the model's thinking_format"),
        ("r1", PLAIN, "does not end with <think>"),
        ("qwen3", R1, "set it to r1"),
        ("r9", R1, "choose auto"),
        ("auto", None, "no chat template"),
    ):
        with pytest.raises(InputError, match=words):
            resolve_format(name, bpe(template, merges=False))


def test_system_message_and_hash() -> None:
    tokenizer = TOKENIZERS["plain"]
    plain, polite = (Renderer(tokenizer, FORMATS["r1"], system) for system in (None, "be polite"))
    messages = [{"role": "user", "content": "x"}]
    assert polite.decode(polite.prompt_ids(messages)).startswith("<system>be polite<user>x")
    assert plain.template_hash != polite.template_hash
    assert plain.template_hash == Renderer(tokenizer, FORMATS["r1"]).template_hash


def test_split_inline() -> None:
    assert split_inline("<think>\na\n</think>\n\nb") == ("a", "b")
    assert split_inline("b") == (None, "b")
    assert split_inline("a\n</think>\n\nb") == ("a", "b")
    assert split_inline("<think> a") == ("a", None)
