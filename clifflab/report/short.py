"""The study in short, in plain words: what was asked, what was found, what was not checked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from clifflab.report.heads_short import heads_sentences
from clifflab.report.numbers import interval
from clifflab.report.sections import UNCHECKED

_ALWAYS = (
    "other causes: where heads are removed, it is one by one and in the sets that are listed; MLPs never are",
    "harm: complied means that the judge saw no refusal, not that the answer would help anyone do harm",
)

_REPAIRED = (
    "the repair: one training with one seed, judged on the sets that are named; attacks of other kinds, and attacks "
    "by someone who knows how the model was repaired, may work as before or better"
)


def finding(name: str, summary: dict[str, Any], labels: dict[str, str], fraction: float = 0.03) -> dict[str, str]:
    """What was found on one model: a verdict of a few words, the sentences behind it, and those on heads.

    Args:
        name: The model's name.
        summary: Its part of ``metrics.json``.
        labels: Label of each set.
        fraction: Share of heads that counts as the top.
    """
    excess, heads = summary["excess_cliff"]["all"], heads_sentences(summary, fraction)
    if not summary["probe"]["trained"]:
        verdict = f"No probe could be trained: {summary['probe']['reason']}."
        return {
            "name": name,
            "verdict": verdict,
            "text": "Outcomes are below; no score, plateau or cliff is reported, and none is guessed.",
            "heads": heads,
        }
    if excess["mean"] is None:
        verdict = f"Not defined here: {excess.get('reason', 'too few traces')}."
        return {"name": name, "verdict": verdict, "text": _largest(summary, labels), "heads": heads}
    sides = f"{excess['n_complied']:,} traces against {excess['n_refused']:,}"
    text = (
        f"Harmful requests that it complied with lost {interval(excess)} more refusal score at the end of the thinking "
        f"than those that it refused (on a scale from 0 to 1; {sides}, of which "
        f"{excess['matched']:.0%} of the former found others of their thinking length). "
        f"{_verdict(excess)[1]} {_largest(summary, labels)} {_harm_or_refusal(summary)} With a probe "
        f"trained at the final position only, as in the paper, the same difference reads "
        f"{interval(summary['excess_cliff']['final'])}."
    )
    return {"name": name, "verdict": _verdict(excess)[0], "text": text, "heads": heads}


def _harm_or_refusal(summary: dict[str, Any]) -> str:
    """What the plateau is: an intention to refuse, or the recognition of harm."""
    cells = summary["cells"]
    harm, refusal = (cells[c]["all.thinking"] for c in ("harm_without_refusal", "refusal_given_harm"))
    if harm["mean"] is None or refusal["mean"] is None:
        return ""
    told = (
        f"On the thinking the probe tells answered harmful from answered benign requests with an AUROC of "
        f"{interval(harm)}, and refused from answered harmful ones with {interval(refusal)} (0.5 is chance)"
    )
    if harm["mean"] > refusal["mean"]:
        return f"{told}: the plateau says more about harm that was recognised than about a refusal that was decided."
    return f"{told}: the plateau says more about refusal than about harm."


def unchecked(keys: Collection[str]) -> list[str]:
    """What this page leaves open.

    Args:
        keys: Keys of the sections that it has.
    """
    limits = (_REPAIRED,) if "before-after" in keys else ()
    return [*_ALWAYS, *limits, *(text for key, text in UNCHECKED.items() if key not in keys)]


def _verdict(excess: dict[str, Any]) -> tuple[str, str]:
    if excess["low"] is None:
        return "Not decided: too few groups for an interval.", ""
    if excess["low"] > 0:
        return "A refusal cliff, by this measure.", "The interval excludes 0."
    if excess["high"] < 0:
        return "No refusal cliff: the opposite.", "The interval lies below 0."
    return "No refusal cliff shown.", "The interval includes 0."


def _largest(summary: dict[str, Any], labels: dict[str, str]) -> str:
    """The set of either label whose traces lose most."""
    said = []
    for label in ("harmful", "benign"):
        cliffs = {name: entry["probes"]["all"]["cliff"] for name, entry in summary["sets"].items()}
        own = {name: c for name, c in cliffs.items() if labels[name] == label and c["mean"] is not None}
        if own:
            name = max(own, key=lambda n: own[n]["mean"])
            said.append(f"{interval(own[name])} in a {label} set ({name})")
    return f"The largest mean cliff is {' and '.join(said)}." if said else ""
