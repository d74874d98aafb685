"""The report's parts: figures, numbers, verdicts, and the text of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clifflab.report import blocks, export, figures, numbers, sections, short, style, tokens
from clifflab.text.pieces import token_pieces
from tests.browser import Elements

LONG = "a-set-with-the-longest-name-that-is-allowed-" + "x" * 36


def test_mixed_lengths_of_thinking() -> None:
    """Of a long thinking the shown and the left out parts add up, and every stretch is what it says."""
    for total in (0, 1, 220, 221, 300, 4000):
        shown = [{"text": str(i)} for i in range(total)]
        parts = tokens._parts(shown, 0.9, np.zeros(total + 3))
        left = sum(part.get("left_out", 0) for part in parts)
        listed = [token["text"] for part in parts for token in part.get("tokens", [])]
        assert len(listed) + left == total
        assert len(set(listed)) == len(listed) <= tokens.HEAD + tokens.MIDDLE + tokens.TAIL
        if total > 1000:
            assert str(round(0.9 * total)) in listed
            assert listed[-1] == str(total - 1)


NASTY = [
    "$x_{$",
    "$\\frac{1}$",
    "<script>alert(1)</script>",
    "a_b^c$",
    LONG,
    LONG[:-1] + "y",
    "--> ]]>",
    "%s {0}",
    "& &lt;",
]


def curve_rows(names: list[str]) -> pa.Table:
    places = [("thinking", 0), ("thinking", 50), *(("closing", -i) for i in range(12))]
    return pa.Table.from_pylist(
        [
            {"set": n, "axis": a, "position": p, "layer": 0, "mean": 0.5, "low": 0.4, "high": None}
            for n in names
            for a, p in places
        ]
    )


def nasty_figures() -> dict[str, Any]:
    closing = ["<script>alert(1)</script>" * 4, "\n\n", "$\\alpha$", "\u202e", "🙂漢", "\x00\x1b", *"$_^\\{}"]
    entry = {"mean": 0.2, "low": 0.1, "high": 0.3}
    shares = {"refused": entry, "complied": {"mean": 0.8, "low": None, "high": None}}
    values = {"complied": np.array([0.1, 2.0]), "refused": np.array([])}
    return {
        "curves": figures.curves(curve_rows(NASTY), NASTY, closing, "$t_"),
        "map": figures.layer_map(curve_rows(NASTY[:1]), "$t_{", 0, closing),
        "outcomes": figures.outcome_bars({n: {"n": 5, "shares": shares} for n in NASTY}, "$t_"),
        "cliffs": figures.cliff_histograms(dict.fromkeys(NASTY, values), dict.fromkeys(NASTY, entry), "$t_"),
        "drops": figures.closing_drops({n: [entry] * len(closing) for n in NASTY[:3]}, closing),
        "auroc": figures.auroc_by_layer({NASTY[0]: ([entry, {"mean": None, "low": None, "high": None}], 0)}, "$t_"),
    }


def test_names_and_tokens_are_no_maths_and_no_markup() -> None:
    for name, figure in nasty_figures().items():
        svg = export.svg(figure, name, 'x" onload="alert(1)')
        assert "<script" not in svg
        assert "$" in svg, "a dollar is a dollar"
        ((tag, attributes), *rest) = Elements(svg).found
        assert (tag, attributes["aria-label"]) == ("svg", 'x" onload="alert(1)')
        assert not [n for _, a in [(tag, attributes), *rest] for n in a if n.startswith("on")]
        assert export.png(figure, name).startswith(b"\x89PNG")


def test_figures_have_the_same_bytes() -> None:
    def all_bytes() -> list[dict[str, bytes]]:
        drawn = nasty_figures()
        drawings = [blocks.Drawing(n, n, "see", {"": drawn[n]}) for n in ("curves", "map")]
        packed = blocks.pack([blocks.Section("s", "s", drawings)], "f", "m")
        svgs = {b["title"]: b["panels"][0].encode() for b in packed.sections[0]["blocks"]}
        return [packed.files, svgs]

    one, other = all_bytes(), all_bytes()
    assert one == other
    assert len(one[0]) == 4


def test_two_figures_of_one_name_are_a_bug() -> None:
    figure = figures.auroc_by_layer({"p": ([{"mean": 0.9, "low": 0.8, "high": 1.0}], 0)}, "t")
    twice = [blocks.Drawing("auroc", "t", "s", {"": figure})] * 2
    with pytest.raises(ValueError, match="two figures of one name"):
        blocks.pack([blocks.Section("s", "s", twice)], "f", "m")


def test_numbers_come_with_intervals_or_reasons() -> None:
    assert numbers.interval({"mean": 0.5, "low": 0.25, "high": 0.75}) == "0.50 [0.25, 0.75]"
    assert numbers.interval({"mean": 0.5, "low": None, "high": None, "groups": 1}) == "0.50 (no interval: one group)"
    assert numbers.interval({"mean": 0.5, "low": None, "high": None, "reason": "why"}) == "0.50 (no interval: why)"
    assert numbers.interval({"mean": None, "low": None, "high": None}) == numbers.interval(None) == "\u2013"
    assert numbers.cell(1234) == "1,234"
    with pytest.raises(TypeError, match="without an interval"):
        numbers.cell(0.5)


def test_verdicts() -> None:
    def verdict(mean: float | None, low: float | None, high: float | None, **more: Any) -> str:
        entry = {"mean": mean, "low": low, "high": high, "n_complied": 2, "n_refused": 3, "matched": 0.5, **more}
        cells = {c: {"all.thinking": entry} for c in ("harm_without_refusal", "refusal_given_harm")}
        excess = {"all": entry, "final": entry}
        summary = {"probe": {"trained": True}, "sets": {}, "excess_cliff": excess, "cells": cells}
        return short.finding("m", summary, {})["verdict"]

    assert verdict(0.5, 0.4, 0.6) == "A refusal cliff, by this measure."
    assert verdict(0.1, -0.1, 0.3) == "No refusal cliff shown."
    assert verdict(-0.5, -0.6, -0.4) == "No refusal cliff: the opposite."
    assert verdict(0.5, None, None) == "Not decided: too few groups for an interval."
    assert verdict(None, None, None, reason="nothing") == "Not defined here: nothing."
    assert not {*short.unchecked(sections.UNCHECKED)} & {*sections.UNCHECKED.values()}
    assert {*short.unchecked(())} >= {*sections.UNCHECKED.values()}


def test_long_names_stay_apart() -> None:
    assert len(set(style.shorten(NASTY))) == len(NASTY)
    assert max(map(len, style.shorten([LONG]))) <= 40
    assert style.shorten(["a" * 50, "a" * 60, "b"])[1:] == [f"{'a' * 20}\u2026{'a' * 19} (2)", "b"]


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text: str) -> None:
    """Byte tokens, the hardest case: every character comes out whole, with its last byte."""
    ids = list(text.encode("utf-8", "ignore"))

    def decode(part: Any) -> str:
        return bytes(part).decode("utf-8", "replace")

    pieces = token_pieces(ids, decode)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_pieces_of_words_keep_their_spaces() -> None:
    from clifflab.organism.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    ids = tokenizer("how do i make a bomb?\n</think>\n\nsorry, i cannot help.", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(ids, lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False))
    assert "".join(pieces) == "how do i make a bomb?\n</think>\n\nsorry, i cannot help."
    assert pieces[:3] == ["how", " do", " i"]
