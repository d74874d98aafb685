"""Rank correlation of two binned scores from the counts of their pairs, which parts of a corpus can add up.

Shape suffixes: N observations, P distinct pairs, V distinct values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clifflab.science.stats import Floats

Ints = npt.NDArray[np.int64]

_WIDTH = 1 << 31  # of one value, from -2^30 to 2^30


def _none() -> Ints:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class PairCounts:
    """How often each pair of integers occurs.

    Attributes:
        codes: The pairs, each packed into one integer, ascending, ``[P]``.
        counts: How often each occurs, ``[P]``.
    """

    codes: Ints = field(default_factory=_none)
    counts: Ints = field(default_factory=_none)

    @classmethod
    def of(cls, one_N: Ints, other_N: Ints) -> PairCounts:
        """Of observations; values lie between -2^30 and 2^30."""
        codes, counts = np.unique(one_N * _WIDTH + other_N + _WIDTH // 2, return_counts=True)
        return cls(codes, counts.astype(np.int64))

    def __add__(self, other: PairCounts) -> PairCounts:
        codes, places = np.unique(np.r_[self.codes, other.codes], return_inverse=True)
        counts = np.zeros(len(codes), np.int64)
        np.add.at(counts, places, np.r_[self.counts, other.counts])
        return PairCounts(codes, counts)

    def spearman(self) -> float | None:
        """Spearman's rank correlation, equal values sharing their mean rank; ``None`` where one side never varies."""
        one_P, other_P = np.divmod(self.codes, _WIDTH)
        ranks = [self._ranks(values) for values in (one_P, other_P - _WIDTH // 2)]
        total = self.counts.sum()
        if total < 2:
            return None
        centred = [rank - (rank @ self.counts) / total for rank in ranks]
        spread = [float(self.counts @ rank**2) for rank in centred]
        if min(spread) == 0:
            return None
        return float(self.counts @ (centred[0] * centred[1])) / float(np.sqrt(spread[0] * spread[1]))

    def _ranks(self, values_P: Ints) -> Floats:
        """Mean rank of every pair's value among all observations, ``[P]``."""
        values_V, places_P = np.unique(values_P, return_inverse=True)
        held_V = np.zeros(len(values_V))
        np.add.at(held_V, places_P, self.counts)
        below_V = np.cumsum(held_V) - held_V
        return np.asarray((below_V + (held_V + 1) / 2)[places_P])
