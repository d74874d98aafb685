"""What a repair bought and what it cost: one model before and after, trace by trace (SPEC sections 5 and 6).

Shape suffixes: N traces, Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clifflab.science.paired import MEASURES, Bools, Cell, Outcomes, perplexities
from clifflab.science.stats import DIFFERENCE, Floats, GroupBootstrap

BEFORE, AFTER = 0, 1  # columns of the outcomes
Judged = tuple[str | None, str | None]  # outcome by rules, verdict of a guard


def outcome_rates(
    before: Sequence[Judged], after: Sequence[Judged], harmful_N: Bools, bootstrap: GroupBootstrap, *, guarded: bool
) -> dict[str, Any]:
    """Attack success, over-refusal, unclosed and degenerate rates before and after, and their paired changes.

    Args:
        before: Outcome and verdict of each trace of the model before; ``(None, None)`` where it has none.
        after: The same of the tuned model: the same prompt and the same sample.
        harmful_N: Which traces are of harmful requests.
        bootstrap: Resamples of the traces' clusters.
        guarded: Whether a guard decides what is harmful.

    Returns:
        ``rates``: of each measure ``before``, ``after`` and ``change``, each ``mean, low, high, n, groups`` with ``n``
        counting traces (null means where no trace has the label); ``unreadable``: guard answers left out on each side.
    """
    cells = [
        Cell(trace, column, *judged)
        for column, side in ((BEFORE, before), (AFTER, after))
        for trace, judged in enumerate(side)
    ]
    found = Outcomes.of(cells, harmful_N, np.asarray([BEFORE, BEFORE]), bootstrap, guarded=guarded)
    rates = {}
    for measure in MEASURES:
        rate, change = found.rates(measure, [AFTER])
        rates[measure] = {"before": found.rates(measure, [BEFORE])[0], "after": rate, "change": change}
    left_out = found.hits["unreadable"].sum(0)
    return {"rates": rates, "unreadable": {"before": int(left_out[BEFORE]), "after": int(left_out[AFTER])}}


def paired_means(
    before_N: Floats,
    after_N: Floats,
    bootstrap: GroupBootstrap,
    bounds: tuple[float, float] | None = None,
    mask_N: Bools | None = None,
) -> dict[str, Any]:
    """Means before and after, and the mean change within traces.

    Args:
        before_N: Values of the traces before; NaN where there is none.
        after_N: After.
        bootstrap: Resamples of the traces' clusters.
        bounds: Range of the values, where they have one.
        mask_N: Which traces count.

    Returns:
        ``before``, ``after`` and ``change``, each ``mean, low, high, n, groups``.
    """
    mask_N = np.ones(len(before_N), dtype=bool) if mask_N is None else mask_N
    change = bootstrap.mean(after_N - before_N, mask_N, None if bounds is None else DIFFERENCE).as_dict()
    if bounds is not None and change["low"] is not None:  # its pseudo-groups may lie outside what it can be
        most = bounds[1] - bounds[0]
        change |= {"low": max(change["low"], -most), "high": min(change["high"], most)}
    sides = {"before": before_N, "after": after_N}
    return {**{name: bootstrap.mean(v, mask_N, bounds).as_dict() for name, v in sides.items()}, "change": change}


def perplexity_change(before_N: Floats, after_N: Floats, tokens_N: Floats, bootstrap: GroupBootstrap) -> dict[str, Any]:
    """Perplexity per token of the same texts before and after, and its ratio.

    Args:
        before_N: Sum of the negative log-probabilities of each text's tokens in nats.
        after_N: The same under the tuned model.
        tokens_N: Tokens of each text.
        bootstrap: Resamples of the texts' clusters.

    Returns:
        ``before``, ``after`` and ``ratio`` (after over before, paired), each ``mean, low, high, n, groups`` with ``n``
        counting texts, and ``tokens``.
    """
    mask_N = np.ones(len(tokens_N), dtype=bool)
    before, _ = perplexities(before_N, before_N, tokens_N, mask_N, bootstrap)
    after, ratio = perplexities(after_N, before_N, tokens_N, mask_N, bootstrap)
    return {"before": before, "after": after, "ratio": ratio, "tokens": int(tokens_N.sum())}


def chosen(log_probabilities: Sequence[float], characters: Sequence[int] | None = None) -> int:
    """Index of the most probable choice, the first one of equals.

    Args:
        log_probabilities: Sum of the log-probabilities of each choice's tokens.
        characters: Characters of each choice, to choose by the log-probability per character.
    """
    values = np.asarray(log_probabilities, dtype=np.float64)
    return int(np.argmax(values if characters is None else values / np.asarray(characters)))


def accuracies(questions: Sequence[Mapping[str, Any]], bootstrap: GroupBootstrap) -> dict[str, Any]:
    """Share of multiple-choice questions answered rightly before and after, and its paired change.

    Args:
        questions: With ``answer``, ``characters`` of each choice and, in ``before`` and ``after``, the sums of the
            choices' log-probabilities.
        bootstrap: Resamples of the questions.

    Returns:
        ``before``, ``after`` and ``change`` by the sums, the same ``per_character``, and ``questions``.
    """

    def right(side: str, *, per_character: bool) -> npt.NDArray[np.float64]:
        return np.asarray(
            [
                chosen(question[side], question["characters"] if per_character else None) == question["answer"]
                for question in questions
            ],
            dtype=np.float64,
        )

    by_sum, by_character = (
        paired_means(right("before", per_character=how), right("after", per_character=how), bootstrap, (0.0, 1.0))
        for how in (False, True)
    )
    return {**by_sum, "per_character": by_character, "questions": len(questions)}
