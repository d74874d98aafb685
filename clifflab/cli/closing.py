"""What a run says at its end: each model's table, and a tuned model beside the one before it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

_RATES = {"harmful": ("asr",), "benign": ("over_refusal",), "mixed": ("asr", "over_refusal")}
_TITLES = {"asr": "ASR", "over_refusal": "over-refusal"}


def print_models(models: dict[str, dict[str, Any]], fraction: float) -> None:
    """Each model's table; of one that is compared with another, the comparison.

    Args:
        models: That part of ``metrics.json``.
        fraction: Share of heads that counts as the top.
    """
    from clifflab.findings import visible
    from clifflab.report.curve import curve_line
    from clifflab.report.repair_short import repair_lines

    after = {model["evaluation"]["before"]: model for model in models.values() if model.get("evaluation")}
    for name, model in models.items():
        if model.get("evaluation"):
            print_evaluation(model["evaluation"])
            continue
        print_model(name, model, fraction)
        for line in (*repair_lines(model, after.get(name)), curve_line(model)):
            if line:
                click.echo(visible(line))


def print_model(name: str, model: dict[str, Any], fraction: float = 0.03) -> None:
    """The closing table, the excess cliff, and what removing heads does."""
    from rich.console import Console
    from rich.table import Table

    from clifflab.findings import visible
    from clifflab.report.heads_short import heads_line
    from clifflab.report.numbers import interval

    layer = model["probe"].get("all", {}).get("layer")
    title = f"{name}: all-position probe, layer {layer}" if layer is not None else name
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("set")
    scores = ("plateau", "final", "cliff [95%]") if layer is not None else ()
    for heading in ("n", "refused", "complied", "unclosed", "degen.", *scores):
        table.add_column(heading, justify="right")
    for set_name, entry in model["sets"].items():
        counts = [str(entry["outcomes"][key]) for key in ("n", "refused", "complied", "unclosed", "degenerate")]
        probe = entry["probes"]["all"]
        means = [interval({**probe[key], "low": None}).split(" ")[0] for key in ("plateau", "final")]
        table.add_row(set_name, *counts, *([*means, interval(probe["cliff"])] if scores else []))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print()
    console.print(table)
    excess = model["excess_cliff"]["all"]
    why = excess.get("reason", "") if model["probe"]["trained"] else "no probe could be trained"
    line = interval(excess) if excess["mean"] is not None else f"not defined: {why}"
    console.print(f"excess cliff (complied - refused, matched length): {line}", markup=False, soft_wrap=True)
    if heads := heads_line(model, fraction):
        console.print(visible(heads), markup=False, soft_wrap=True)


def print_evaluation(found: Mapping[str, Any]) -> None:
    """The table of a comparison: rates before and after by set, what was lost beside them, and the cliff.

    Args:
        found: Content of ``evaluation.json``.
    """
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    title = f"{found['model']} beside {found['before']}"
    console.print()
    if found["reason"]:
        console.print(f"{title}: not compared: {found['reason']}", markup=False, soft_wrap=True)
        return
    samples = f"{found['samples']} sample{'' if found['samples'] == 1 else 's'} a prompt"
    console.print(_table(found, f"{title}, judged by {found['judged_by']}, {samples}"))
    for line in _lines(found):
        console.print(line, markup=False, soft_wrap=True)


def _table(found: Mapping[str, Any], title: str) -> Any:
    from rich.table import Table

    from clifflab.report.numbers import DASH, percent

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("set", "rate"):
        table.add_column(heading)
    for heading in ("before [95%]", "after [95%]", "change [95%]", "unclosed", "degen.", "cliff (own probe)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in ("sets", "pools"):
        for name, entry in found[part].items():
            for rate in _RATES[entry["label"]]:
                figures = entry["rates"][rate]
                sides = [percent(figures[side]) for side in ("before", "after", "change")]
                lost = [_shift(entry["rates"][measure]) for measure in ("unclosed", "degenerate")]
                cliff = _cliff(found["cliff"][name]) if part == "sets" else ""
                table.add_row(name if part == "sets" else f"= {name}", _TITLES[rate], *sides, *lost, cliff)
    for name in found["left_out"]:
        table.add_row(name, "given", *[DASH] * 5, _cliff(found["cliff"][name]))
    return table


def _lines(found: Mapping[str, Any]) -> list[str]:
    from clifflab.report.numbers import interval, number, percent

    read = found["perplexity"]
    lines = [f"benign perplexity: not measured: {read['reason']}"]
    if not read["reason"]:
        sides = f"{number(read['before']['mean'], 3)} -> {number(read['after']['mean'], 3)}"
        lines = [f"benign perplexity: {sides}, ratio {interval(read['ratio'], 3)}, {read['ratio']['n']} texts"]
    for name, entry in found["choices"].items():
        sides = f"{percent(entry['before'])} -> {percent(entry['after'])}, change {percent(entry['change'])}"
        rejected = sum(entry["rejected"].values())
        left_out = f", {rejected} row{'' if rejected == 1 else 's'} left out" if rejected else ""
        lines.append(f"{name}: accuracy {sides}, {entry['questions']} questions{left_out}")
    probes = found["probes"]
    if probes["old"]:
        lines.append(f"cliff by the probe of the model before: not measured: {probes['old']}")
    if probes["own"] and probes["own"] not in probes["old"]:
        lines.append(f"cliff by the tuned model's own probe: not measured: {probes['own']}")
    told = " ".join(probes.values())
    sides_of_excess = {"before": "before", "after_old_probe": "after, old probe", "after_own_probe": "after, own probe"}
    for side, text in sides_of_excess.items():
        entry = found["excess_cliff"][side]
        if entry["mean"] is not None:
            lines.append(f"excess cliff {text}: {interval(entry)}")
        elif entry["reason"] not in told:
            lines.append(f"excess cliff {text}: not defined: {entry['reason']}")
    return lines


def _shift(entry: Mapping[str, Any]) -> str:
    """Two shares without their intervals."""
    from clifflab.report.numbers import DASH

    ends = [entry[side]["mean"] for side in ("before", "after")]
    return " -> ".join(DASH if value is None else f"{100 * value:.0f}%" for value in ends)


def _cliff(entry: Mapping[str, Any]) -> str:
    """Mean cliff before and after by the old probe, and by the tuned model's own."""
    from clifflab.report.numbers import number

    sides = ("before", "after_old_probe", "after_own_probe")
    before, after, own = (number(entry[side]["cliff"]["mean"] if entry[side] else None) for side in sides)
    return f"{before} -> {after} ({own})"
