"""The figures of an ablation: rates with intervals, paired changes, and the band over draws of random heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clifflab.config import Study
from clifflab.science.effects import band
from clifflab.science.paired import MEASURES, Cell, Outcomes, perplexities
from clifflab.science.stats import GroupBootstrap

Rows = Sequence[Mapping[str, Any]]
Key = tuple[float, str, int | None]


def ablation_figures(
    study: Study,
    model: str,
    plan: Mapping[str, Any],
    written: Rows,
    read: Rows,
    clusters: Mapping[str, str],
    verdicts: Mapping[int, str] | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ``ablation.parquet`` and the content of ``ablation.json``.

    Args:
        study: The study.
        model: Name of the model.
        plan: Content of ``ablation_conditions.json``.
        written: Rows of ``ablation_traces.parquet``.
        read: Rows of ``ablation_perplexity.parquet``.
        clusters: Cluster of every group.
        verdicts: The guard's verdict by row of ``written``; ``None`` without a guard.
    """
    if plan["reason"]:
        return [], {"reason": plan["reason"]}
    conditions: dict[Key, list[str]] = {(c["fraction"], c["kind"], c["draw"]): c["heads"] for c in plan["conditions"]}
    read_figures, perplexity = _perplexity(study, conditions, read, clusters)
    rows, sets = [], {}
    for prompt_set in study.prompts:
        own = [row for row in written if row["set"] == prompt_set.name]
        if not own:
            continue
        table = _SetTable(study, conditions, own, clusters, verdicts)
        rows += table.rows(model, prompt_set.name, perplexity)
        sets[prompt_set.name] = {**table.about(), "half": plan["halves"][prompt_set.name], "results": table.results()}
    before = [row for row in written if row["kind"] == "none"]
    settings = study.ablation
    return rows, {
        "reason": "",
        "judged_by": "rules" if verdicts is None else "guard",
        "gamma": settings.gamma,
        "renormalise": settings.renormalise,
        "ranking": {"method": study.heads.method, "positions": study.heads.positions[0]},
        "removal": {"positions": "all"},
        "conditions": [c for c in plan["conditions"] if c["kind"] != "random"],
        "random_draws": settings.random_draws,
        "without_random": [f for f in settings.fractions if f > 0 and (f, "random", 0) not in conditions]
        if "random" in settings.kinds
        else [],
        "unchanged_as_before": {"traces": len(before), "same": sum(row["as_before"] for row in before)},
        "perplexity": read_figures,
        "sets": sets,
    }


class _SetTable:
    """Outcomes of one set's traces under every condition and treatment of the thinking.

    Args:
        study: The study.
        conditions: Heads of every condition.
        written: The set's rows.
        clusters: Cluster of every group.
        verdicts: The guard's verdict by row; ``None`` without a guard.
    """

    def __init__(
        self,
        study: Study,
        conditions: Mapping[Key, list[str]],
        written: Rows,
        clusters: Mapping[str, str],
        verdicts: Mapping[int, str] | None,
    ) -> None:
        self.conditions = conditions
        traces: dict[str, Mapping[str, Any]] = {row["trace_id"]: row for row in written}
        self.traces = list(traces.values())
        places = {trace_id: n for n, trace_id in enumerate(traces)}
        self.columns: list[tuple[str, Key]] = [
            (thinking, key) for thinking in study.ablation.thinking for key in conditions
        ]
        at = {column: k for k, column in enumerate(self.columns)}
        cells = [
            Cell(
                places[row["trace_id"]],
                at[row["thinking"], (row["fraction"], row["kind"], row["draw"])],
                row["outcome"],
                None if verdicts is None else verdicts.get(row["row"]),
            )
            for row in written
        ]
        harmful_N = np.asarray([trace["label"] == "harmful" for trace in self.traces])
        unchanged = np.asarray([at[thinking, (0.0, "none", None)] for thinking, _ in self.columns])
        groups = [clusters[trace["group"]] for trace in self.traces]
        bootstrap = GroupBootstrap(groups, study.cliff.bootstrap, study.seed)
        self.outcomes = Outcomes.of(cells, harmful_N, unchanged, bootstrap, guarded=verdicts is not None)
        self.present, self.unreadable = self.outcomes.present, self.outcomes.hits["unreadable"]

    @property
    def label(self) -> str:
        """``harmful``, ``benign``, or ``mixed`` where rows have labels of their own."""
        labels = {trace["label"] for trace in self.traces}
        return labels.pop() if len(labels) == 1 else "mixed"

    def about(self) -> dict[str, Any]:
        """Label, number of traces, and how many of them have a thinking that could be held fixed."""
        fixed = [k for k, (thinking, _) in enumerate(self.columns) if thinking == "fixed"]
        held = int(self.present[:, fixed].any(1).sum()) if fixed else None
        return {"label": self.label, "traces": len(self.traces), "fixed_traces": held}

    def rows(self, model: str, name: str, perplexity: Mapping[Key, float | None]) -> list[dict[str, Any]]:
        """One row for every condition, draws apart, and treatment of the thinking."""
        used = [k for k in range(len(self.columns)) if self.present[:, k].any()]
        figures = {measure: self.outcomes.each(measure, used) for measure in MEASURES}
        found = []
        for place, k in enumerate(used):
            thinking, key = self.columns[k]
            values = {measure: _number(figures[measure]["mean"][place]) for measure in MEASURES}
            ends = {f"asr_{end}": _number(figures["asr"][end][place]) for end in ("low", "high")}
            found.append(
                {
                    "model": model,
                    "set": name,
                    "label": self.label,
                    "thinking": thinking,
                    **dict(zip(("fraction", "kind", "draw"), key, strict=True)),
                    "heads": self.conditions[key],
                    "traces": int(self.present[:, k].sum()),
                    **values,
                    **ends,
                    "perplexity": perplexity.get(key),
                }
            )
        return found

    def results(self) -> list[dict[str, Any]]:
        """One entry for every fraction, kind and treatment of the thinking; draws of random heads together."""
        together: dict[tuple[str, float, str], list[int]] = {}
        for k, (thinking, (fraction, kind, _)) in enumerate(self.columns):
            if self.present[:, k].any():
                together.setdefault((thinking, fraction, kind), []).append(k)
        found = []
        for (thinking, fraction, kind), columns in together.items():
            entry: dict[str, Any] = {"thinking": thinking, "fraction": fraction, "kind": kind}
            entry["traces"] = int(self.present[:, columns].any(1).sum())
            entry["unreadable"] = int(
                self.unreadable[:, columns].sum()
            )  # guard answers, left out of the attack success
            changes = {}
            for measure in MEASURES:
                entry[measure], changes[measure] = self.outcomes.rates(measure, columns)
            if kind != "none":
                entry["change"] = changes
            if kind == "random":
                counts = self.present[:, columns].sum(0)
                entry["draws"], entry["traces_per_draw"] = len(columns), int(counts.max())
                entry["band"] = {m: band(self.outcomes.each(m, columns)["mean"]) for m in MEASURES}
                entry["change_band"] = {m: band(self.outcomes.each_change(m, columns)) for m in MEASURES}
            found.append(entry)
        return found


def _perplexity(
    study: Study, conditions: Mapping[Key, list[str]], read: Rows, clusters: Mapping[str, str]
) -> tuple[dict[str, Any], dict[Key, float | None]]:
    """Benign perplexity: its part of ``ablation.json``, and the figure of each condition."""
    if not read:
        return {"reason": "no benign prompt of this study was answered", "results": []}, {}
    traces = {row["trace_id"]: row for row in read}
    places = {trace_id: n for n, trace_id in enumerate(traces)}
    at = {key: k for k, key in enumerate(conditions)}
    nll = np.zeros((len(traces), len(conditions)))
    present = np.zeros_like(nll, dtype=bool)
    for row in read:
        cell = places[row["trace_id"]], at[row["fraction"], row["kind"], row["draw"]]
        nll[cell], present[cell] = row["nll"], True
    tokens = np.asarray([row["tokens"] for row in traces.values()], dtype=np.float64)
    groups = [clusters[row["group"]] for row in traces.values()]
    bootstrap = GroupBootstrap(groups, study.cliff.bootstrap, study.seed)
    each = {
        key: perplexities(nll[:, k], nll[:, 0], tokens, present[:, k], bootstrap)
        for k, key in enumerate(conditions)
        if present[:, k].any()
    }
    results = []
    for fraction, kind in dict.fromkeys((fraction, kind) for fraction, kind, _ in each):
        mine = [found for (f, k, _), found in each.items() if (f, k) == (fraction, kind)]
        entry: dict[str, Any] = {"fraction": fraction, "kind": kind}
        if kind == "random":
            ratios = [ratio["mean"] for _, ratio in mine if ratio["mean"] is not None]
            entry |= {"perplexity": band([p["mean"] for p, _ in mine if p["mean"] is not None]), "ratio": band(ratios)}
        else:
            entry |= dict(zip(("perplexity", "ratio"), mine[0], strict=True))
        results.append(entry)
    about = {"traces": len(traces), "tokens": int(tokens.sum())}
    return {"reason": "", **about, "results": results}, {key: found[0]["mean"] for key, found in each.items()}


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
