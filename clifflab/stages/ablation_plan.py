"""What the ablation removes from the model, and what the changed model writes and reads: fixed by the study alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clifflab.artifacts import read_parquet
from clifflab.models.heads import Head, HeadMap
from clifflab.science.ablation import Condition, conditions, ranked_by_hash, removed_heads, turn
from clifflab.stages.base import Context
from clifflab.stages.duplicates import group_clusters
from clifflab.stages.head_ranks import cluster_halves, ranked_heads

RANDOM_SHARE = 8  # a draw of random heads gets an eighth of the traces; draws take turns, so that all serve equally
RANDOM_LEAST = 8  # and at least this many
_COLUMNS = ["trace_id", "id", "set", "label", "group", "closed", "closing_start", "response_start"]

Row = tuple[int, int]


@dataclass(frozen=True)
class Experiment:
    """The plan of one model's ablation.

    Attributes:
        reason: Why there is none; empty where there is one.
        conditions: What is done to the model, the unchanged model first.
        halves: Of each set whose groups its traces are of: ``reporting``, or ``all`` where that half has none of it.
        rows: For each treatment of the thinking, what is written: indices of a condition and of a trace.
        perplexity: What is read for the perplexity: the same.
    """

    reason: str
    conditions: tuple[Condition, ...] = ()
    halves: tuple[tuple[str, str], ...] = ()
    rows: tuple[tuple[str, tuple[Row, ...]], ...] = ()
    perplexity: tuple[Row, ...] = ()


def experiment(context: Context, model: str) -> Experiment:
    """The plan, from the ranked heads and the traces; computed once as long as they stay the same."""
    return context.once(f"ablation:{model}", _files(context, model), lambda: _experiment(context, model))


def ablated_heads(context: Context, model: str, heads: HeadMap) -> list[tuple[Head, ...]]:
    """Heads of every condition of the experiment."""

    def choose() -> list[tuple[Head, ...]]:
        ranked, layers = ranked_heads(context, model), [layer.heads for layer in heads.layers]
        found = experiment(context, model).conditions
        return removed_heads(found, ranked.suppression, ranked.promoting, layers, context.study.seed)

    return context.once(f"ablated:{model}", _files(context, model), choose)


def _files(context: Context, model: str) -> list[Path]:
    folder = context.layout.folder(model)
    names = ("traces.parquet", "outcomes.parquet", "heads.parquet", "heads.json")
    return [*(folder / name for name in names), context.layout.root / "clusters.parquet"]


def _experiment(context: Context, model: str) -> Experiment:
    settings, folder = context.study.ablation, context.layout.folder(model)
    if not settings.traces:
        return Experiment("ablation.traces is 0")
    ranked = ranked_heads(context, model)
    if ranked.reason:
        return Experiment(f"there is no ranking of heads: {ranked.reason}")
    found = conditions(settings.fractions, settings.kinds, settings.random_draws, ranked.total)
    traces = context.table(folder / "traces.parquet").select(_COLUMNS).to_pylist()
    sets, halves = _chosen(context, traces)
    rows = []
    for thinking in settings.thinking:
        usable = [[i for i in members if thinking == "regenerated" or _held(traces[i])] for members in sets.values()]
        rows.append((thinking, _rows(found, usable, settings.traces)))
    benign = _benign(context, model, traces)
    return Experiment(
        "", tuple(found), tuple(halves.items()), tuple(rows), _rows(found, [benign], settings.perplexity_traces)
    )


def _chosen(context: Context, traces: list[dict[str, Any]]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Of each set a seeded choice of prompts with one trace each, of groups on which no head was chosen."""
    everyone: dict[str, list[int]] = {}
    wanted = context.study.ablation.sets
    for index, trace in enumerate(traces):
        if not wanted or trace["set"] in wanted:
            everyone.setdefault(trace["set"], []).append(index)
    sets, halves = {}, {}
    for name, members in everyone.items():
        unseen = _unseen(context, traces, members)
        halves[name] = "reporting" if unseen else "all"
        sets[name] = one_a_prompt(context, "ablation", traces, unseen or members)[: context.study.ablation.traces]
    return sets, halves


def _benign(context: Context, model: str, traces: list[dict[str, Any]]) -> list[int]:
    """A seeded choice of benign answered traces, of groups on which no head was chosen where there are any."""
    outcomes = read_parquet(context.layout.folder(model) / "outcomes.parquet")["outcome"].to_pylist()
    members = [
        index
        for index, (trace, outcome) in enumerate(zip(traces, outcomes, strict=True))
        if trace["label"] == "benign" and outcome == "complied"
    ]
    chosen = one_a_prompt(context, "perplexity", traces, _unseen(context, traces, members) or members)
    return chosen[: context.study.ablation.perplexity_traces]


def _unseen(context: Context, traces: list[dict[str, Any]], members: Iterable[int]) -> list[int]:
    clusters, halves = group_clusters(context), cluster_halves(context)
    return [index for index in members if halves[clusters[traces[index]["group"]]] == "reporting"]


def one_a_prompt(context: Context, purpose: str, traces: list[dict[str, Any]], members: list[int]) -> list[int]:
    """Members in a seeded order, of each prompt the first of its samples in it."""
    order = ranked_by_hash(context.study.seed, purpose, [traces[index]["trace_id"] for index in members])
    first: dict[tuple[str, str], int] = {}
    for place in order:
        index = members[place]
        first.setdefault((traces[index]["set"], traces[index]["id"]), index)
    return list(first.values())


def _held(trace: dict[str, Any]) -> bool:
    """Whether there is a thinking to hold fixed: it ended, with closing tokens."""
    return bool(trace["closed"] and trace["response_start"] > trace["closing_start"])


def _rows(found: list[Condition], sets: list[list[int]], wanted: int) -> tuple[Row, ...]:
    """Condition and trace of every row, trace by trace: a batch is then of few prompts, and little of it is padding."""
    rows = []
    share = min(wanted, max(RANDOM_LEAST, math.ceil(wanted / RANDOM_SHARE)))
    for members in sets:
        for number, condition in enumerate(found):
            mine = members if condition.draw is None or not members else turn(members, share, condition.draw)
            rows += [(index, number) for index in mine]
    return tuple((number, index) for index, number in sorted(rows))
