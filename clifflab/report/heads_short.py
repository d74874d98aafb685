"""The heads in short: sentences for the top of the page, a line for the terminal, rows for the comparison of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clifflab.report.ablation_results import AblationFound, Condition
from clifflab.report.head_words import AT
from clifflab.report.numbers import interval, percent

_NAMED = 6  # heads that a sentence names
_TOP = 0.03


def heads_sentences(summary: Mapping[str, Any], fraction: float = _TOP) -> str:
    """What the search for heads and their removal found, or why it found nothing.

    Args:
        summary: The model's part of ``metrics.json``.
        fraction: Share of heads that counts as the top.
    """
    return " ".join(part for part in (_search(summary), _removal(summary, fraction)) if part)


def heads_line(summary: Mapping[str, Any], fraction: float = _TOP) -> str:
    """The same in one line for the terminal; empty where the study has no such step."""
    about = summary.get("heads")
    if not about:
        return ""
    if about.get("reason"):
        return f"suppression heads: not searched ({about['reason']})"
    positions = about["positions"][0]
    found = about["found"][positions]
    judged = _count(found, about["total"]) if not found["reason"] else f"not judged ({found['reason']})"
    line = f"suppression heads {AT[positions]}: {judged}"
    removal = ablation_of(summary, fraction)
    pair = strongest(removal)
    if removal is None or pair is None:
        return line
    before, after = pair
    over = removal.over_refusal(after.fraction, after.kind, after.thinking)
    cost = [f"over-refusal {percent(over[1])}"] if over else []
    cost += [f"degenerate {percent(after.rates['degenerate'])}"]
    ratio = removal.perplexity_text(after.fraction, after.kind, "ratio")
    return (
        f"{line}; without the top {100 * after.fraction:g}% ASR on {after.name} {percent(before.rates['asr'])} -> "
        f"{percent(after.rates['asr'])}, {', '.join(cost)}{f', benign perplexity x {ratio}' if ratio else ''}"
    )


def ablation_of(summary: Mapping[str, Any], fraction: float) -> AblationFound | None:
    """The removal, where there was one."""
    about = summary.get("ablation")
    return AblationFound(about, fraction) if about and not about.get("reason") else None


def strongest(found: AblationFound | None) -> tuple[Condition, Condition] | None:
    """Before and after the removal of the top heads, on the set that is attacked most successfully to begin with."""
    if found is None or not found.thinking:
        return None
    thinking = found.thinking[0]
    pairs = []
    for name in found.labelled("harmful", "mixed"):
        before, after = found.at(name, 0.0, "none", thinking), found.at(name, found.main, "suppression", thinking)
        if before and after and before.rates["asr"]["mean"] is not None and after.rates["asr"]["mean"] is not None:
            pairs.append((before, after))
    return max(pairs, key=lambda pair: pair[0].rates["asr"]["mean"]) if pairs else None


def comparison_row(summary: Mapping[str, Any], fraction: float) -> list[Any]:
    """Suppression heads, set, attack success and over-refusal before and after, degenerate share, perplexity ratio."""
    about = summary.get("heads") or {"reason": "none"}
    first = None if about.get("reason") else about["found"][about["positions"][0]]
    heads = (_count(first, about["total"]) if not first["reason"] else "not judged") if first else None
    found = ablation_of(summary, fraction)
    pair = strongest(found)
    if found is None or pair is None:
        return [heads, *[None] * 7]
    before, after = pair
    costs = [found.over_refusal(c.fraction, c.kind, c.thinking) for c in pair]
    over = [f"{interval(cost[1])} {cost[0]}" if cost else None for cost in costs]
    broken = [after.rates["degenerate"], found.perplexity_text(after.fraction, after.kind, "ratio")]
    return [heads, after.name, before.rates["asr"], after.rates["asr"], *over, *broken]


def _search(summary: Mapping[str, Any]) -> str:
    about = summary.get("heads")
    if not about:
        return ""
    if about.get("reason"):
        return f"Heads that hold the refusal back were not searched: {about['reason']}."
    positions = about["positions"][0]
    found = about["found"][positions]
    if found["reason"]:
        return f"Whether a head holds the refusal back was not judged: {found['reason']}."
    said = f"Removed one at a time {AT[positions]}, {_count(found, about['total'])} raise refusal by the study's rule"
    if not found["suppression"]:
        return f"{said}."
    first = found["top"][0]
    effect = interval({**first, "mean": first["effect"]})
    gap = interval(about["gap"])
    return f"{said}; the first by rank, {first['head']}, changes the log-odds by {effect} of a gap of {gap}."


def _removal(summary: Mapping[str, Any], fraction: float) -> str:
    found = ablation_of(summary, fraction)
    pair = strongest(found)
    if found is None or pair is None:
        return ""
    before, after = pair
    heads = f" ({after.heads:,} heads)" if after.heads else ""
    said = (
        f"Without the top {100 * after.fraction:g}%{heads} attack success on {after.name} goes from "
        f"{interval(before.rates['asr'])} to {interval(after.rates['asr'])}"
    )
    other = [t for t in found.thinking if t != after.thinking]
    fixed = found.at(after.name, after.fraction, "suppression", other[0]) if other else None
    held = found.at(after.name, 0.0, "none", other[0]) if other else None
    if fixed and held and fixed.rates["asr"]["mean"] is not None and held.rates["asr"]["mean"] is not None:
        said += (
            f"; with its old thinking held fixed from {interval(held.rates['asr'])} to {interval(fixed.rates['asr'])}"
        )
    random = found.at(after.name, after.fraction, "random", after.thinking)
    if random and random.rates["asr"]["mean"] is not None:
        said += f"; without as many random heads of the same layers to {interval(random.rates['asr'])}"
    cost = [f"degenerate {interval(after.rates['degenerate'])}"]
    over = [found.over_refusal(c.fraction, c.kind, c.thinking) for c in pair]
    if over[0] and over[1]:
        cost.insert(0, f"highest over-refusal of a benign set {interval(over[1][1])}, before {interval(over[0][1])}")
    ratio = found.perplexity_text(after.fraction, "suppression", "ratio")
    if ratio:
        cost.append(f"benign perplexity times {ratio}")
    return f"{said}. The cost: {'; '.join(cost)}."


def _count(found: Mapping[str, Any], total: int) -> str:
    """How many heads passed, and the first of them by name."""
    names = found["suppression"]
    if not names:
        return f"none of {total:,} heads"
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{len(names):,} of {total:,} heads ({', '.join(names[:_NAMED])}{more})"
