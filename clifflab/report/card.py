"""The model card of an exported checkpoint: what was changed, what was measured of it, and what it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from clifflab.report.numbers import interval, number, percent

_MEASURES = (("asr", "ASR"), ("over_refusal", "over-refusal"), ("unclosed", "unclosed"), ("degenerate", "degenerate"))


def card_files(about: Mapping[str, Any]) -> dict[str, str]:
    """``README.md`` and ``clifflab.json`` of a checkpoint.

    Args:
        about: ``source``, ``heads``, ``gamma``, ``fraction``, ``heads_total``, ``dtype``, ``check``, ``clifflab``,
            ``run`` and ``measured`` (both ``None`` without a run).
    """
    return {"README.md": _card(about), "clifflab.json": json.dumps(about, indent=2, ensure_ascii=False) + "\n"}


def _card(about: Mapping[str, Any]) -> str:
    heads, gamma, source, run = about["heads"], about["gamma"], about["source"], about["run"]
    verb = "removed" if gamma == 0 else f"scaled by {gamma:g}"
    lines = ["---", "library_name: transformers", "tags: [clifflab, ablated-heads, safety-research]"]
    if source.get("hub"):
        lines.append(f"base_model: {json.dumps(source['hub'])}")
    lines += [
        "---",
        "",
        f"# {_plain(source['name'])}, {len(heads)} attention heads {verb}",
        "",
        f"This checkpoint is {_plain(source['name'])} with {len(heads)} of {about['heads_total']} attention heads "
        f"{verb}. Nothing else was changed. It was written by clifflab {about['clifflab']}.",
        "",
        "## What was changed",
        "",
        f"- Heads, as layer.head counted from 0: {', '.join(heads)}",
        f"- Factor (gamma) of their columns in the attention's output projection: {gamma:g}",
        "- Share of all heads: "
        + (f"top {about['fraction']:g} by the run's ranking" if about["fraction"] else "chosen by hand"),
        *(f"- Source, {key}: {_code(str(value))}" for key, value in source.items() if value is not None),
        f"- Weights are stored as {about['dtype']}. Tokenizer and config are the source's files.",
        "",
        "The heads' values are still computed; their columns in the output projection are scaled, at every token. The "
        "checkpoint needs no code of its own. When it was written, it was loaded again and compared with the source "
        f"model with hooks on these heads, over {about['check']['tokens']} tokens: its logits differ by at most "
        f"{about['check']['largest_difference_of_logits']:.3g}. The change itself moved them by up to "
        f"{about['check']['largest_change_of_logits']:.3g}.",
        "",
        "## What was measured",
        "",
        *_measured(about),
        "",
        "## Intended use and limits",
        "",
        "Meant for research into why reasoning models lose their refusals, and into repairing that. It is no safety "
        "measure by itself: attacks that were not measured may work as before or better, and a model that is broken "
        "looks safe, so read an attack success rate only beside over-refusal, unclosed and degenerate answers and "
        "perplexity. Removing heads may harm abilities that were not measured. Heads were chosen by their effect on "
        "some prompts, one head at a time; heads that stand in for each other can be missed. The licence and the terms "
        "of the source model hold for this checkpoint too.",
        "",
        "## Provenance",
        "",
    ]
    if run:
        lines += [f"- Study `{run['study']}`, seed {run['seed']}, model `{run['model']}`, run in {run['dtype']}"]
        lines += [f"- Fingerprint of the step `{name}`: `{value}`" for name, value in run["fingerprints"].items()]
    else:
        lines.append("- The heads were named by hand; no run of a study stands behind them.")
    return "\n".join([*lines, "- The same as data: `clifflab.json`", ""])


def _measured(about: Mapping[str, Any]) -> list[str]:
    found = about["measured"]
    if not found:
        why = "The run did not generate with exactly these heads and this factor" if about["run"] else "There is no run"
        return [f"{why}: nothing is known of what this model answers."]
    judge = "a guard model" if found["judged_by"] == "guard" else "rules that look for refusals"
    lines = [
        "Before and after, with 95% intervals over groups of prompts, on groups that had no part in choosing the heads "
        f"where a set has any. Harm is judged by {judge}. Thinking is either written anew by the changed model "
        "(regenerated) or held as the unchanged model wrote it (fixed).",
        "",
        "| set | label | thinking | prompts | " + " | ".join(f"{name} before | after" for _, name in _MEASURES) + " |",
        "|" + "---|" * (4 + 2 * len(_MEASURES)),
    ]
    for name, entries in found["sets"].items():
        for entry in entries:
            cells = [f"{percent(entry[when][key])}" for key, _ in _MEASURES for when in ("before", "after")]
            about_set = [name, entry["label"], entry["thinking"], str(entry["after"]["traces"])]
            lines.append("| " + " | ".join([*about_set, *cells]) + " |")
    perplexity = found["perplexity"]
    if perplexity:
        before, after = (number(perplexity[when]["perplexity"]["mean"], 3) for when in ("before", "after"))
        ratio = interval(perplexity["after"]["ratio"], 3)
        lines += ["", f"Benign perplexity: {before} before, {after} after; ratio {ratio}."]
    return lines


def _plain(text: str) -> str:
    """Text that cannot end its place in the page, nor be read as markup."""
    return re.sub(r"([\\<>\[\]()*_|#&])", r"\\\1", " ".join(text.replace("`", "'").split()))


def _code(text: str) -> str:
    """Text between backticks."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
