"""Which sets of heads are removed together: top heads, random ones beside them, and candidates in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, zip_longest
from typing import Any

from clifflab.artifacts import read_json
from clifflab.models.heads import Head
from clifflab.science.effects import random_sets, top_count
from clifflab.stages.base import Context
from clifflab.stages.head_ranks import Ranked, ranked_heads
from clifflab.stages.head_tables import FINAL

Heads = tuple[Head, ...]


@dataclass(frozen=True)
class Dose:
    """The top heads of one fraction.

    Attributes:
        kind: ``suppression`` or ``promoting``.
        fraction: Share of all heads of the model.
        heads: The set.
        random: Random sets with the same counts per layer; for suppression heads alone.
    """

    kind: str
    fraction: float
    heads: Heads
    random: tuple[Heads, ...]


@dataclass(frozen=True)
class Plan:
    """The sets of one model.

    Attributes:
        doses: Top heads of every fraction.
        candidates: Heads that are searched for joint effects, best first.
        reason: Why no set is removed; empty where some are.
        swept: All heads that were swept exactly, in the order of the model.
    """

    doses: tuple[Dose, ...] = ()
    candidates: Heads = ()
    reason: str = ""
    swept: Heads = ()
    _sets: dict[tuple[str, str], list[Heads]] = field(default_factory=dict)

    @property
    def pairs(self) -> list[Heads]:
        """All pairs of candidates."""
        return [joint(pair) for pair in combinations(self.candidates, 2)]

    def sets(self, role: str, half: str) -> list[Heads]:
        """The sets that are removed on traces of this role and half, each once."""
        if (role, half) not in self._sets:
            found: list[Heads] = []
            if role in ("attacked", "benign"):
                found += [dose.heads for dose in self.doses]
            if role == "attacked":
                found += [(head,) for head in self.candidates] + self.pairs
                if half == "reporting":
                    found += [drawn for dose in self.doses for drawn in dose.random]
            self._sets[role, half] = [heads for heads in dict.fromkeys(found) if heads]
        return self._sets[role, half]


def joint(heads: Sequence[Head]) -> Heads:
    """A set of heads in the order of the model, so that equal sets are equal."""
    return tuple(sorted(heads))


def planned_sets(context: Context, model: str) -> Plan:
    """The sets of a model, from the ranking that the step ``heads`` made."""
    folder = context.layout.folder(model)
    files = [folder / "heads.parquet", folder / "heads.json"]
    return context.once(f"joint:{model}", files, lambda: _plan(context, model))


def _plan(context: Context, model: str) -> Plan:
    settings, ranked = context.study.heads, ranked_heads(context, model)
    about = read_json(context.layout.folder(model) / "heads.json")
    if ranked.reason:
        return Plan(reason=ranked.reason)
    if not about["swept"]:
        return Plan(reason=f"heads.method is {settings.method}: no head is removed, alone or with others")
    doses = []
    for kind, order in (("suppression", ranked.suppression), ("promoting", ranked.promoting)):
        for fraction in dose_fractions(context):
            chosen = order[: top_count(fraction, ranked.total)]
            drawn: list[Heads] = []
            if kind == "suppression":
                draws = random_sets(chosen, about["heads_per_layer"], settings.random_draws, context.study.seed)
                drawn = [joint(heads) for heads in draws if heads]
            doses.append(Dose(kind, fraction, joint(chosen), tuple(drawn)))
    rows = context.table(context.layout.folder(model) / "heads.parquet").to_pylist()
    swept = sorted({(row["layer"], row["head"]) for row in rows if row["method"] == "exact"})
    candidates = _candidates(rows, ranked, settings.positions[0], settings.candidates)
    return Plan(tuple(doses), candidates, swept=tuple(swept))


def dose_fractions(context: Context) -> list[float]:
    """Shares of heads that are removed: those of the ablation, and the one that counts as the top."""
    return sorted({*context.study.ablation.fractions, context.study.heads.fraction} - {0.0})


def _candidates(rows: list[dict[str, Any]], ranked: Ranked, positions: str, count: int) -> Heads:
    """The first heads of the exact, the first-order and the direct ranking in turns, each head once.

    A head that another one stands in for has a small effect of its own; what it writes, and its gradient, may show it.
    """
    lists: list[list[Head]] = [ranked.suppression]
    for method, at in (("attribution", positions), ("direct", FINAL)):
        mine = [row for row in rows if (row["method"], row["positions"]) == (method, at)]
        sized = [row for row in mine if row["ranking_logit" if method == "direct" else "ranking_log_odds"] is not None]
        lists.append([(row["layer"], row["head"]) for row in sorted(sized, key=lambda row: row["rank"])])
    turns = [head for turn in zip_longest(*lists) for head in turn if head is not None]
    return tuple(dict.fromkeys(turns))[:count]
