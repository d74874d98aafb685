"""Files of a repair with made-up traces, for the report alone: figures and intervals are computed from the traces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import write_json, write_parquet
from clifflab.science.repair import outcome_rates, paired_means, perplexity_change
from clifflab.science.stats import DIFFERENCE, GroupBootstrap

CORPUS = {"harmful": 320, "wrapped": 40, "benign": 240}
SELECTORS = ("misalignment", "final", "plateau", "random", "rules")
# Of each set its label, and the shares that complied before and after (of benign sets: that were refused).
SETS = {
    "harmful": ("harmful", 0.03, 0.0),
    "wrapped_strong": ("harmful", 0.97, 0.02),
    "heldout_wrappers": ("harmful", 0.95, 0.04),
    "benign": ("benign", 0.0, 0.0),
    "benign_lookalike": ("benign", 0.01, 0.04),
}
Rows = list[dict[str, Any]]


def corpus_rows(seed: int = 0) -> Rows:
    """``corpus/cliffs.parquet``: most harmful requests refused, wrapped ones lost at the end, benign ones answered."""
    rng = random.Random(seed)
    rows: Rows = []
    for name, count in CORPUS.items():
        for number in range(count):
            label = "benign" if name == "benign" else "harmful"
            high = 0.03 if label == "benign" else 0.97
            complied = label == "benign" or rng.random() < (0.03 if name == "harmful" else 0.9)
            final = rng.betavariate(1, 20) if complied else rng.betavariate(20, 1)
            plateau = min(1.0, max(0.0, rng.gauss(high, 0.02)))
            most = min(1.0, plateau + 0.02)
            trace = f"{name}/{number}#0"
            rows.append(
                {
                    "row": len(rows), "model": "m", "trace_id": trace, "id": str(number), "sample": 0, "set": name,
                    "label": label, "group": trace, "cluster": trace, "split": "corpus",
                    "outcome": "complied" if complied else "refused", "train_positions": "all",
                    "estimator": "logistic", "layer": 6, "reported": True, "thinking_tokens": 30,
                    "closing_tokens": 2, "plateau": plateau, "plateau_max": most, "final": final,
                    "cliff": plateau - final, "misalignment": most - final, "misalignment_logit": 9 * (most - final),
                }
            )  # fmt: skip
    return rows


def chosen_rows(corpus: Rows, harmful: int = 30, benign: int = 8) -> Rows:
    """``selection.parquet``: what each selector takes."""
    rng = random.Random(1)
    keys = {
        "misalignment": lambda r: -r["misalignment"],
        "final": lambda r: r["final"],
        "plateau": lambda r: -r["plateau"],
        "random": lambda r: rng.random(),
        "rules": lambda r: r["outcome"] != "complied",
    }
    answers = [r for r in corpus if r["label"] == "benign"][:benign]
    rows: Rows = []
    columns = set(tables.SELECTION.names)
    for selector, key in keys.items():
        ranked = sorted((r for r in corpus if r["label"] == "harmful"), key=key)[:harmful]
        for place, row in enumerate([*ranked, *answers]):
            role = "benign" if row["label"] == "benign" else "harmful"
            rank = 1 + (place if role == "harmful" else place - harmful)
            filled = selector == "rules" and role == "harmful" and row["outcome"] != "complied"
            own = {name: value for name, value in row.items() if name in columns}
            rows.append(
                {**own, "selector": selector, "role": role, "rank": rank, "filled": filled, "category": category(row)}
            )
    return rows


def category(row: Mapping[str, Any]) -> str | None:
    """Wrapped requests are of two families, the others of none."""
    return f"wrapper_{int(row['id']) % 2}" if row["set"] == "wrapped" else None


def write_corpus(root: Path, folder: Path, corpus: Rows, near: int = 3) -> None:
    """The corpus itself with what became of it, and the requests that were left out."""
    prompts = [{**{k: row[k] for k in ("row", "id", "set", "label")}, "category": category(row)} for row in corpus]
    rejects = [{"stage": "corpus", "reason": reason} for reason in ["contaminated"] * near + ["empty"]]
    for path, rows, schema in (
        (root / "corpus.parquet", prompts, tables.PROMPTS),
        (root / "corpus_rejects.parquet", rejects, tables.REJECTS),
        (folder / "corpus" / "traces.parquet", corpus, tables.TRACES),
        (folder / "corpus" / "outcomes.parquet", corpus, tables.OUTCOMES),
    ):
        write_parquet(path, pa.Table.from_pylist([{k: r.get(k) for k in schema.names} for r in rows], schema=schema))


def selection_about(corpus: Rows, rows: Rows, **changes: Any) -> dict[str, Any]:
    """``selection.json`` for such rows."""
    by = {name: [r for r in rows if r["selector"] == name] for name in SELECTORS}
    ids = {name: {r["trace_id"] for r in own if r["role"] == "harmful"} for name, own in by.items()}
    counts = {name: Counter(r["outcome"] for r in corpus if r["set"] == name) for name in CORPUS}
    mine = by["misalignment"]
    harmful = {name: [r for r in own if r["role"] == "harmful"] for name, own in by.items()}
    refused = ("refused", "complied", "unclosed", "degenerate")
    selectors = {
        name: {
            "chosen": len(own),
            "filled": sum(r["filled"] for r in own),
            "benign_share": sum(r["role"] == "benign" for r in own) / len(own),
            "blind_benign_share": None if name in ("random", "rules") else 0.125,
            "outcomes": dict(Counter(r["outcome"] for r in harmful[name])),
            "sets": dict(Counter(r["set"] for r in harmful[name])),
            "groups": len({r["group"] for r in harmful[name]}),
            "cliff_cases": sum(map(_cliff_case, harmful[name])),
            "spearman_with_final": None if name in ("random", "rules") else 0.87,
        }
        for name, own in by.items()
    }
    return {
        "reason": "",
        "model": "m",
        "by": "misalignment",
        "budget": {
            "asked": 0.06, "corpus": len(corpus), "examples": len(mine),
            "harmful": sum(r["role"] == "harmful" for r in mine), "benign": sum(r["role"] == "benign" for r in mine),
        },
        "eligible": sum(r["label"] == "harmful" for r in corpus),
        "labelled": True,
        "labels": {"with": len(corpus), "without": 0},
        "left_out": {"benign": 240, "low_plateau": 7},
        "contaminated": 0,
        "cliff_cases": sum(map(_cliff_case, corpus)),
        "corpus_outcomes": {n: {"n": sum(c.values()), **{o: c[o] for o in refused}} for n, c in counts.items()},
        "selectors": selectors,
        "overlap": {a: {b: len(ids[a] & ids[b]) / len(ids[a] | ids[b]) for b in SELECTORS} for a in SELECTORS},
        "targets": {
            "kind": "keep-thinking", "refusals": "own", "distinct": 21, "rows": 37, "benign": 8,
            "rejected": {"too_long": 1},
        },
        **changes,
    }  # fmt: skip


def _cliff_case(row: Mapping[str, Any]) -> bool:
    return bool(row["label"] == "harmful" and row["outcome"] == "complied" and row["plateau"] >= 0.5)


def tuning_about(recipe: Mapping[str, Any], steps: int = 20, **changes: Any) -> dict[str, Any]:
    """``tuning.json`` of a training that learns, five steps an epoch.

    Args:
        recipe: The settings of the fine-tune.
        steps: Optimizer steps.
    """
    rng = random.Random(2)
    curve = [
        {
            "step": s, "epoch": s / 5, "loss": 0.1 + 2.0 * 0.8**s + rng.uniform(-0.05, 0.05), "tokens": 300 * s,
            "learning_rate": 1e-3 * (1 - s / steps), "grad_norm": 1.0,
        }
        for s in range(1, steps + 1)
    ]  # fmt: skip
    held = [{"step": s, "epoch": s / 5, "loss": 0.15 + 2.0 * 0.8**s} for s in range(5, steps + 1, 5)]
    return {
        "reason": "",
        "method": "lora",
        "recipe": dict(recipe),
        "workers": 1,
        "examples": {"train": 33, "validation": 4, "rejected": {"too_long": 1}, "cut": 0},
        "tokens": {"epoch": 1500, "learnt": 900},
        "steps": steps,
        "stopped_early": False,
        "best": {k: held[-1][k] for k in ("step", "epoch", "loss")},
        "curve": curve,
        "validation": held,
        "parameters": {"trainable": 49_152, "all": 700_000},
        "files": ["adapter_config.json", "adapter_model.safetensors"],
        **changes,
    }


def evaluation_rows(sets: Mapping[str, tuple[str, float, float]] = SETS, prompts: int = 40, probe: bool = True) -> Rows:
    """``evaluation.parquet``: outcomes and cliffs of the same prompts before and after."""
    rng = random.Random(3)
    rows: Rows = []
    for name, (label, before, after) in sets.items():
        hit, miss = ("complied", "refused") if label == "harmful" else ("refused", "complied")
        for number in range(prompts):
            was, now = (hit if rng.random() < share else miss for share in (before, after))
            fell = {"complied": 0.9, "refused": 0.0} if label == "harmful" else {"complied": 0.02, "refused": 0.0}
            noise = [rng.gauss(0, 0.03) for _ in range(3)]
            rows.append(
                {
                    "model": "m-repaired", "before": "m", "set": name, "label": label, "trace_id": f"{name}/{number}#0",
                    "id": str(number), "sample": 0, "group": f"g{number // 2}", "cluster": f"g{number // 2}",
                    "outcome_before": was, "outcome_after": now, "harm_before": None, "harm_after": None,
                    "cliff_before": fell[was] + noise[0], "cliff_after_old_probe": fell[now] + noise[1],
                    "cliff_after_own_probe": fell[now] + noise[2] if probe else None,
                }
            )  # fmt: skip
    return rows


def evaluation_about(rows: Rows, pools: Mapping[str, Sequence[str]] | None = None, **changes: Any) -> dict[str, Any]:
    """``evaluation.json`` for such rows; rates, paired changes and their intervals are computed."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    pools = {"unseen": [n for n in names if n.startswith("heldout")]} if pools is None else pools
    rng = np.random.default_rng(4)
    nll, tokens, texts = (
        rng.normal(40, 5, 24),
        np.full(24, 50.0),
        GroupBootstrap([str(i // 2) for i in range(24)], 200, 0),
    )
    right = (rng.random((2, 60)) < np.array([[0.62], [0.6]])).astype(float)
    asked = GroupBootstrap([str(i) for i in range(60)], 200, 0)
    reads = ("before", "after_old_probe", "after_own_probe")
    return {
        "reason": "",
        "model": "m-repaired",
        "before": "m",
        "judged_by": "rules",
        "samples": 1,
        "sets": {name: compared([row for row in rows if row["set"] == name]) for name in names},
        "pools": {
            pool: {**compared([row for row in rows if row["set"] in own]), "sets": list(own)}
            for pool, own in pools.items()
            if own
        },
        "perplexity": {"reason": "", **perplexity_change(nll, nll + rng.normal(0.1, 0.2, 24), tokens, texts)},
        "choices": {
            "facts": {**paired_means(*right, asked, (0.0, 1.0)), "questions": 60, "rejected": {"too_long": 2}},
        },
        "cliff": {
            name: {
                **{read: _levels([row for row in rows if row["set"] == name], f"cliff_{read}") for read in reads},
                "change": _plain(-0.3, 0.2),
            }
            for name in names
        },
        "probes": {"old": "", "own": ""},
        "excess_cliff": {
            "before": _plain(0.9, 0.1), "after_old_probe": {**_plain(None), "reason": "no complied trace"},
            "after_own_probe": {**_plain(None), "reason": "no complied trace"},
        },
        "left_out": {},
        "thinking_tokens": {n: {"before": _plain(30), "after": _plain(31), "change": _plain(1)} for n in names},
        **changes,
    }  # fmt: skip


def compared(rows: Rows) -> dict[str, Any]:
    """The rates of one set, or of the sets of a pool."""
    labels = {row["label"] for row in rows}
    judged = {when: [(row[f"outcome_{when}"], None) for row in rows] for when in ("before", "after")}
    harmful = np.array([row["label"] == "harmful" for row in rows])
    bootstrap = GroupBootstrap([row["cluster"] for row in rows], 200, 0)
    return {
        "label": labels.pop() if len(labels) == 1 else "mixed",
        "prompts": len({(row["set"], row["id"]) for row in rows}),
        **outcome_rates(judged["before"], judged["after"], harmful, bootstrap, guarded=False),
    }


def _levels(rows: Rows, column: str) -> dict[str, Any] | None:
    """Plateau, final and cliff: the plateau stays where it was, the final score falls by the cliff."""
    if any(row[column] is None for row in rows):
        return None
    cliffs = np.array([row[column] for row in rows])
    bootstrap = GroupBootstrap([row["cluster"] for row in rows], 200, 0)
    level = np.full(len(rows), 0.97 if rows[0]["label"] == "harmful" else 0.03)
    return {
        "plateau": bootstrap.mean(level, bounds=(0.0, 1.0)).as_dict(),
        "final": bootstrap.mean(np.clip(level - cliffs, 0, 1), bounds=(0.0, 1.0)).as_dict(),
        "cliff": bootstrap.mean(cliffs, bounds=DIFFERENCE).as_dict(),
    }


def _plain(mean: float | None, reach: float = 2.0) -> dict[str, Any]:
    ends = {"low": None, "high": None} if mean is None else {"low": mean - reach, "high": mean + reach}
    return {"mean": mean, **ends, "n": 40, "groups": 20}


def write_repair(folder: Path, corpus: Rows, rows: Rows, selection: Any, tuning: Any) -> None:
    """The files of a choice and a tuning, in a model's folder; ``None`` leaves one out."""
    for name, about in (("selection", selection), ("tuning", tuning)):
        if about is not None:
            write_json(folder / "repair" / f"{name}.json", about)
    write_parquet(folder / "repair" / "selection.parquet", pa.Table.from_pylist(rows, schema=tables.SELECTION))
    if corpus:
        write_parquet(folder / "corpus" / "cliffs.parquet", pa.Table.from_pylist(corpus, schema=tables.CLIFFS))


def write_evaluation(folder: Path, rows: Rows, about: Any) -> None:
    """The files of a comparison, in the later model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", about)
    write_parquet(folder / "evaluation.parquet", pa.Table.from_pylist(rows, schema=tables.EVALUATION))
