"""The section on what the model does with heads removed: attack success, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clifflab.report.ablation_results import AblationFound, Condition
from clifflab.report.blocks import Block, Drawing, Note, Section, Table
from clifflab.report.figures import dose_response
from clifflab.report.numbers import interval
from clifflab.report.results import ModelResults

TITLE = "What removing heads does"
_DRAWN = 3  # sets of either label that have a figure; all are in the tables
_THINKING = {"regenerated": "thinking anew", "fixed": "thinking as it was"}
_KINDS = {"suppression": "suppression", "promoting": "promoting", "random": "random"}
_WHAT = {"asr": "attack success", "over_refusal": "over-refusal"}
_LABELS = {"asr": ("harmful", "mixed"), "over_refusal": ("benign", "mixed")}
_SEE = {
    "asr": "Suppression heads that matter bring the line down early while the grey band of random heads stays up; "
    "where both fall, the model is being broken. Whiskers are 95% intervals.",
    "over_refusal": "What the removal costs: a benign line that rises is refusal without cause. Low and flat is good.",
}


def ablation_section(results: ModelResults) -> Section | None:
    """Rates with heads removed, thinking written anew or held fixed."""
    found = results.ablation
    if found is None or found.reason or not found.sets:
        return None
    blocks: list[Block] = [
        Note(_summary(found), found.notes()),
        *_drawing(found, "asr"),
        *_drawing(found, "over_refusal"),
        *_tables(found, "asr"),
        *_tables(found, "over_refusal"),
        *_perplexity_table(found),
    ]
    return Section("ablation", TITLE, blocks)


def _summary(found: AblationFound) -> str:
    judged = "the guard calls harmful" if found.by_guard else "comply (judged by rules, on the response alone)"
    kinds = [f"{_KINDS[kind]} heads" for kind in ("suppression", "promoting", "random") if kind in found.kinds]
    removed = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    how: dict[tuple[str, ...], str] = {
        ("regenerated",): "The changed model writes thinking and response.",
        ("fixed",): "The thinking is that of the unchanged model; the changed model writes the response.",
    }
    both = (
        "Once the changed model writes its thinking too, once it answers after the thinking of the unchanged model: "
        "the two can differ, and neither is the other's check."
    )
    thinking = how.get(tuple(found.thinking), both)
    return (
        f"The model answered again with a share of its heads removed: {removed}. {thinking} Attack "
        f"success is the share of harmful prompts whose answers {judged}. A model that is broken looks safe: read it "
        "together with over-refusal, unclosed and degenerate answers and the perplexity of benign traces."
    )


def _drawing(found: AblationFound, measure: str) -> list[Block]:
    """One panel a set and treatment of the thinking."""
    everyone = found.labelled(*_LABELS[measure])
    names = _largest(found, everyone, measure)
    panels = {}
    for name in names:
        for thinking in found.thinking:
            lines: dict[str, list[Mapping[str, Any] | None]] = {
                kind: [_rate(found.at(name, fraction, kind, thinking), measure) for fraction in found.fractions]
                for kind in ("suppression", "promoting")
                if kind in found.kinds
            }
            band = [_band(found.at(name, fraction, "random", thinking), measure) for fraction in found.fractions]
            if not any(entry for line in (*lines.values(), band) for entry in line[1:]):
                continue
            counts = [found.count(fraction, "suppression") if fraction else 0 for fraction in found.fractions]
            title = f"{name}: {_THINKING.get(thinking, thinking)}"
            drawn = dose_response(lines, band, found.fractions, counts, _WHAT[measure], title)
            panels[f"{name}, {thinking}"] = drawn
    if not panels:
        return []
    title = f"{_WHAT[measure].capitalize()} against the share of heads removed"
    chosen = f" The {len(names)} of {len(everyone)} sets with the highest rates are drawn, all are in the tables."
    more = chosen if len(everyone) > len(names) else ""
    return [Drawing(f"ablation-{measure.replace('_', '-')}", title, _SEE[measure] + more, panels)]


def _tables(found: AblationFound, measure: str) -> list[Block]:
    """Set by removal, one table for each treatment of the thinking; mixed sets stand in both."""
    blocks: list[Block] = []
    for thinking in found.thinking:
        rows = []
        for name in found.labelled(*_LABELS[measure]):
            for fraction, kind in _shown(found):
                condition = found.at(name, fraction, kind, thinking)
                if condition is not None:
                    rows.append(_table_row(found, condition, measure))
        if not rows:
            continue
        head = ["set", "removed", f"{_WHAT[measure]} [95%]", "change, paired [95%]"]
        head += ["benign over-refusal [95%]"] if measure == "asr" else []
        head += ["degenerate [95%]", "unclosed [95%]", "perplexity ratio [95%]", "random draws", "traces"]
        caption = (
            f"{_WHAT[measure].capitalize()}, {_THINKING.get(thinking, thinking)}. Changes are against the unchanged "
            "model on the same traces. Random heads: all draws together, and in a column of its own the least and the "
            "largest draw."
        )
        if measure == "asr":
            caption += (
                " Over-refusal is that of the benign set with most of it; it and the perplexity belong to the removal, "
                "whatever the attacked set."
            )
        blocks.append(Table(caption, head, rows))
    return blocks


def _table_row(found: AblationFound, condition: Condition, measure: str) -> list[Any]:
    fraction, kind = condition.fraction, condition.kind
    change = condition.changes[measure] if kind != "none" else None
    row = [condition.name, _removed(fraction, kind), condition.rates[measure], change]
    if measure == "asr":
        highest = found.over_refusal(fraction, kind, condition.thinking)
        row.append(highest[1] if highest else None)
    row += [condition.rates["degenerate"], condition.rates["unclosed"], found.perplexity_text(fraction, kind, "ratio")]
    return [*row, found.draws_text(condition, measure), condition.traces]


def _perplexity_table(found: AblationFound) -> list[Block]:
    rows = []
    for fraction, kind in _shown(found, every=True):
        texts = [found.perplexity_text(fraction, kind, which) for which in ("perplexity", "ratio")]
        if not any(texts):
            continue
        names = found.removed.get((fraction, kind), [])
        which = "differ by draw" if kind == "random" else ", ".join(names[:8]) + (" \u2026" if len(names) > 8 else "")
        highest = [found.over_refusal(fraction, kind, thinking) for thinking in found.thinking]
        over = [f"{interval(entry[1])} {entry[0]}" if entry else None for entry in highest]
        rows.append([_removed(fraction, kind), found.count(fraction, kind) or None, *texts, *over, which or None])
    if not rows:
        return []
    about = found.about["perplexity"]
    caption = (
        f"Perplexity per token of {about['traces']:,} benign answered traces ({about['tokens']:,} tokens) as the "
        "unchanged model wrote them, and its ratio to the unchanged model's on the same traces: at 1 the model finds "
        "its own benign answers as likely as before; of random heads the mean over draws (least to largest). Beside it "
        "the benign set with the highest over-refusal. Promoting heads are those whose removal lowers refusal most."
    )
    titles = ["removed", "heads", "perplexity [95%]", "ratio [95%]"]
    titles += [f"highest over-refusal, {_THINKING.get(thinking, thinking)} [95%]" for thinking in found.thinking]
    return [Table(caption, [*titles, "which heads"], rows)]


def _removed(fraction: float, kind: str) -> str:
    return "nothing" if kind == "none" else f"{100 * fraction:g}% {_KINDS.get(kind, kind)}"


def _shown(found: AblationFound, *, every: bool = False) -> list[tuple[float, str]]:
    """Removals of a table: none, suppression heads at every share, the controls at the main share or at every one."""
    shares = [fraction for fraction in found.fractions if fraction > 0]
    out = [(0.0, "none"), *((fraction, "suppression") for fraction in shares if "suppression" in found.kinds)]
    controls = shares if every or "suppression" not in found.kinds else [found.main]
    return [*out, *((f, kind) for kind in ("promoting", "random") for f in controls if kind in found.kinds)]


def _largest(found: AblationFound, names: Sequence[str], measure: str) -> list[str]:
    """Sets with the highest rate of the unchanged model (attacks), or under any removal (over-refusal)."""

    def height(name: str) -> float:
        fractions = [0.0] if measure == "asr" else found.fractions
        kinds = found.kinds or ["none"]
        rates = [_rate(found.at(name, f, k, t), measure) for f in fractions for k in kinds for t in found.thinking]
        return max((rate["mean"] for rate in rates if rate), default=-1.0)

    chosen = sorted(names, key=lambda name: (-height(name), names.index(name)))[:_DRAWN]
    return [name for name in names if name in chosen]


def _rate(condition: Condition | None, measure: str) -> Mapping[str, Any] | None:
    found = condition.rates.get(measure) if condition else None
    return found if found and found.get("mean") is not None else None


def _band(condition: Condition | None, measure: str) -> Mapping[str, Any] | None:
    """The range over random draws; at fraction 0 the unchanged model, from which it starts."""
    if condition is not None and condition.kind == "none":
        rate = _rate(condition, measure)
        return {"mean": rate["mean"]} if rate else None
    found = condition.bands.get(measure) if condition else None
    return found if found and found["mean"] is not None else None
