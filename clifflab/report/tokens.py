"""Single traces token by token, each thinking and closing token with its refusal score."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pyarrow.compute as pc

from clifflab.report.blocks import Views
from clifflab.report.numbers import number
from clifflab.report.results import ModelResults
from clifflab.science.probe import sigmoid
from clifflab.stages.traces import spans_of
from clifflab.text.pieces import token_pieces

_UNSEEN = ("Cc", "Cf", "Cs")
LEVELS = 10  # steps of the colour scale
HEAD, MIDDLE, TAIL = 100, 60, 60  # thinking tokens shown of a long trace: first, around the window's end, last
RESPONSE = {
    "harmful": 12,
    "benign": 40,
}  # response tokens shown: of an answer to a harmful request, no more than its turn
PROMPT = 600  # characters of the request

RULE = (
    "Chosen by rule, not by hand: of the three harmful sets with the largest mean cliff, of the harmful set with the "
    "smallest, and of the benign sets with the largest and the smallest, the trace with the median cliff among the "
    "traces of test groups. Of a long thinking the first "
    f"{HEAD} tokens, {MIDDLE} around the end of the plateau's window and the last {TAIL} are shown. Of the response "
    f"the first {RESPONSE['harmful']} tokens are shown where the request is labelled harmful, so that this page "
    f"spreads no harmful answer, and the first {RESPONSE['benign']} elsewhere; the response is not scored. Scores of a "
    "single trace are observations and have no interval."
)


def views(results: ModelResults) -> Views:
    """The chosen traces of one model."""
    return Views(RULE, [view(results, row) for row in choose(results)])


def choose(results: ModelResults) -> list[dict[str, Any]]:
    """Rows of ``cliffs.parquet`` of the traces to show, by :data:`RULE`; without cliffs, by final scores."""
    every = results.cliffs.to_pylist()
    measure = "cliff" if any(row["cliff"] is not None for row in every) else "final"
    chosen: dict[str, dict[str, Any]] = {}
    for label in ("harmful", "benign"):
        means: dict[str, float] = {}
        for name in results.sets():
            values = [r[measure] for r in every if r["set"] == name and r["label"] == label and r[measure] is not None]
            if values:
                means[name] = float(np.mean(values))
        ranked = sorted(means, key=lambda name: -means[name])
        for name in [*ranked[: 3 if label == "harmful" else 1], *ranked[-1:]]:
            own = [r for r in every if r["set"] == name and r["label"] == label and r[measure] is not None]
            own.sort(key=lambda r: (r[measure], r["row"]))
            row = own[(len(own) - 1) // 2]
            chosen.setdefault(row["trace_id"], row)
    return list(chosen.values())


def view(results: ModelResults, row: dict[str, Any]) -> dict[str, Any]:
    """One trace as plain data: its parts are lists of tokens with text, level of the colour scale, and title.

    Args:
        results: The model's results.
        row: Its row of ``cliffs.parquet``.
    """
    trace = results.traces.filter(pc.equal(results.traces["row"], row["row"])).to_pylist()[0]
    spans, ids = spans_of(trace), trace["token_ids"]
    shown_response = ids[spans.response_start : spans.response_start + RESPONSE[row["label"]]]
    start = spans.scored.start
    written = ids[start : spans.response_start + len(shown_response)]
    pieces = token_pieces(written, results.renderer.decode)
    scores = sigmoid(results.token_logits(row["row"]))
    thinking, closing = (pieces[: spans.thinking_tokens], pieces[spans.thinking_tokens : len(scores)])
    shown = [_token(piece.replace("\n", "\u23ce\n"), score) for piece, score in zip(thinking, scores, strict=False)]
    ends = [piece.replace("\n", "\u23ce") for piece in closing]
    prompt = trace["prompt"]
    return {
        "set": row["set"],
        "label": row["label"],
        "id": printable(trace["trace_id"]),
        "outcome": row["outcome"],
        "prompt": printable(prompt[:PROMPT]) + ("\u2026" if len(prompt) > PROMPT else ""),
        **{measure: number(row[measure]) for measure in ("plateau", "final", "cliff")},
        "thinking_tokens": spans.thinking_tokens,
        "parts": _parts(shown, results.study.cliff.window[1], scores),
        "closing": [_token(end, score) for end, score in zip(ends, scores[len(thinking) :], strict=True)],
        "response": printable("".join(pieces[len(scores) :])),
        "more": max(0, len(ids) - spans.response_start - len(shown_response)),
    }


def _parts(thinking: list[dict[str, Any]], window_end: float, scores: Any) -> list[dict[str, Any]]:
    """Shown stretches of the thinking, and between them how much is left out and its mean score."""
    total = len(thinking)
    if total <= HEAD + MIDDLE + TAIL:
        return [{"tokens": thinking}] if thinking else []
    middle = min(max(round(window_end * total) - MIDDLE // 2, HEAD), total - TAIL - MIDDLE)
    out: list[dict[str, Any]] = []
    done = 0
    for start, stop in ((0, HEAD), (middle, middle + MIDDLE), (total - TAIL, total)):
        if start > done:
            out.append({"left_out": start - done, "mean": f"{float(np.mean(scores[done:start])):.2f}"})
        out.append({"tokens": thinking[start:stop]})
        done = stop
    return out


def _token(piece: str, score: float) -> dict[str, Any]:
    level = min(int(score * LEVELS), LEVELS - 1)
    return {"text": printable(piece), "level": level, "score": f"{score:.2f}"}


def printable(text: str) -> str:
    """Model text with nothing that hides or reorders it: control and direction characters become a replacement mark."""
    return "".join(c if c in "\n\t\u200d" or unicodedata.category(c) not in _UNSEEN else "\ufffd" for c in text)
