"""Corpus requests that are evaluated too, or nearly: whoever tunes on them measures memory and not repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.config import DuplicatesConfig
from clifflab.data.clusters import Requests
from clifflab.data.duplicates import near_pairs

Evaluated = tuple[str, str, float]


def contaminated(
    corpus: Sequence[Mapping[str, Any]],
    evaluated: Sequence[Mapping[str, Any]],
    threshold: float,
    seed: int,
    *,
    ngram: int = DuplicatesConfig().ngram,
    permutations: int = DuplicatesConfig().permutations,
) -> dict[int, Evaluated]:
    """Which corpus requests equal an evaluated request, or are too near to one.

    What the user says is compared, all turns together, as near-duplicates within a study are
    (:mod:`clifflab.data.duplicates`): case, punctuation and white space are no difference, and words that dozens of
    requests of either side share weigh little. Groups and labels play no part: a request in other words than an
    evaluated one is too near whoever grouped it.

    Args:
        corpus: Rows of the corpus; ``messages`` is read.
        evaluated: Rows of the evaluated prompts; ``messages``, ``set`` and ``id`` are read.
        threshold: Least similarity that is too near, above 0; from 1 on only equal requests are.
        seed: Seed of the MinHash permutations.
        ngram: Words of a shingle.
        permutations: MinHash permutations.

    Returns:
        By index into the corpus, in ascending order, ``(set, id, similarity)`` of the most similar evaluated request;
        of several as similar the first one by ``(set, id)``. Equal requests have similarity 1.
    """
    requests = Requests.of([*corpus, *evaluated])
    text_of = requests.text_of.tolist()
    asked: dict[int, tuple[str, str]] = {}
    for row, text in zip(evaluated, text_of[len(corpus) :], strict=True):
        name = str(row["set"]), str(row["id"])
        asked[text] = min(asked.get(text, name), name)
    nearest: dict[int, Evaluated] = {text: (*name, 1.0) for text, name in asked.items()}
    if asked and threshold < 1:
        pairs = near_pairs(requests.normals, threshold=threshold, ngram=ngram, permutations=permutations, seed=seed)
        for left, right, similarity in zip(*(column.tolist() for column in pairs), strict=True):
            for text, other in ((left, right), (right, left)):
                if other in asked and text not in asked:
                    found = (*asked[other], similarity)
                    nearest[text] = min(nearest.get(text, found), found, key=lambda entry: (-entry[2], *entry[:2]))
    return {index: nearest[text] for index, text in enumerate(text_of[: len(corpus)]) if text in nearest}
