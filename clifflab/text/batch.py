"""Rendering many traces at once: the ids and borders of :meth:`clifflab.text.render.Renderer.render`, much sooner.

The plain way finds borders by decoding prefixes of a trace's tokens again and again. Here the tokenizer says which
characters each token covers, many traces are tokenised in one call, and each is decoded once. The borders are the same
where two things hold:

- The tokens decode to the very text that they were made from. This is looked at in every trace.
- The first tokens of a text decode to the beginning of what all of them decode to. This is a property of the decoder.
  The exception is a character whose bytes are spread over several tokens. Cut in two, a byte-level decoder makes it one
  replacement character, which changes no count. Byte fallback may make it several, and more of what stands before it.

Then the n-th visible character of a text belongs to the same token whichever way tokens are counted, and borders are
visible characters or ends. A trace of which this is not sure is rendered the plain way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from clifflab.errors import InputError, TraceError
from clifflab.text.render import Messages, Renderer
from clifflab.text.spans import Spans, place_spans

Trace = tuple[Messages, str | None, str | None]
Rendered = tuple[list[int], Spans]
_CHARACTERS = 1 << 20  # of one call to the tokenizer, whose results take about 100 bytes a token
Decoder = Literal["", "bytes", "pieces", "fallback"]


class BatchRenderer:
    """Renders many traces at once.

    Args:
        renderer: The plain way, which also decides what is not sure here.

    Attributes:
        plain: How many traces went the plain way.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer, self.plain = renderer, 0
        self._kind = decoder_kind(renderer.tokenizer)
        vocabulary = renderer.tokenizer.get_vocab() if self._kind == "fallback" else {}
        # Tokens that are one byte of a longer character.
        self._split = frozenset(vocabulary[t] for byte in range(0x80, 0x100) if (t := f"<0x{byte:02X}>") in vocabulary)

    def prompts(self, conversations: Sequence[Messages]) -> list[list[int] | TraceError]:
        """Chat prefixes as token ids, or why one cannot be rendered, in their order."""
        texts = [self._prompt(messages) for messages in conversations]
        return self._encoded(texts)

    def render(self, traces: Sequence[Trace]) -> list[Rendered | TraceError]:
        """Token ids and borders of existing traces, or why one cannot be used, in their order.

        Args:
            traces: Of each the conversation before the assistant's turn, the thinking and the response, as
                :meth:`~clifflab.text.render.Renderer.render` takes them. A conversation that the chat template refuses
                is ``not_messages``.
        """
        bodies = [self._body(thinking, response) for _, thinking, response in traces]
        prompts = [
            body if isinstance(body, TraceError) else self._prompt(messages)
            for (messages, _, _), body in zip(traces, bodies, strict=True)
        ]
        prefixes = self._encoded(prompts)
        wanted = [place for place, prefix in enumerate(prefixes) if not isinstance(prefix, TraceError)]
        texts = [str(bodies[place]) for place in wanted]
        found: list[Rendered | TraceError] = list(prefixes)  # type: ignore[arg-type]
        for place, text, encoding in zip(wanted, texts, self._completions(texts), strict=True):
            prefix = prefixes[place]
            assert not isinstance(prefix, TraceError)
            found[place] = self._join(prefix, text, encoding, traces[place])
        return found

    def _body(self, thinking: str | None, response: str | None) -> str | TraceError:
        try:
            return self.renderer.completion(thinking, response)
        except TraceError as error:
            return error

    def _prompt(self, messages: Messages) -> str | TraceError:
        try:
            return self.renderer.prompt(messages)
        except InputError:  # what the template says may quote the conversation
            return TraceError("not_messages", "the chat template refuses the conversation")

    def _encoded(self, texts: Sequence[str | TraceError]) -> list[list[int] | TraceError]:
        good = [text for text in texts if isinstance(text, str)]
        if self._kind:
            runs = (self._backend().encode_batch_fast(run, add_special_tokens=False) for run in _runs(good))
            encoded = (list(encoding.ids) for run in runs for encoding in run)
        else:
            encoded = (self.renderer.encode(text) for text in good)
        return [next(encoded) if isinstance(text, str) else text for text in texts]

    def _completions(self, texts: Sequence[str]) -> Iterator[Any]:
        """The tokenizer's own account of each text where it decodes to that text, else ``None``."""
        if not self._kind:
            yield from (None for _ in texts)
            return
        for run in _runs(texts):
            backend = self._backend()
            encodings = backend.encode_batch(run, add_special_tokens=False)
            decoded = backend.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
            for text, encoding, back in zip(run, encodings, decoded, strict=True):
                yield encoding if back == text and self._split.isdisjoint(encoding.ids) else None

    def _join(self, prefix: list[int], body: str, encoding: Any, trace: Trace) -> Rendered | TraceError:
        """A trace from its tokenised parts; ``encoding`` is ``None`` where the plain way has to look."""

        def token_at(char: int) -> int:
            token = None if body[char].isspace() else encoding.char_to_token(char)
            if token is None or (self._kind != "bytes" and _shared(encoding, token, char)):
                raise _UnsureError
            return int(token)

        if encoding is not None:
            try:
                ids = encoding.ids
                spans = place_spans(body, self.renderer.form, len(prefix), len(ids), token_at)
                if spans.closed or trace[2] is None:
                    return prefix + ids, spans
            except _UnsureError:
                pass
        self.plain += 1
        try:
            return self.renderer.render(*trace)
        except TraceError as error:
            return error

    def _backend(self) -> Any:
        """The tokenizer proper, without truncation and padding, as every call of the tokenizer leaves it."""
        self.renderer.encode("")
        return self.renderer.tokenizer.backend_tokenizer


class _UnsureError(Exception):
    """The quick way does not know a border."""


def _shared(encoding: Any, token: int, char: int) -> bool:
    """Whether the next token covers the character too, as it does where the first is a space that was put before it."""
    following = encoding.token_to_chars(token + 1) if token + 1 < len(encoding) else None
    return following is not None and following[0] <= char


def _runs(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in runs that one call of the tokenizer takes."""
    run: list[str] = []
    size = 0
    for text in texts:
        if run and size + len(text) > _CHARACTERS:
            yield run
            run, size = [], 0
        run.append(text)
        size += len(text)
    if run:
        yield run


def decoder_kind(tokenizer: Any) -> Decoder:
    """Whether the first tokens of a text decode to its beginning, as the tokenizer's decoder says.

    Returns:
        ``bytes``: they do, byte by byte. ``pieces``: they do, and a space may be put before a text. ``fallback``: the
        same, as long as no character is cut into bytes. Empty: not known.
    """
    from transformers import PreTrainedTokenizerFast as Plain

    own = type(tokenizer)
    methods = ("__call__", "_encode_plus", "decode", "_decode")
    if not isinstance(tokenizer, Plain) or any(getattr(own, m) is not getattr(Plain, m) for m in methods):
        return ""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return ""
    about = json.loads(decoder.__getstate__())
    parts = about["decoders"] if about["type"] == "Sequence" else [about]
    kinds = {part["type"] for part in parts}
    if not all(_keeps_beginnings(part) for part in parts):
        return ""
    if kinds == {"ByteLevel"}:
        return "bytes"
    return "fallback" if "ByteFallback" in kinds else "pieces"


def _keeps_beginnings(part: dict[str, Any]) -> bool:
    """Whether a step of a decoder turns the beginning of a text into the beginning of its result."""
    kind = part["type"]
    if kind == "Replace":  # of what is cut apart inside the pattern, the result begins with what is there
        pattern = part["pattern"].get("String", "")
        return len(pattern) == 1 or (len(pattern) > 1 and bool(pattern[:-1] == part["content"]))
    if kind == "Strip":
        return bool(part["stop"] == 0)
    return kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
