"""Where thinking, closing tokens and response lie in a row of token ids (SPEC section 1).

Borders are characters of the model's own rendering, mapped to tokens by decoding prefixes of the ids: a tokenizer may
merge the text around a marker, so neither a fixed number of tokens nor the marker's own ids would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from clifflab.text.formats import ThinkingFormat

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"
LONGEST = 4  # bytes of a character, and so the most tokens that one can take


@dataclass(frozen=True)
class Spans:
    """Token borders of one trace; each part is ``[start, next start)``.

    Attributes:
        prefix_end: End of the chat prefix, where the model began to write.
        thinking_start: First thinking token.
        closing_start: First token that ends the thinking block.
        response_start: First token of the response.
        end: Number of tokens.
        closed: Whether the thinking ended. If not, the last three borders are equal.
    """

    prefix_end: int
    thinking_start: int
    closing_start: int
    response_start: int
    end: int
    closed: bool

    def __post_init__(self) -> None:
        borders = (self.prefix_end, self.thinking_start, self.closing_start, self.response_start, self.end)
        if self.prefix_end < 1 or any(a > b for a, b in pairwise(borders)):
            raise ValueError(f"borders out of order: {borders}")

    @property
    def final(self) -> int:
        """The final position: the last token before the response."""
        return self.response_start - 1

    @property
    def thinking_tokens(self) -> int:
        """Length of the thinking in tokens."""
        return self.closing_start - self.thinking_start

    @property
    def closing_tokens(self) -> int:
        """Number of closing tokens; 0 where the model has no thinking and wrote nothing before the response."""
        return self.response_start - self.closing_start

    @property
    def scored(self) -> range:
        """Positions with a score: thinking and closing tokens, and always the final position."""
        return range(min(self.thinking_start, self.final), self.response_start)


def find_spans(prefix_ids: Sequence[int], completion_ids: Sequence[int], form: ThinkingFormat, decode: Decode) -> Spans:
    """Split a completion into thinking, closing tokens and response.

    Args:
        prefix_ids: Token ids of the chat prefix (open marker included where the template writes it).
        completion_ids: What the model wrote, without its end-of-turn token.
        form: The model's thinking format.
        decode: Ids to text, special tokens kept, nothing cleaned up.
    """
    start, ids = len(prefix_ids), list(completion_ids)
    text = decode(ids)
    lengths: dict[int, int] = {len(ids): len(text)}

    def length(count: int) -> int:
        """Characters of the first ``count`` tokens; searches share their probes."""
        if count not in lengths:
            lengths[count] = _covered(ids, count, text, decode)
        return lengths[count]

    def token_at(char: int) -> int:
        """Index of the token that holds (the first byte of) character ``char``; ``len(ids)`` past the end."""
        return _first(len(ids), lambda k: length(k + 1) > char)

    return place_spans(text, form, start, len(ids), token_at)


def _covered(ids: list[int], count: int, text: str, decode: Decode) -> int:
    """Characters of ``text``, which the ids decode to, that the first ``count`` ids hold, or hold the first byte of.

    Ids that end inside a character decode to a replacement character that stands for it. Byte fallback writes one for
    every byte, those of the characters before it among them.
    """
    part = decode(ids[:count])
    if not part.endswith(BROKEN) or text.startswith(part):
        return len(part)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(part, text, strict=False)))
    for whole in range(count - 1, max(0, count - LONGEST), -1):
        if text.startswith(before := decode(ids[:whole])):
            same = max(same, len(before))
            break
    return same + 1


def place_spans(text: str, form: ThinkingFormat, start: int, count: int, token_at: Callable[[int], int]) -> Spans:
    """Borders of a completion of which it is known where its characters lie.

    Args:
        text: The completion, as its tokens decode.
        form: The model's thinking format.
        start: Number of tokens of the chat prefix.
        count: Number of tokens of the completion.
        token_at: Index, in the completion, of the token that holds the first byte of a character. Asked only of
            characters that are no white space.
    """
    end = start + count

    def after_space(char: int) -> int:
        """Index of the first token that holds a non-space character at or after ``char``."""
        rest = text[char:]
        blank = len(rest) - len(rest.lstrip())
        return token_at(char + blank) if blank < len(rest) else count

    parts = split_text(text, form)
    if parts is None:  # cut off inside the open marker, or nothing was written
        return Spans(start, end, end, end, end, False)
    if parts.close is None:
        thinking = after_space(parts.thinking) if parts.thinking else 0
        return Spans(start, start + thinking, end, end, end, False)
    if not parts.response:  # answered at once, without any marker
        first = after_space(parts.response)
        return Spans(start, start, start, start + first, end, True)
    closing = token_at(parts.close)
    thinking = after_space(parts.thinking) if parts.thinking else 0
    response = max(after_space(parts.response), closing + 1)
    return Spans(start, start + min(thinking, closing), start + closing, start + response, end, True)


@dataclass(frozen=True)
class TextParts:
    """The same borders in characters of a completion.

    Attributes:
        thinking: End of the open marker; 0 where the completion has none.
        close: Start of the close marker; ``None`` where the thinking never ended.
        response: End of the close marker, or of the marker of a response without thinking; 0 where there is neither.
    """

    thinking: int
    close: int | None
    response: int


def split_text(text: str, form: ThinkingFormat) -> TextParts | None:
    """Find a completion's markers; ``None`` where it is too short to tell whether the model thinks.

    The first close marker ends the thinking, as it does for the model: what follows is generated as a response, whether
    the marker was meant or only mentioned.
    """
    if not form.thinks:
        return TextParts(0, 0, 0)
    lead = len(text) - len(text.lstrip())
    opened = text.startswith(form.open, lead)  # models repeat a marker that their template has written
    thinking = lead + len(form.open) if opened else 0
    close = text.find(form.close, thinking)
    if close >= 0:  # opened, pre-opened, or a block that the model closes without having opened it
        return TextParts(thinking, close, close + len(form.close))
    if opened or form.pre_opened:
        return TextParts(thinking, None, len(text))
    if form.direct and text.startswith(form.direct, lead):
        return TextParts(0, 0, lead + len(form.direct))
    if form.open.startswith(text[lead:]) or form.direct.startswith(text[lead:]):
        return None
    return TextParts(0, 0, 0)


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """Smallest ``k`` in ``[0, count)`` for which the monotone predicate holds, else ``count``."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
