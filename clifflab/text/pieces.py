"""The text of each token in its place."""

from __future__ import annotations

from collections.abc import Sequence

from clifflab.text.spans import BROKEN, LONGEST, Decode


def token_pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to the tokens before it; joined, they are the text of all.

    A token is decoded behind the one before it, since many tokenizers drop or add a space at the start of a text. Of a
    character that spans several byte tokens, the last one carries it and the others are empty.

    Args:
        ids: Token ids.
        decode: Ids to text, special tokens kept, nothing cleaned up.
    """
    pieces: list[str] = []
    context = done = 0
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[context:done]) if done else "", decode(ids[context:end])
        if text.endswith(BROKEN) and end < len(ids) and end - done < LONGEST:
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        context, done = done, end
    return pieces
