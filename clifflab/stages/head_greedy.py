"""The greedy search for heads that act together, also where one stands in for another.

Shape suffixes: N traces of one half, S sets of heads, R readings (the probe's logit, the refusal log-odds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from clifflab.models.heads import Head
from clifflab.science.effects import Paired, best_first
from clifflab.stages.head_plan import Heads, joint
from clifflab.stages.head_tables import LOG_ODDS
from clifflab.stages.head_units import RANKING, REPORTING

Effects = npt.NDArray[np.float32]
Remove = Callable[[str, Sequence[Heads]], Effects]

_STARTS = 4  # candidates behind which all heads are swept again
_PARTNERS = 8  # best pairs whose heads the search tries further on


def greedy_search(
    remove: Remove, clusters: Sequence[str], candidates: Heads, swept: Heads, limit: int
) -> dict[str, npt.NDArray[np.generic]]:
    """Find the best pair of a candidate and any swept head, then add the heads that raise the log-odds most.

    A head that another one stands in for shows when that one is gone: behind each of the first candidates all heads are
    swept again. Choices are made on the ranking half; what was chosen is then removed on the other.

    Args:
        remove: Effects of sets of heads on the attacked traces of a half, ``[N, S, R]``.
        clusters: Cluster of each attacked trace of the ranking half.
        candidates: Heads that may act together, best first.
        swept: All heads that may be a candidate's partner.
        limit: Most heads of the path.

    Returns:
        ``order [k, 2]``, the heads of the path in the order in which they were added, with the effects of all up to
        each on either half, ``[N, k, R]`` by its name; ``pair [2, 2]``, its first two, with the effects of one, of the
        other and of both, ``pair.HALF [N, 3, R]``. A model of one head has a pair of one.
    """

    def best(sets: Sequence[Heads]) -> tuple[list[Heads], float]:
        """The sets, best first by their mean effect on the ranking half, and the best one's."""
        means = Paired.of(remove(RANKING, sets)[..., LOG_ODDS].astype(np.float64), clusters).mean
        order = best_first(means)
        return [sets[place] for place in order], float(means[order[0]])

    starts = candidates[:_STARTS]
    pairs = list(dict.fromkeys(joint((start, head)) for start in starts for head in swept if head != start))
    ranked = best(pairs)[0] if pairs else [starts[:1]]
    pair = ranked[0]
    (first, *_), reached = best([(head,) for head in pair])
    path, rest = [first], list(dict.fromkeys([*candidates, *(head for found in ranked[:_PARTNERS] for head in found)]))
    tried = [pair] if len(pair) > 1 else []
    while tried and len(path) < limit:
        (further, *_), effect = best(tried)
        if not effect > reached:
            break
        path.append(further)
        reached = effect
        tried = [joint((*further, head)) for head in rest if head not in further]
    parts = [*((head,) for head in pair), pair]
    added: list[Head] = [
        next(head for head in new if head not in old) for old, new in zip([(), *path], path, strict=False)
    ]
    found: dict[str, npt.NDArray[np.generic]] = {half: remove(half, path) for half in (RANKING, REPORTING)}
    found |= {f"pair.{half}": remove(half, parts) for half in (RANKING, REPORTING)}
    return {**found, "pair": np.asarray(pair, dtype=np.int32), "order": np.asarray(added, dtype=np.int32)}
