"""Shortening a trace that is too long for a model, token by token."""

from __future__ import annotations

from clifflab.text.spans import Spans


def without_middle(ids: list[int], spans: Spans, excess: int) -> tuple[list[int], Spans, int] | None:
    """Take tokens out of the middle of the thinking; its first and last tokens and all other parts stay.

    The first half of what is kept of the thinking has one token more where their number is odd. The ids are those of
    the whole trace: nothing is tokenised again.

    Args:
        ids: Token ids of the trace.
        spans: Its borders.
        excess: How many tokens to take out.

    Returns:
        The ids, their borders, and the place of the first token after the cut; ``None`` where fewer than two tokens of
        the thinking would be left.
    """
    kept = spans.thinking_tokens - excess
    if kept < 2:
        return None
    cut = spans.thinking_start + (kept + 1) // 2
    borders = (spans.closing_start - excess, spans.response_start - excess, spans.end - excess)
    shorter = Spans(spans.prefix_end, spans.thinking_start, *borders, spans.closed)
    return ids[:cut] + ids[cut + excess :], shorter, cut
