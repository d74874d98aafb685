"""The measures of many traces at once, from probe logits at just the positions that they need.

Equal to :func:`clifflab.science.cliff.measure` trace by trace (SPEC section 3). Read are the window, the token before
the closing tokens, the closing tokens and the final position; everything else of the forward pass is left alone.

Shape suffixes: N traces, R read positions of all traces side by side, C closing tokens of all traces side by side, Q
probes, V the two scales (scores, then logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from clifflab.science.cliff import MEASURES, window_mask
from clifflab.science.probe import sigmoid
from clifflab.scoring.types import NOT_FINITE
from clifflab.text.spans import Spans

Ints = npt.NDArray[np.int64]
Tokens = Sequence[int] | npt.NDArray[Any]  # ids of one trace
COLUMNS = (*MEASURES, *(f"{name}_logit" for name in MEASURES))


@dataclass(frozen=True)
class Reads:
    """Where traces are read: of each the window, then the tail, which ends at the final position.

    Attributes:
        window_start: First token of the window within its trace, ``[N]``.
        window: Tokens of the window, ``[N]``; 0 where the thinking is too short to have one.
        tail_start: First token of the tail: the one before the closing tokens, or the first of them, or the final one.
        tail: Tokens of the tail, at least 1.
        closing: Closing tokens.
        thinks: Whether a thinking token stands before the closing tokens.
    """

    window_start: Ints
    window: Ints
    tail_start: Ints
    tail: Ints
    closing: Ints
    thinks: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, spans: Sequence[Spans], window: tuple[float, float]) -> Reads:
        """The reads of traces.

        Args:
            spans: Their token borders.
            window: The plateau's part of the thinking.
        """
        rows = np.empty((len(spans), 5), dtype=np.int64)
        for n, span in enumerate(spans):
            start, count = _window(span.thinking_tokens, window)
            tail = min(span.closing_start - (span.thinking_tokens > 0), span.final)
            rows[n] = span.thinking_start + start, count, tail, span.response_start - tail, span.closing_tokens
        thinks = np.fromiter((span.thinking_tokens > 0 for span in spans), dtype=bool, count=len(spans))
        return cls(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4], thinks)

    def take(self, chosen: Ints) -> Reads:
        """The reads of some of the traces."""
        return Reads(**{name: part[chosen] for name, part in vars(self).items()})

    def positions(self, starts: Ints) -> Ints:
        """Read positions of all traces in a row of tokens, ``[R]``, each trace's first token being at ``starts``."""
        counts = np.stack([self.window, self.tail], 1).ravel()
        firsts = np.stack([starts + self.window_start, starts + self.tail_start], 1).ravel()
        return ranges(firsts, counts)


@dataclass
class Found:
    """What was read of traces.

    Attributes:
        measures: :data:`COLUMNS` of each trace and probe, ``[N, Q, 10]`` float32; NaN is null (an empty window).
        drops: Score lost at each closing token against the token before it, ``[C, Q]`` float32, the traces' closing
            tokens side by side; NaN where none stands before.
        drops_logit: The same in logits.
        closing: Closing tokens of each trace, ``[N]``.
        problem: Of each trace why it has no measures: empty, ``not_finite`` or ``too_long``.
        tokens: Tokens that were run.
        padding: Tokens of padding that were run beside them.
    """

    measures: npt.NDArray[np.float32]
    drops: npt.NDArray[np.float32]
    drops_logit: npt.NDArray[np.float32]
    closing: Ints
    problem: list[str]
    tokens: int = 0
    padding: int = 0

    @classmethod
    def empty(cls, reads: Reads, probes: int) -> Found:
        """Room for the results of traces; NaN so far."""
        total = int(reads.closing.sum())
        shape = (len(reads.closing), probes, len(COLUMNS))
        measures, drops, drops_logit = (
            np.full(size, np.nan, dtype=np.float32) for size in (shape, (total, probes), (total, probes))
        )
        return cls(measures, drops, drops_logit, reads.closing, [""] * len(reads.closing))

    @property
    def padding_share(self) -> float:
        """Padding among all tokens that were run."""
        return self.padding / max(self.tokens + self.padding, 1)

    def put(self, chosen: Ints, reads: Reads, logits_RQ: npt.NDArray[np.float32]) -> None:
        """Measure some of the traces.

        Args:
            chosen: Which, ``[n]``.
            reads: Where these were read.
            logits_RQ: Probe logits at their read positions.
        """
        measures, drops_VCQ, bad = measure_reads(logits_RQ, reads)
        self.measures[chosen] = measures
        offsets = np.concatenate([[0], np.cumsum(self.closing)])
        where = ranges(offsets[chosen], reads.closing)
        self.drops[where], self.drops_logit[where] = drops_VCQ
        for n in chosen[bad]:
            self.problem[n] = NOT_FINITE


def measure_reads(
    logits_RQ: npt.NDArray[np.float32], reads: Reads
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Measure traces together.

    Args:
        logits_RQ: Probe logits at ``reads.positions``.
        reads: Where.

    Returns:
        :data:`COLUMNS` ``[N, Q, 10]``, drops ``[V, C, Q]``, and which traces hold a logit that is not finite, ``[N]``;
        all of such a trace is NaN.
    """
    counts = np.stack([reads.window, reads.tail], 1).ravel()
    stops = np.cumsum(counts)
    starts, ends = stops - counts, stops[1::2]
    bad_N = np.logical_or.reduceat(~np.isfinite(logits_RQ).all(1), starts[::2])
    logits = logits_RQ.astype(np.float64)
    values_VRQ = np.stack([sigmoid(logits), logits])
    final = values_VRQ[:, ends - 1]
    # A window without tokens gets its neighbour's value here, and NaN below.
    total = np.add.reduceat(values_VRQ, starts, axis=1)[:, ::2]
    highest = np.maximum.reduceat(values_VRQ, starts, axis=1)[:, ::2]
    none_NQ = (reads.window == 0)[:, None]
    plateau = np.where(none_NQ, np.nan, total / np.maximum(reads.window, 1)[:, None])
    highest = np.where(none_NQ, np.nan, highest)
    with np.errstate(invalid="ignore"):
        parts = np.stack([plateau, highest, final, plateau - final, highest - final], axis=-1)
    measures = np.concatenate([parts[0], parts[1]], axis=-1).astype(np.float32)
    at_C = ranges(ends - reads.closing, reads.closing)
    with np.errstate(invalid="ignore"):
        drops_VCQ = (values_VRQ[:, at_C - 1] - values_VRQ[:, at_C]).astype(np.float32)
    firsts_N = np.cumsum(reads.closing) - reads.closing
    drops_VCQ[:, firsts_N[(reads.closing > 0) & ~reads.thinks]] = np.nan
    measures[bad_N] = np.nan
    drops_VCQ[:, np.repeat(bad_N, reads.closing)] = np.nan
    return measures, drops_VCQ, bad_N


def ranges(firsts: Ints, counts: Ints) -> Ints:
    """``firsts[i], firsts[i] + 1, ...`` (``counts[i]`` of them), one run behind the other."""
    offsets = np.cumsum(counts) - counts
    row: Ints = np.arange(int(counts.sum())) + np.repeat(firsts - offsets, counts)
    return row


@lru_cache(maxsize=1 << 16)
def _window(thinking: int, window: tuple[float, float]) -> tuple[int, int]:
    """First token of the window and how many it has; they are neighbours."""
    inside: Any = np.flatnonzero(window_mask(thinking, window))
    return (int(inside[0]), len(inside)) if len(inside) else (0, 0)
