"""``selection.json``: what was chosen, from what, and how the selectors differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from clifflab.repair.corpus import Corpus
from clifflab.repair.select import HARMFUL, Choice
from clifflab.repair.stream import Plan, Stats, blind_benign_share
from clifflab.repair.targets import Targets
from clifflab.science.judges import OUTCOMES
from clifflab.science.selection import JUDGES, RANDOM, REASONS, jaccard


def summarise(
    corpus: Corpus, stats: Stats, plan: Plan, choices: Mapping[str, Choice], targets: Targets
) -> dict[str, Any]:
    """The figures of a selection.

    Args:
        corpus: All traces, or those that can be chosen.
        stats: Counts over all traces.
        plan: What was asked.
        choices: The examples of every selector.
        targets: The training examples of the one that counts.
    """
    settings, chosen = plan.settings, choices[plan.settings.by]
    (model,) = stats.models or [None]
    left = {**dict.fromkeys(REASONS[1:], 0), **stats.left}
    sizes = {"harmful": len(chosen.harmful), "benign": len(chosen.benign)}
    return {
        "reason": "",
        "model": model,
        "by": settings.by,
        "probe": settings.probe,
        "budget": {"asked": settings.budget, "corpus": corpus.total, "examples": sum(sizes.values()), **sizes},
        "eligible": stats.eligible,
        "labelled": not stats.labels[""],
        "labels": {"with": stats.labels.total() - stats.labels[""], "without": stats.labels[""]},
        "left_out": {reason: count for reason, count in left.items() if count},
        "cut": {use: stats.cut[use] for use in ("benign", "refusals")},
        "contaminated": stats.near,
        "shared_group": 0,
        "cliff_cases": stats.cliff_cases,
        "corpus_outcomes": corpus_outcomes(stats),
        "benign_sets": _counts(corpus.strings("set")[chosen.benign]),
        "selectors": {name: _selector(choice, stats, plan) for name, choice in choices.items()},
        "overlap": {
            name: {other: jaccard(one.ids(HARMFUL), two.ids(HARMFUL)) for other, two in choices.items()}
            for name, one in choices.items()
        },
        "targets": targets.about,
    }


def corpus_outcomes(stats: Stats) -> dict[str, dict[str, int]]:
    """Traces of each set by outcome."""
    found: dict[str, dict[str, int]] = {}
    for name in sorted({name for name, _ in stats.outcomes}):
        found[name] = {"n": sum(count for (of, _), count in stats.outcomes.items() if of == name)}
        found[name] |= {str(outcome): stats.outcomes[name, outcome] for outcome in OUTCOMES}
    return found


def _selector(choice: Choice, stats: Stats, plan: Plan) -> dict[str, Any]:
    corpus, rows = choice.corpus, choice.harmful
    ranks = stats.pairs[choice.selector].spearman() if choice.selector != RANDOM else None
    return {
        "chosen": len(rows) + len(choice.benign),
        "filled": int(choice.filled.sum()) if choice.selector in JUDGES else 0,
        "benign_share": len(choice.benign) / (len(rows) + len(choice.benign)),
        "blind_benign_share": blind_benign_share(corpus, choice.selector, plan),
        "outcomes": _counts(corpus.strings("outcome")[rows]),
        "sets": _counts(corpus.strings("set")[rows]),
        "groups": len(set(corpus.strings("group")[rows].tolist())),
        "cliff_cases": int(corpus.cliff_cases(plan.rules)[rows].sum()),
        "spearman_with_final": ranks,
    }


def _counts(values: np.ndarray[Any, Any]) -> dict[str, int]:
    return dict(sorted(Counter(str(value) for value in values).items()))
