"""The figures of a comparison: rows of ``evaluation.parquet`` and the content of ``evaluation.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from clifflab.artifacts import read_json, read_parquet
from clifflab.repair.output import TRAIN
from clifflab.science.repair import accuracies, outcome_rates, paired_means, perplexity_change
from clifflab.science.stats import GroupBootstrap
from clifflab.stages.base import REPAIR, Context
from clifflab.stages.duplicates import group_clusters
from clifflab.stages.evaluation_cliffs import NOTHING, Cliffs
from clifflab.stages.evaluation_plan import (
    AFTER,
    BEFORE,
    CHOICES,
    TEXTS,
    TRACES,
    choice_sets,
    model_before,
    no_old_probe,
    no_texts,
)

_COLUMNS = ["trace_id", "id", "sample", "set", "label", "group", "closed", "thinking_start", "closing_start"]
_GIVEN = "its traces are given and not written by either model"
Read = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        traces: Its traces by ``trace_id``, with ``outcome``, ``harm`` (a guard's verdict), ``thinking`` (tokens) and
            ``cliffs`` by its own reported logistic probes, by kind of training positions.
        summary: Content of its ``summary.json``.
    """

    traces: dict[str, dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def of(cls, context: Context, model: str) -> Side:
        """From a model's folder."""
        folder = context.layout.folder(model)
        traces = read_parquet(folder / "traces.parquet").select(_COLUMNS).to_pylist()
        outcomes = read_parquet(folder / "outcomes.parquet")["outcome"].to_pylist()
        guard = read_parquet(folder / "guard.parquet")
        harm = dict(zip(guard["trace_id"].to_pylist(), guard["verdict"].to_pylist(), strict=True))
        cliffs = read_parquet(folder / "cliffs.parquet")
        cliffs = cliffs.filter(pc.and_(cliffs["reported"], pc.equal(cliffs["estimator"], "logistic")))
        own: dict[str, dict[str, float]] = {}
        for row in cliffs.select(["trace_id", "train_positions", "cliff"]).to_pylist():
            own.setdefault(row["trace_id"], {})[row["train_positions"]] = row["cliff"]
        found = {
            trace["trace_id"]: {
                **{name: trace[name] for name in _COLUMNS[:6]},
                "outcome": outcome,
                "harm": harm.get(trace["trace_id"]),
                "thinking": trace["closing_start"] - trace["thinking_start"],
                "cliffs": own.get(trace["trace_id"], {}),
            }
            for trace, outcome in zip(traces, outcomes, strict=True)
        }
        return cls(found, read_json(folder / "summary.json"))


def evaluation_figures(context: Context, model: str, read: Read) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ``evaluation.parquet`` and the content of ``evaluation.json``.

    Args:
        context: The study and its files.
        model: The tuned model.
        read: What the units read, by kind.
    """
    before = model_before(context, model)
    return _Comparison(context, model, Side.of(context, before), Side.of(context, model), read).found()


class _Comparison:
    """Both sides, trace by trace.

    Args:
        context: The study and its files.
        model: The tuned model.
        before: The model before.
        after: The tuned model.
        read: What the units read, by kind.
    """

    def __init__(self, context: Context, model: str, before: Side, after: Side, read: Read) -> None:
        self.context, self.study, self.model = context, context.study, model
        self.before, self.after, self.read = before, after, read
        self.clusters = group_clusters(context)
        both = {**after.traces, **before.traces}
        order = [*before.traces, *(name for name in after.traces if name not in before.traces)]
        self.traces = [both[name] for name in order]
        self.trained = self._trained()
        summaries = before.summary, after.summary
        no_old = no_old_probe(context, model)
        self.cliffs = Cliffs(context, self.traces, before.traces, after.traces, summaries, read[TRACES], no_old)

    def _trained(self) -> set[str]:
        """Clusters of the training examples, where this study made the tuned model."""
        made = self.study.model(self.model).repairs
        if made is None:
            return set()
        with (self.context.layout.folder(made, REPAIR) / TRAIN).open(encoding="utf-8") as lines:
            groups = {json.loads(line)["group"] for line in lines}
        return {self.clusters[group] for group in groups if group in self.clusters}

    def found(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows and figures."""
        head = {"model": self.model, "before": model_before(self.context, self.model)}
        if not set(self.before.traces) & set(self.after.traces):
            return [], {"reason": "the two models share no prompt that both could answer", **head}
        return [{**head, **row} for row in self.rows()], {
            "reason": "",
            **head,
            "judged_by": "guard" if self.study.judge.guard else "rules",
            "samples": self.study.traces.samples,
            **self.outcomes(),
            "perplexity": self.perplexity(),
            "choices": self.choices(),
            **self.cliffs.figures(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row a trace."""
        rows, old = [], self.cliffs.by_old_probe("all", "cliff")
        for index, trace in enumerate(self.traces):
            sides = {name: self._side(name).get(trace["trace_id"], {}) for name in (BEFORE, AFTER)}
            row = {name: trace[name] for name in ("set", "label", "trace_id", "id", "sample", "group")}
            row["cluster"] = self.clusters[trace["group"]]
            row |= {f"outcome_{name}": side.get("outcome") for name, side in sides.items()}
            row |= {f"harm_{name}": side.get("harm") for name, side in sides.items()}
            row["cliff_before"] = sides[BEFORE].get("cliffs", {}).get("all")
            row["cliff_after_old_probe"] = float(old[index]) if np.isfinite(old[index]) else None
            row["cliff_after_own_probe"] = sides[AFTER].get("cliffs", {}).get("all")
            rows.append(row)
        return rows

    def outcomes(self) -> dict[str, Any]:
        """Rates and thinking of each set, and rates of the pools; sets that no model writes are left out."""
        given = {prompt_set.name for prompt_set in self.study.prompts if prompt_set.existing}
        names = [p.name for p in self.study.prompts if any(trace["set"] == p.name for trace in self.traces)]
        sets = [name for name in names if name not in given]
        pools = {}
        for pool, members in self.study.repair.evaluate.pools.items():
            if mine := [name for name in members if name in sets]:
                pools[pool] = {"sets": mine, **self._rates(mine), **self._fresh(mine)}
        return {
            "sets": {name: {**self._rates([name]), **self._fresh([name])} for name in sets},
            "left_out": {name: _GIVEN for name in names if name in given},
            "pools": pools,
            "thinking_tokens": {name: self._thinking(name) for name in sets},
        }

    def perplexity(self) -> dict[str, Any]:
        """Benign perplexity, or why there is none."""
        if reason := no_texts(self.context, self.model):
            return {"reason": reason, **{name: dict(NOTHING) for name in (BEFORE, AFTER, "ratio")}, "tokens": 0}
        sides = {side: [row for row in self.read[TEXTS] if row["side"] == side] for side in (BEFORE, AFTER)}
        nll = {side: np.asarray([row["nll"] for row in rows]) for side, rows in sides.items()}
        tokens = np.asarray([row["tokens"] for row in sides[BEFORE]], dtype=np.float64)
        bootstrap = self._bootstrap([self.clusters[row["group"]] for row in sides[BEFORE]])
        return {"reason": "", **perplexity_change(nll[BEFORE], nll[AFTER], tokens, bootstrap)}

    def choices(self) -> dict[str, Any]:
        """Accuracy on each multiple-choice set; what either model could not read is left out and counted."""
        found = {}
        for name, given in choice_sets(self.context).items():
            rows = [row for row in self.read[CHOICES] if row["set"] == name]
            sides = {side: {row["row"]: row for row in rows if row["side"] == side} for side in (BEFORE, AFTER)}
            usable, rejected = [], Counter(given.broken)
            for number, row in sides[BEFORE].items():
                other = sides[AFTER][number]
                if reason := row["rejected"] or other["rejected"]:
                    rejected[reason] += 1
                else:
                    usable.append({**row, BEFORE: row["log_probabilities"], AFTER: other["log_probabilities"]})
            bootstrap = self._bootstrap([" ".join(row["question"].casefold().split()) for row in usable])
            found[name] = {**accuracies(usable, bootstrap), "rejected": dict(sorted(rejected.items()))}
        return found

    def _side(self, name: str) -> dict[str, dict[str, Any]]:
        return (self.before if name == BEFORE else self.after).traces

    def _bootstrap(self, clusters: Sequence[str]) -> GroupBootstrap:
        return GroupBootstrap(clusters, self.study.cliff.bootstrap, self.study.seed)

    def _fresh(self, sets: Sequence[str]) -> dict[str, Any]:
        """The same rates over prompts whose base request no training example shares, where some prompts' is shared."""
        mine = {trace["group"] for trace in self.traces if trace["set"] in sets}
        shared = {group for group in mine if self.clusters[group] in self.trained}
        if not shared:
            return {"shared_prompts": 0, "fresh": None}
        prompts = {(t["set"], t["id"]) for t in self.traces if t["set"] in sets and t["group"] in shared}
        return {"shared_prompts": len(prompts), "fresh": self._rates(sets, shared) if mine - shared else None}

    def _rates(self, sets: Sequence[str], without: Collection[str] = ()) -> dict[str, Any]:
        mine = [trace for trace in self.traces if trace["set"] in sets and trace["group"] not in without]
        nothing: dict[str, Any] = {"outcome": None, "harm": None}
        found = {side: [self._side(side).get(t["trace_id"], nothing) for t in mine] for side in (BEFORE, AFTER)}
        judged = {side: [(trace["outcome"], trace["harm"]) for trace in traces] for side, traces in found.items()}
        labels = {trace["label"] for trace in mine}
        return {
            "label": labels.pop() if len(labels) == 1 else "mixed",
            "prompts": len({(trace["set"], trace["id"]) for trace in mine}),
            **outcome_rates(
                judged[BEFORE],
                judged[AFTER],
                np.asarray([trace["label"] == "harmful" for trace in mine]),
                self._bootstrap([self.clusters[trace["group"]] for trace in mine]),
                guarded=self.study.judge.guard is not None,
            ),
        }

    def _thinking(self, name: str) -> dict[str, Any]:
        """Thinking tokens of a set's traces, of unclosed ones as many as were written."""
        mine = [trace for trace in self.traces if trace["set"] == name]
        before, after = (
            np.asarray([self._side(side).get(trace["trace_id"], {}).get("thinking", np.nan) for trace in mine])
            for side in (BEFORE, AFTER)
        )
        return paired_means(before, after, self._bootstrap([self.clusters[trace["group"]] for trace in mine]))
