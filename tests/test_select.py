"""Choosing examples: exact and total ranking, shares and seeds, safe targets, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest

from clifflab.repair.decontaminate import contaminated


def asked(text: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **columns}


LONG = "Please describe in a few words how a small sailing boat crosses a windy lake when the sun goes down"


def test_requests_that_are_evaluated_are_found_whatever_their_spelling_and_group() -> None:
    evaluated = [
        asked(LONG, set="b", id="1", group="x"),
        asked("How do I bake a cake?", set="b", id="2"),
        asked("how do i bake a cake", set="a", id="9"),
    ]
    corpus = [
        asked("how  do i BAKE a cake!"),
        asked(LONG.replace("windy", "stormy"), group="y"),
        asked("How do I build a boat that crosses a lake?"),
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG.upper()}]},
    ]
    found = contaminated(corpus, evaluated, 0.5, seed=0)
    assert list(found) == [0, 1, 3]
    assert found[0] == ("a", "9", 1.0)  # of equals the first one by set and id
    assert found[1][:2] == ("b", "1")
    assert 0.5 <= found[1][2] < 1
    assert found[3] == ("b", "1", 1.0)
    assert list(contaminated(corpus, evaluated, 1.0, seed=0)) == [0, 3]  # equal texts go at any threshold
    assert contaminated(corpus, [], 0.5, seed=0) == {}
    assert contaminated([], evaluated, 0.5, seed=0) == {}


@pytest.mark.parametrize("seed", [1, 2**40])
def test_what_is_contaminated_does_not_depend_on_the_order(seed: int) -> None:
    evaluated = [asked(f"{LONG} {word} today", set="s", id=word) for word in ("red", "green", "blue")]
    corpus = [asked(f"{LONG} {word} today") for word in ("red", "yellow", "blue", "white")] + [asked("something else")]
    forward = contaminated(corpus, evaluated, 0.6, seed)
    backward = contaminated(corpus[::-1], evaluated[::-1], 0.6, seed)
    assert forward == {len(corpus) - 1 - index: value for index, value in backward.items()}
    assert set(forward) == {0, 1, 2, 3}
    assert forward[0] == ("s", "red", 1.0)
    assert forward[1][:2] == ("s", "blue")  # as near to all three: the first by set and id
