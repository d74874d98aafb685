"""Choosing the examples of a repair from a scored corpus, with any budget, selector and seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clifflab import tables
from clifflab.config import SelectConfig
from clifflab.errors import InputError
from clifflab.repair.corpus import Corpus, rules_of
from clifflab.science.selection import JUDGES, REASONS, Ints, best, budget_count, draw_keys, parts_of

HARMFUL, BENIGN = "harmful", "benign"


class NothingToChooseError(InputError):
    """The corpus of this model has no (or too few) traces that could be examples."""


@dataclass(frozen=True)
class Choice:
    """The examples of one selector.

    Attributes:
        corpus: Where they come from.
        selector: Who chose them.
        asked: The budget as it was given.
        harmful: Rows of the corpus that get a safe target, the best first.
        benign: Rows of benign requests that keep their answer.
        filled: Which of the harmful ones the selector's judge did not itself name, ``[len(harmful)]``.
    """

    corpus: Corpus
    selector: str
    asked: float
    harmful: Ints
    benign: Ints
    filled: npt.NDArray[np.bool_]

    def ids(self, role: str) -> list[str]:
        """Trace ids of one role, in order."""
        rows = self.harmful if role == HARMFUL else self.benign
        return [str(name) for name in self.corpus.strings("trace_id")[rows]]

    def table(self) -> pa.Table:
        """Rows of ``tables.SELECTION``: harmful examples by rank, then benign ones."""
        rows = np.r_[self.harmful, self.benign]
        found = self.corpus.table.take(pa.array(rows, pa.int64()))
        sizes = len(self.harmful), len(self.benign)
        columns = {name: found[name] for name in tables.SELECTION.names if name in found.schema.names}
        columns["selector"] = [self.selector] * len(rows)
        columns["role"] = [HARMFUL] * sizes[0] + [BENIGN] * sizes[1]
        columns["rank"] = [rank + 1 for size in sizes for rank in range(size)]
        columns["filled"] = [*self.filled.tolist(), *[False] * sizes[1]]
        return pa.table({name: columns[name] for name in tables.SELECTION.names}, schema=tables.SELECTION)


def choose(
    corpus: Corpus, selector: str, budget: float, settings: SelectConfig, seed: int, without: Collection[str] = ()
) -> Choice:
    """Choose the examples of one selector.

    The benign ones are drawn by the seed, evenly over their sets, and are the same for every selector; those of a
    smaller budget are among those of a larger one.

    Args:
        corpus: The scored traces.
        selector: One of ``SELECTORS``.
        budget: A count, or a share of the corpus; benign examples are part of it.
        settings: Who is eligible, the benign share and the stratification.
        seed: Seed of all draws.
        without: Ids of traces that are not chosen, whatever their scores.

    Raises:
        InputError: The budget is larger than the corpus, the selector lacks its verdicts or the stratification its
            column.
        NothingToChooseError: Too few traces are eligible, or too few benign requests were answered.
    """
    rules = rules_of(settings, [selector])
    count = check_budget(budget, corpus.total)
    check_verdicts(corpus, selector)
    wanted, wanted_benign = parts_of(count, settings.benign)
    eligible = _others(corpus, corpus.eligible(rules), without)
    check_enough(left_out(corpus.why_not(rules)), wanted, len(eligible))
    rows = eligible[best(corpus.keys(selector, eligible, seed), wanted, corpus.strata(settings.stratify, eligible))]
    named = corpus.named_by(selector)[rows] if selector in JUDGES else np.ones(len(rows), dtype=bool)
    benign = draw_benign(corpus, _others(corpus, corpus.benign(rules), without), wanted_benign, seed)
    if len(benign) < wanted_benign:
        problem = f"the budget wants {wanted_benign} benign examples, and {len(benign)} benign requests were answered"
        remedy = "add labelled benign requests to the corpus, or lower the benign share"
        raise NothingToChooseError("benign", settings.benign, problem, remedy)
    return Choice(corpus, selector, budget, rows, benign, ~named)


def _others(corpus: Corpus, rows: Ints, without: Collection[str]) -> Ints:
    names = corpus.strings("trace_id")
    return rows[[names[row] not in without for row in rows]] if without else rows


def draw_benign(corpus: Corpus, rows: Ints, count: int, seed: int) -> Ints:
    """Benign examples: drawn by the seed, evenly over their sets."""
    keys = draw_keys(corpus.strings("trace_id")[rows], corpus.codes[rows], seed, "benign examples")
    return rows[best(keys, count, corpus.strings("set")[rows])]


def check_budget(budget: float, total: int) -> int:
    """Examples of a budget.

    Raises:
        InputError: It is larger than the corpus.
    """
    count = budget_count(budget, total)
    if not total:
        raise NothingToChooseError("corpus", "0 traces", "nothing to choose from", "give a corpus with traces")
    if count > total:
        problem = f"larger than the corpus, which has {total} traces"
        raise InputError("budget", budget, problem, "lower it, or give a larger corpus")
    return count


def check_verdicts(corpus: Corpus, selector: str) -> None:
    """Whether the selector's judge has judged the corpus.

    Raises:
        InputError: It has not.
    """
    if selector == "guard" and not (corpus.strings("verdict") != "").any():
        remedy = "configure a guard (judge.guard), give its verdicts, or choose another selector"
        raise InputError("selector", selector, "the corpus has no guard verdicts", remedy)


def check_enough(left: dict[str, int], wanted: int, found: int) -> None:
    """Whether enough traces are eligible.

    Args:
        left: How many traces are left out, by reason.
        wanted: Harmful examples.
        found: Eligible traces.

    Raises:
        NothingToChooseError: There are too few; says why.
    """
    if found >= wanted:
        return
    why = ", ".join(f"{count} {reason}" for reason, count in left.items())
    later = REASONS[REASONS.index("no_score") + 1 :]
    if not found and left.get("no_score") and not any(left.get(reason) for reason in later):
        problem, remedy = (
            "no trace has the scores that rank",
            "score the corpus, or choose selectors whose score it has",
        )
    elif not found:
        problem, remedy = "no trace is eligible", "loosen the filters, or give another corpus"
        if left.get("no_target"):
            remedy = "give a corpus with targets, or keep the thinking"
    else:
        problem, remedy = f"only {found} traces are eligible", "lower the budget, or loosen the filters"
    raise NothingToChooseError("budget", f"{wanted} harmful examples", f"{problem} (left out: {why or 'none'})", remedy)


def left_out(why_not: npt.NDArray[Any]) -> dict[str, int]:
    """How many traces are left out, by reason."""
    counts = np.bincount(why_not, minlength=len(REASONS)).tolist()
    return {reason: counts[code] for code, reason in enumerate(REASONS) if code and counts[code]}
