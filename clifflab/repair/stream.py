"""A corpus in passing: counts of everything, and the few rows that any of the selectors may choose.

A part is what remains of some rows of a corpus. Parts of any rows, in any number and order, add up to the same: every
choice is one by :func:`~clifflab.science.selection.best`, which is mergeable, and the rest are counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clifflab.config import SelectConfig
from clifflab.repair.columns import candidates_of
from clifflab.repair.corpus import Corpus, rules_of
from clifflab.repair.select import BENIGN, draw_benign, left_out
from clifflab.science.ranks import PairCounts
from clifflab.science.selection import JUDGES, RANKINGS, Ints, Rules, best, buckets, draw_keys

REFUSERS = 512  # refused traces whose refusals may be lent
_MANY = 2**31 - 1  # tokens of a trace that is too long, where no more is known
_SPARE = 64  # further rows of each ranking, in place of chosen ones that cannot become examples
UNLABELLED = "unlabelled"
_PENDING = 1  # rows that wait to be pruned, as a multiple of those that were kept


@dataclass(frozen=True)
class Plan:
    """What is chosen from the corpus that passes.

    Attributes:
        settings: Selectors, filters and stratification.
        harmful: Harmful examples of each selector.
        benign: Benign examples.
        seed: Seed of all draws.
        near: ``SET/ID`` of requests that are evaluated: they are left out.
        verdicts: ``trace_id`` and ``verdict`` of a guard; ``None`` where the table has verdicts of its own, or none.
        cut: Ids of traces that ran into the limit of tokens.
        targets: ``SET/ID`` of requests with a usable target, where harmful examples need one.
        too_long: Ids of traces that have too many tokens; ``None`` where the table has tokens, or no filter asks.
        categories: ``name`` (``SET/ID``) and ``category`` of every request, where that shares the budget and the table
            has none.
    """

    settings: SelectConfig
    harmful: int
    benign: int
    seed: int
    near: pa.Array | None = None
    verdicts: pa.Table | None = None
    cut: pa.Array | None = None
    targets: pa.Array | None = None
    too_long: pa.Array | None = None
    categories: pa.Table | None = None

    @property
    def selectors(self) -> tuple[str, ...]:
        """All selectors that are compared, the one that counts first."""
        return tuple(dict.fromkeys((self.settings.by, *self.settings.beside)))

    @property
    def rules(self) -> Rules:
        """What makes a trace eligible, for all selectors alike."""
        return rules_of(self.settings)


@dataclass
class Stats:
    """Counts over a whole corpus; they add up.

    Attributes:
        outcomes: Traces by set and outcome.
        left: Traces that are not eligible, by reason.
        eligible: Traces that are.
        labels: Closed traces by label; a score table holds no others.
        cut: Responses that are not used since they break off, by their use.
        judged: Traces with a guard's verdict.
        cliff_cases: Traces whose harm was recognised and answered all the same.
        models: Rows by model.
        probes: Rows of reported logistic probes, by training positions.
        near: Traces of requests that are evaluated too: no part of the corpus.
        pairs: For each ranking, how its buckets meet those of the final score, over eligible traces.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    eligible: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    judged: int = 0
    cliff_cases: int = 0
    models: Counter[str] = field(default_factory=Counter)
    probes: Counter[str] = field(default_factory=Counter)
    near: int = 0
    pairs: dict[str, PairCounts] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: Corpus, plan: Plan) -> Stats:
        """Of the rows at hand."""
        why_not = corpus.why_not(plan.rules)
        rows = np.flatnonzero(why_not == 0)
        labels = corpus.strings("label")[corpus.strings("outcome") != "unclosed"]
        final = -buckets(corpus.floats("final")[rows])
        return cls(
            outcomes=Counter(zip(corpus.strings("set").tolist(), corpus.strings("outcome").tolist(), strict=True)),
            left=Counter(left_out(why_not)),
            eligible=len(rows),
            labels=Counter(np.where(labels == UNLABELLED, "", labels).tolist()),
            cut=Counter(corpus.cut_off(plan.rules)),
            judged=int((corpus.strings("verdict") != "").sum()),
            cliff_cases=int(corpus.cliff_cases(plan.rules).sum()),
            models=Counter(corpus.strings("model").tolist()),
            pairs={name: PairCounts.of(_tiers(corpus, name, rows), final) for name in plan.selectors if _ranks(name)},
        )

    def __add__(self, other: Stats) -> Stats:
        names = self.pairs | other.pairs
        none = PairCounts()
        return Stats(
            outcomes=self.outcomes + other.outcomes,
            left=self.left + other.left,
            eligible=self.eligible + other.eligible,
            labels=self.labels + other.labels,
            cut=self.cut + other.cut,
            judged=self.judged + other.judged,
            cliff_cases=self.cliff_cases + other.cliff_cases,
            models=self.models + other.models,
            probes=self.probes + other.probes,
            near=self.near + other.near,
            pairs={name: self.pairs.get(name, none) + other.pairs.get(name, none) for name in names},
        )


@dataclass(frozen=True)
class Part:
    """What remains of some rows: their counts, and the rows that may be chosen."""

    stats: Stats
    table: pa.Table


def reduce_scores(scores: pa.Table, plan: Plan) -> Part:
    """A batch of a score table."""
    reported = scores.filter(pc.and_(scores["reported"], pc.equal(scores["estimator"], "logistic")))
    table = candidates_of(scores, plan.settings.probe)
    if plan.near is not None:
        table = table.filter(pc.invert(pc.is_in(names_of(table), value_set=plan.near)))
    table = _joined(table, plan)
    part = reduce_corpus(Corpus(table, table.num_rows), plan)
    probes = Counter(dict(zip(*_counts(reported["train_positions"]), strict=True)))
    return Part(part.stats + Stats(probes=probes), part.table)


def reduce_corpus(corpus: Corpus, plan: Plan) -> Part:
    """The rows of a corpus that is at hand."""
    return Part(Stats.of(corpus, plan), prune(corpus, plan))


def prune(corpus: Corpus, plan: Plan) -> pa.Table:
    """The rows that any choice of the plan may take, in their order."""
    rules, settings = plan.rules, plan.settings
    eligible, blind = corpus.eligible(rules), corpus.eligible(rules, blind=True)
    more = replace(plan, harmful=plan.harmful + _SPARE)
    kept = [_chosen(corpus, name, eligible, more, settings.stratify) for name in plan.selectors]
    kept += [_chosen(corpus, name, blind, plan) for name in plan.selectors]
    kept.append(draw_benign(corpus, corpus.benign(rules), plan.benign + _SPARE, plan.seed))
    kept.append(lenders(corpus, rules, plan.seed))
    return corpus.take(np.unique(np.concatenate(kept)))


def blind_benign_share(corpus: Corpus, selector: str, plan: Plan) -> float | None:
    """Share of benign requests among what a selector would take if no trace had a label.

    A high plateau is then all that makes a trace eligible. ``None`` where nothing is.
    """
    rows = _chosen(corpus, selector, corpus.eligible(plan.rules, blind=True), plan)
    return float((corpus.strings("label")[rows] == BENIGN).mean()) if len(rows) else None


def lenders(corpus: Corpus, rules: Rules, seed: int) -> Ints:
    """Rows of refused harmful requests whose refusals may be lent, at most :data:`REFUSERS`, drawn by the seed."""
    rows = corpus.refusers(rules)
    keys = draw_keys(corpus.strings("trace_id")[rows], corpus.codes[rows], seed, "lent refusals")
    return rows[best(keys, REFUSERS)]


def fold(parts: Iterable[Part], plan: Plan) -> Part:
    """Add parts up. Memory stays bounded by what the plan keeps."""
    stats, waiting, kept, pending = Stats(), list[pa.Table](), 0, 0

    def pruned() -> pa.Table:
        joined = pa.concat_tables(waiting, promote_options="default").combine_chunks()
        return prune(Corpus(joined, joined.num_rows), plan)

    for part in parts:
        stats = stats + part.stats
        waiting.append(part.table)
        pending += part.table.num_rows
        if pending > max(_PENDING * kept, 50_000):
            waiting = [pruned()]
            kept, pending = waiting[0].num_rows, 0
    return Part(stats, pruned() if waiting else pa.table({}))


def _chosen(corpus: Corpus, selector: str, rows: Ints, plan: Plan, stratify: str | None = None) -> Ints:
    keys = corpus.keys(selector, rows, plan.seed)
    return rows[best(keys, plan.harmful, corpus.strata(stratify, rows))]


def names_of(table: pa.Table) -> Any:
    """``SET/ID`` of the request of each row."""
    return pc.binary_join_element_wise(table["set"], table["id"], "/")


def _joined(table: pa.Table, plan: Plan) -> pa.Table:
    """With what stands in tables of its own: the guard's verdicts, which traces are too long, categories."""

    def put(name: str, column: Any) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, name, column.cast(table.schema.field(name).type))

    if plan.verdicts is not None:
        places = pc.index_in(table["trace_id"], value_set=plan.verdicts["trace_id"].combine_chunks())
        table = put("verdict", pc.fill_null(plan.verdicts["verdict"].take(places).cast(pa.string()), ""))
    if plan.cut is not None:
        cut = pc.is_in(table["trace_id"], value_set=plan.cut)
        table = put("finish_reason", pc.if_else(cut, pa.scalar("length"), table["finish_reason"]))
    if plan.targets is not None:
        table = put("has_target", pc.is_in(names_of(table), value_set=plan.targets))
    if plan.too_long is not None:
        table = put("tokens", pc.if_else(pc.is_in(table["trace_id"], value_set=plan.too_long), _MANY, 0))
    if plan.categories is not None:
        places = pc.index_in(names_of(table), value_set=plan.categories["name"].combine_chunks())
        table = put("category", plan.categories["category"].take(places))
    return table


def _ranks(selector: str) -> bool:
    return selector in RANKINGS or selector in JUDGES


def _tiers(corpus: Corpus, selector: str, rows: Ints) -> Ints:
    """Buckets of a ranking, or whether a judge named the trace."""
    if selector in JUDGES:
        return corpus.named_by(selector)[rows].astype(np.int64)
    measure, sign = RANKINGS[selector]
    return sign * buckets(corpus.floats(measure)[rows])


def _counts(column: Any) -> tuple[list[Any], list[int]]:
    found = pc.value_counts(column)
    return found.field("values").to_pylist(), found.field("counts").to_pylist()
