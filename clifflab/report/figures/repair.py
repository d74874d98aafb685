"""A repair: which traces were chosen, how the tuning went, and rates before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clifflab.report.numbers import number
from clifflab.report.style import COLOURS, INK, LINE, ORANGE, SOFT, legend_below, panel, shorten, styled
from clifflab.science.stats import Floats

_BINS = 40
# Kinds of traces: line in the histogram, fill and hatching in the bars; told apart without colour too.
_KINDS: dict[str, tuple[str, Any, str]] = {
    "cliff case": (COLOURS[1], "-", "xx"),
    "harmful, answered": (COLOURS[1], "-", ""),
    "harmful, refused": (COLOURS[0], "--", "//"),
    "unlabelled": (COLOURS[3], "-.", ".."),
    "benign": ("#4d4d4d", ":", ""),
}
_FILLS = {"cliff case": COLOURS[1], "harmful, answered": ORANGE, "harmful, refused": "#7fb8d8", "benign": "#e8e8e8"}
# Of a comparison the first is how it was, the others how it is.
_MARKS = ((COLOURS[1], "o", "white"), (COLOURS[0], "s", COLOURS[0]), (COLOURS[2], "^", COLOURS[2]))


@styled
def score_histogram(kinds: Mapping[str, Floats], chosen: Floats, measure: str, title: str) -> Figure:
    """How a score is spread over the corpus, and where the chosen traces lie.

    Args:
        kinds: Scores by kind of trace, ``[N]`` each.
        chosen: Scores of the chosen traces, ``[K]``.
        measure: Name of the score.
        title: Title of the panel.
    """
    figure, axes = panel(2.9, title)
    low = -1.0 if measure in ("misalignment", "cliff") else 0.0
    edges = np.linspace(low, 1, _BINS + 1)
    counts = np.histogram(np.clip(chosen, low, 1), edges)[0]
    axes.stairs(
        np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, facecolor="#f7d9a0", edgecolor="#8a6d3b",
        hatch="///", linewidth=0, label=f"chosen ({len(chosen):,})",
    )  # fmt: skip
    highest = int(counts.max(initial=1))
    for name, scores in kinds.items():
        colour, style, _ = _KINDS[name]
        counts = np.histogram(np.clip(scores, low, 1), edges)[0]
        highest = max(highest, int(counts.max(initial=1)))
        label = f"{name} ({len(scores):,})"
        axes.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, color=colour, linestyle=style, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 1.6 * highest)
    axes.yaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(low - 0.02, 1.02)
    axes.set_xlabel(f"{measure} of a corpus trace")
    axes.set_ylabel("traces (logarithmic)")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    legend_below(figure, axes)
    return figure


@styled
def choice_bars(choices: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """What each selector chose, by kind of trace.

    Args:
        choices: For each selector how many examples are of which kind.
        title: Title of the panel.
    """
    figure, axes = panel(0.65 + 0.4 * len(choices), title)
    drawn = [kind for kind in _KINDS if any(found.get(kind) for found in choices.values())]
    for kind in drawn:
        axes.fill_between([], [], label=kind, **_fill(kind))
    for row, (name, found) in enumerate(zip(shorten(list(choices), 28), choices.values(), strict=True)):
        left, total = 0.0, max(1, sum(found.values()))
        axes.text(0, row - 0.25, name, va="bottom", ha="left")
        told = f"{found.get('cliff case', 0):,} cliff cases of {sum(found.values()):,}"
        axes.text(1, row - 0.25, told, va="bottom", ha="right", color=SOFT, fontsize=7.5)
        for kind in drawn:
            if found.get(kind):
                axes.barh(row, found[kind] / total, 0.42, left=left, **_fill(kind))
                left += found[kind] / total
    axes.set_ylim(len(choices) - 0.6, -0.75)
    axes.set_xlim(-0.01, 1.01)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _shares(axes)
    axes.set_xlabel("share of the examples")
    legend_below(figure, axes)
    return figure


@styled
def learning_curve(
    steps: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], best: int | None, title: str
) -> Figure:
    """Loss of the training steps and of the held-out examples.

    Args:
        steps: ``step`` and ``loss`` of each optimizer step.
        held_out: The same over the held-out examples.
        best: Step whose weights were kept; ``None`` where none was chosen.
        title: Title of the panel.
    """
    figure, axes = panel(2.7, title)
    points = [(p["step"], p["loss"]) for p in steps if p["loss"] is not None and math.isfinite(p["loss"])]
    axes.plot(*_columns(points), color=COLOURS[0], linewidth=1.1, marker=".", markersize=3, label="training batch")
    points = [(p["step"], p["loss"]) for p in held_out if p["loss"] is not None and math.isfinite(p["loss"])]
    if points:
        axes.plot(
            *_columns(points), color=COLOURS[1], linewidth=1.5, linestyle="--", marker="D", markersize=4.5,
            label="held-out examples",
        )  # fmt: skip
    if best is not None:
        axes.axvline(best, color=INK, linewidth=0.9, linestyle=":", label=f"kept: step {best:,}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token (nats)")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    legend_below(figure, axes, columns=3)
    return figure


@styled
def before_after(
    rows: Mapping[str, Sequence[Mapping[str, Any] | None]],
    series: Sequence[str],
    what: str,
    title: str,
    ends: tuple[float, float] | None = None,
) -> Figure:
    """A figure of several sets, how it was and how it is, each with its interval; a thin line joins those of a set.

    Args:
        rows: For each set an entry (``mean``, ``low``, ``high``) a series, or ``None``.
        series: What the entries are, the earlier one first.
        what: Label of the axis.
        title: Title of the panel.
        ends: Ends of the axis; without, the figure is a share and shown in per cent.
    """
    lower, upper = ends or (0.0, 1.0)
    figure, axes = panel(0.65 + (0.34 + 0.08 * len(series)) * len(rows), title)
    offsets = np.linspace(-0.02, 0.3, len(series))
    for row, (name, entries) in enumerate(zip(shorten(list(rows), 30), rows.values(), strict=True)):
        axes.text(lower, row - 0.2, name, va="bottom", ha="left")
        axes.text(
            upper, row - 0.2, _told(entries, share=ends is None), va="bottom", ha="right", color=SOFT, fontsize=7.5
        )
        there = [(i, e) for i, e in enumerate(entries) if e and e.get("mean") is not None]
        places = [row + offsets[i] for i, _ in there]
        axes.plot([e["mean"] for _, e in there], places, color="#a6a6a6", linewidth=0.8, zorder=1)
        for (index, entry), place in zip(there, places, strict=True):
            colour, marker, face = _MARKS[index]
            if entry.get("low") is not None:
                axes.plot([entry["low"], entry["high"]], [place, place], color=colour, linewidth=1.6, zorder=2)
            axes.plot(
                entry["mean"], place, marker=marker, markersize=5.5, color=colour, markerfacecolor=face, zorder=3,
            )  # fmt: skip
    for index, name in enumerate(series):
        colour, marker, face = _MARKS[index]
        axes.plot([], [], color=colour, marker=marker, markersize=5.5, markerfacecolor=face, linewidth=1.6, label=name)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    margin = 0.02 * (upper - lower)
    axes.set_xlim(lower - margin, upper + margin)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if ends is None:
        _shares(axes)
    else:
        axes.axvline(0, color=SOFT, linewidth=0.7, linestyle=":", zorder=0)
    axes.set_xlabel(what)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    legend_below(figure, axes, columns=len(series))
    return figure


def _told(entries: Sequence[Mapping[str, Any] | None], *, share: bool) -> str:
    means = [entry.get("mean") if entry else None for entry in entries]
    texts = [number(None if m is None else 100 * m, 0) + "%" * (m is not None) if share else number(m) for m in means]
    return " \u2192 ".join(texts)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _shares(axes: Axes) -> None:
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])


def _fill(kind: str) -> dict[str, Any]:
    return {
        "facecolor": _FILLS.get(kind, COLOURS[3]),
        "hatch": _KINDS[kind][2],
        "edgecolor": "#4d4d4d",
        "linewidth": 0.4,
    }
