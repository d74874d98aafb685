"""Files of the steps on heads with made-up numbers, for the report alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clifflab import tables
from clifflab.artifacts import write_json, write_parquet

Head = tuple[int, int]


def entry(
    mean: float | None, reach: float = 0.1, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    ends = {"low": None, "high": None} if mean is None else {"low": mean - reach, "high": mean + reach}
    return {"mean": mean, **ends, "n": 32, "groups": 20}


def rate(mean: float | None) -> dict[str, Any]:
    found = entry(mean)
    if mean is not None:
        found |= {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}
    return found


def band(mean: float | None) -> dict[str, Any]:
    if mean is None:
        return {**dict.fromkeys(("mean", "min", "max", "low", "high")), "n": 0}
    return {"mean": mean, "min": mean - 0.1, "max": mean + 0.1, "low": mean - 0.05, "high": mean + 0.05, "n": 20}


def head_rows(
    layers: int, heads: int, strong: Sequence[Head], *, probe_layer: int | None = None, effects: bool = True
) -> list[dict[str, Any]]:
    """``heads.parquet``: strong heads first, noise behind; effects that are all missing where asked."""
    rng = random.Random(0)
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    probe_layer = layers - 2 if probe_layer is None else probe_layer
    rows = []
    for method, places in (("direct", ("final",)), ("attribution", ("closing", "all")), ("exact", ("closing", "all"))):
        for positions in places:
            size = {h: 4.0 - strong.index(h) if h in strong else rng.gauss(0, 0.1) for h in every}
            order = sorted(every, key=lambda h: -size[h])
            for layer, head in every:
                value = size[layer, head] if effects else None
                logit = value if layer <= probe_layer else None
                odds = None if method == "direct" else value
                main = logit if method == "direct" else odds
                logit = -logit if method == "direct" and logit is not None else logit
                rows.append(
                    {
                        "model": "planted", "layer": layer, "head": head, "method": method, "positions": positions,
                        "effect_logit": logit, "effect_log_odds": odds,
                        "low": None if main is None else main - 0.2, "high": None if main is None else main + 0.2,
                        "q": None if main is None else (1e-9 if (layer, head) in strong else 0.8),
                        "rank": 1 + order.index((layer, head)), "ranking_logit": logit, "ranking_log_odds": odds,
                        "plain_log_odds": None if odds is None else odds / 10,
                        "benign_log_odds": None if odds is None else odds / 8,
                        "share_of_gap": None if odds is None else odds / 8,
                        "suppression": (layer, head) in strong and effects if method == "exact" else None,
                    }
                )  # fmt: skip
    return rows


def heads_about(rows: list[dict[str, Any]], layers: int, heads: int, **changes: Any) -> dict[str, Any]:
    """``heads.json`` for such rows."""
    openings = {"refusal": ["sorry", "i"], "compliance": ["sure", "<script>alert(1)</script>"]}
    found = {}
    for positions in ("closing", "all"):
        mine = [r for r in rows if (r["method"], r["positions"]) == ("exact", positions)]
        mine.sort(key=lambda r: r["rank"])
        top = [
            {
                "head": f"{r['layer']}.{r['head']}", "rank": r["rank"], "effect": r["effect_log_odds"],
                "low": r["low"], "high": r["high"], "q": r["q"], "suppression": bool(r["suppression"]),
                "share_of_gap": r["share_of_gap"], "benign": r["benign_log_odds"],
                "benign_low": None if r["benign_log_odds"] is None else r["benign_log_odds"] - 0.1,
                "benign_high": None if r["benign_log_odds"] is None else r["benign_log_odds"] + 0.1,
                "random_directions": None if r["effect_logit"] is None else 0.95,
            }
            for r in mine[:20]
        ]  # fmt: skip
        passed = [entry["head"] for entry in top if entry["suppression"]]
        found[positions] = {"reason": "", "suppression": passed, "promoting": [], "top": top}
    sides = ("attacked_ranking", "attacked_reporting", "plain_reporting", "benign_reporting")
    rho = {"rho": 0.61, "n": layers * heads}
    entries = {f"{m}_{r}": dict(rho) for m in ("direct", "attribution") for r in ("logit", "log_odds")}
    return {
        "reason": "",
        "method": "exact",
        "positions": ["closing", "all"],
        "gamma": 0.0,
        "replace": "scale",
        "renormalise": False,
        "total": layers * heads,
        "heads_per_layer": [heads] * layers,
        "looked_at": layers * heads,
        "swept": layers * heads,
        "probe": {"positions": "all", "layer": max(0, layers - 2)},
        "no_direct": "",
        "traces": {
            "attacked_are": "complied",
            **{side: {"traces": 32, "clusters": 20} for side in sides},
            "complied": {"ranking": 32, "reporting": 32},
        },
        "openings": {kind: [{"id": i, "text": t} for i, t in enumerate(texts)] for kind, texts in openings.items()},
        "log_odds": {side: entry(-4.0 if "attacked" in side else 4.0) for side in sides},
        "gap": entry(8.0, 0.5),
        "threshold": {"share": 0.05, "effect": 0.4, "q": 0.05},
        "found": found,
        "correlations": {"closing": entries, "all": entries},
        **changes,
    }


def sets_about(strong: Sequence[Head], effect: float | None = 3.0) -> dict[str, Any]:
    """``head_sets.json``: doses, pairs and a greedy path."""
    names = [f"{layer}.{head}" for layer, head in strong]
    doses = []
    for kind in ("suppression", "promoting"):
        for fraction in (0.01, 0.03, 0.1):
            figures: dict[str, Any] = {"share_of_gap": None if effect is None else effect / 8}
            figures |= {name: entry(effect) for name in ("log_odds", "logit", "ranking", "benign")}
            if kind == "suppression":
                ends = {"low": -0.1, "high": 0.1, "min": -0.2, "max": 0.2}
                figures["random"] = {"mean": None if effect is None else 0.0, **ends, "n": 20}
                figures["above_random"] = 1.0
            dose = {"kind": kind, "fraction": fraction, "count": len(names), "heads": names, "random_smaller": False}
            doses.append({**dose, "effects": {"closing": figures, "all": figures}})
    pair = {
        "heads": names[:2],
        **{name: entry(effect) for name in ("ranking", "log_odds", "beyond_sum")},
        "share_of_gap": 0.4,
        "alone": [entry(effect), entry(effect)],
        "counts": True,
        "redundant": True,
        "hidden": True,
    }
    steps = [
        {"added": n, "heads": names[: i + 1], "ranking": entry(effect), "log_odds": entry(effect), "share_of_gap": None}
        for i, n in enumerate(names)
    ]
    pairs = {"tested": 28, "top": [pair] if len(names) > 1 else []}
    return {
        "reason": "",
        "candidates": names,
        "doses": doses,
        "pairs": {"closing": pairs, "all": pairs},
        "greedy": {"positions": "closing", "steps": steps},
    }


def write_heads(
    folder: Path, rows: list[dict[str, Any]], about: dict[str, Any], sets: dict[str, Any] | None = None
) -> None:
    """The files of the search, in a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if sets:
        write_json(folder / "head_sets.json", sets)
    write_parquet(folder / "heads.parquet", pa.Table.from_pylist(rows, schema=tables.HEADS))
    write_json(folder / "heads.json", about)


def ablation_about(
    sets: dict[str, str], asr: float | None = 0.9, fractions: Sequence[float] = (0.01, 0.03, 0.1), total: int = 64
) -> dict[str, Any]:
    """``ablation.json`` of a model that refuses without its suppression heads."""
    counts = {f: -(-int(f * total * 1000) // 1000) for f in fractions}
    conditions = [{"fraction": 0.0, "kind": "none", "draw": None, "heads": []}]
    conditions += [
        {"fraction": f, "kind": kind, "draw": None, "heads": [f"{i}.{i}" for i in range(counts[f])]}
        for f in fractions
        for kind in ("suppression", "promoting")
    ]
    found: dict[str, Any] = {}
    for name, label in sets.items():
        results = []
        for thinking in ("regenerated", "fixed"):
            for fraction, kind in [
                (0.0, "none"),
                *((f, k) for f in fractions for k in ("suppression", "promoting", "random")),
            ]:
                attacked = asr if label != "benign" else None
                if attacked is not None and kind == "suppression":
                    attacked = max(0.02, attacked - 20 * fraction)
                rates = {
                    "asr": rate(attacked),
                    "over_refusal": rate(0.02 + fraction if label != "harmful" else None),
                    "unclosed": rate(0.0),
                    "degenerate": rate(fraction / 2),
                }
                result: dict[str, Any] = {
                    "thinking": thinking,
                    "fraction": fraction,
                    "kind": kind,
                    "traces": 32,
                    **rates,
                }
                if kind != "none":
                    base = asr if label != "benign" else None
                    change = None if attacked is None or base is None else attacked - base
                    result["change"] = {**{m: entry(0.01) for m in rates}, "asr": entry(change)}
                if kind == "random":
                    result |= {"draws": 20, "traces_per_draw": 8}
                    result["band"] = {m: band(rates[m]["mean"]) for m in rates}
                    result["change_band"] = {m: band(0.0 if rates[m]["mean"] is not None else None) for m in rates}
                results.append(result)
        found[name] = {"label": label, "traces": 32, "half": "reporting", "results": results}
    perplexity = [
        {"fraction": 0.0, "kind": "none", "perplexity": entry(2.1), "ratio": entry(1.0, 0.0)},
        *(
            {
                "fraction": f,
                "kind": k,
                **{w: (band if k == "random" else entry)(1 + f) for w in ("perplexity", "ratio")},
            }
            for f in fractions
            for k in ("suppression", "promoting", "random")
        ),
    ]
    return {
        "reason": "",
        "judged_by": "rules",
        "gamma": 0.0,
        "renormalise": False,
        "removal": "all positions",
        "conditions": conditions,
        "random_draws": 20,
        "without_random": [],
        "unchanged_as_before": {"traces": 64, "same": 64},
        "perplexity": {"reason": "", "traces": 32, "tokens": 2100, "results": perplexity},
        "sets": found,
    }
