"""The cliff re-measured on a tuned model: by the probe of the model before, and by its own (SPEC sections 3 and 6).

Shape suffixes: N traces, P kinds of probes, M measures of the cliff, R refits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clifflab.science.cliff import MEASURES, excess_cliff, summarise
from clifflab.science.probe import TRAIN_POSITIONS
from clifflab.science.repair import paired_means
from clifflab.science.stats import DIFFERENCE, Floats, GroupBootstrap
from clifflab.stages.base import Context
from clifflab.stages.duplicates import group_clusters, group_splits
from clifflab.stages.evaluation_plan import BEFORE

SHOWN = ("plateau", "final", "cliff")
NOTHING = {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
Traces = Mapping[str, Mapping[str, Any]]


class Cliffs:
    """Cliffs of both models.

    Args:
        context: The study and its files.
        order: All traces of both models, with ``trace_id``, ``set``, ``label`` and ``group``.
        before: Traces of the model before by ``trace_id``, with ``cliffs`` by its own probes.
        after: The tuned model's, with ``outcome`` and ``thinking``.
        summaries: Content of ``summary.json`` of the model before and of the tuned one.
        read: Of each closed trace of the tuned model its ``values`` under the old probes, ``[P, M, 1 + R]`` flattened.
        no_old: Why there are none; empty where there are.
    """

    def __init__(
        self,
        context: Context,
        order: Sequence[Mapping[str, Any]],
        before: Traces,
        after: Traces,
        summaries: tuple[Mapping[str, Any], Mapping[str, Any]],
        read: Sequence[Mapping[str, Any]],
        no_old: str,
    ) -> None:
        self.study, self.order, self.summaries, self.no_old = context.study, order, summaries, no_old
        self.before, self.after = ([side.get(trace["trace_id"], {}) for trace in order] for side in (before, after))
        values = {row["trace_id"]: row["values"] for row in read}
        size = len(next(iter(values.values()), ()))
        flat = [values.get(trace["trace_id"], np.full(size, np.nan)) for trace in order]
        shape = (len(order), len(TRAIN_POSITIONS), len(MEASURES), -1 if size else 0)
        self.old: Floats = np.asarray(flat, dtype=np.float64).reshape(shape)
        splits, clusters = group_splits(context), group_clusters(context)
        self.splits = np.asarray([splits[trace["group"]] for trace in order], dtype=object)
        groups = [clusters[trace["group"]] for trace in order]
        self.bootstrap = GroupBootstrap(groups, self.study.cliff.bootstrap, self.study.seed)

    def by_old_probe(self, positions: str, name: str) -> Floats:
        """A measure of the tuned model by the old probe of this kind, ``[N]``; NaN where it was not read."""
        values = self._old(positions, name)
        return values[:, 0] if values.shape[1] else np.full(len(values), np.nan)

    def figures(self) -> dict[str, Any]:
        """The parts of ``evaluation.json`` that speak of cliffs."""
        names = [prompt_set.name for prompt_set in self.study.prompts]
        cliffs = {p: {name: self._set(name, p) for name in names} for p in TRAIN_POSITIONS}
        before, after = self.summaries
        return {
            "cliff": cliffs["all"],
            "cliff_final_probe": cliffs["final"],
            "probes": {"old": self.no_old, "own": after["probe"].get("reason", "")},
            "excess_cliff": {
                BEFORE: before["excess_cliff"]["all"],
                "after_old_probe": self._excess(),
                "after_own_probe": after["excess_cliff"]["all"],
            },
        }

    def _old(self, positions: str, name: str) -> Floats:
        return self.old[:, TRAIN_POSITIONS.index(positions), MEASURES.index(name)]

    def _mask(self, **wanted: str) -> npt.NDArray[np.bool_]:
        return np.asarray([all(trace[k] == v for k, v in wanted.items()) for trace in self.order], dtype=bool)

    def _set(self, name: str, positions: str) -> dict[str, Any]:
        """One set's plateau, final score and cliff: before, after by the old probe, after by its own.

        All are over groups that no probe was trained or chosen on. The change is that of the cliff within traces, by
        the old probe on both sides; its interval is over prompts alone.
        """
        own = [
            {m: summary["sets"][name]["probes"][positions][m] for m in SHOWN} if summary["probe"]["trained"] else None
            for summary in self.summaries
        ]
        old, change = None, dict(NOTHING)
        if not self.no_old:
            mask = np.isin(self.splits, ("test", "ood")) & self._mask(set=name)
            values = {m: self.by_old_probe(positions, m) for m in MEASURES}
            refits = {m: self._old(positions, m)[:, 1:] for m in MEASURES}
            found = summarise(values, mask, self.bootstrap, refits)
            old = {m: found[m] for m in SHOWN}
            cliffs = [trace.get("cliffs", {}).get(positions) for trace in self.before]
            first = np.asarray(cliffs, dtype=np.float64)
            change = paired_means(first, values["cliff"], self.bootstrap, DIFFERENCE, mask)["change"]
        return {BEFORE: own[0], "after_old_probe": old, "after_own_probe": own[1], "change": change}

    def _excess(self) -> dict[str, Any]:
        """Excess cliff of the tuned model by the old probe, over test groups; undefined where it complies no more."""
        if self.no_old:
            return {**NOTHING, "reason": self.no_old}
        harmful = self._mask(label="harmful") & (self.splits == "test")
        outcomes = np.asarray([trace.get("outcome") for trace in self.after], dtype=object)
        return excess_cliff(
            self.by_old_probe("all", "cliff"),
            harmful & (outcomes == "complied"),
            harmful & (outcomes == "refused"),
            np.asarray([trace.get("thinking", 0) for trace in self.after]),
            self.bootstrap,
            self.study.cliff.length_strata,
            self._old("all", "cliff")[:, 1:],
        )
