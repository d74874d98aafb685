"""What a number of examples buys: rates against the budget, and the front of what no other point beats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from clifflab.report.style import COLOURS, INK, LINE, MARKERS, SOFT, STYLES, legend_below, panel, shorten, styled

_RANDOM = "random"
_RANDOM_COLOUR = "#6a6a6a"
_CLOSE = 0.1  # share of an axis within which points share a label
Entry = Mapping[str, Any]


@styled
def budget_curve(
    lines: Mapping[str, Mapping[int, Entry]],
    budgets: Sequence[int],
    before: Entry | None,
    what: str,
    title: str,
    limit: float | None = None,
) -> Figure:
    """A rate against the number of examples, on a logarithmic axis: one line a selector, with intervals.

    Args:
        lines: For each selector the rate (``mean``, ``low``, ``high``) at its budgets.
        budgets: All budgets, ascending.
        before: The rate of the model before.
        what: Label of the vertical axis.
        title: Title of the panel.
        limit: A rate to be marked.
    """
    figure, axes = panel(2.9, shorten([title], 52)[0])
    if limit is not None:
        axes.axhline(limit, color=SOFT, linewidth=0.8, linestyle=":", label=f"{100 * limit:.0f}%")
    if before is not None and before["mean"] is not None:
        axes.axhline(before["mean"], color=INK, linewidth=0.9, linestyle=(0, (6, 2)), label="before tuning")
    steps = np.diff(np.log(budgets)) if len(budgets) > 1 else np.array([1.0])
    width = 0.16 * float(min(steps)) / max(1, len(lines) - 1)
    for index, (name, entries) in enumerate(lines.items()):
        # Whiskers of several selectors stay apart.
        _draw(axes, name, entries, index, math.exp(width * (index - (len(lines) - 1) / 2)))
    axes.set_xscale("log")
    axes.set_xticks(list(budgets), [f"{budget:,}" for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    margin = 1.25
    axes.set_xlim(budgets[0] / margin, budgets[-1] * margin)
    highest = max([entry["high"] or entry["mean"] for own in lines.values() for entry in own.values()] or [1.0])
    _percent_axis(axes, "y", max(highest, (before or {}).get("mean") or 0.0))
    axes.set_xlabel("examples, benign ones included")
    axes.set_ylabel(what)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    legend_below(figure, axes)
    return figure


@styled
def pareto_scatter(
    points: Mapping[str, Mapping[int, tuple[float, float]]], front: Collection[tuple[str, int]], title: str
) -> Figure:
    """Over-refusal against attack success, a point for each selector and budget.

    Args:
        points: For each selector and budget the means of attack success and over-refusal.
        front: Points that no other one beats; they are filled, and their budget stands beside them.
        title: Title of the panel.
    """
    figure, axes = panel(3.1, title)
    everything = [pair for own in points.values() for pair in own.values()]
    for index, (name, own) in enumerate(points.items()):
        colour, _, marker = _style(name, index)
        style = {"linestyle": "", "marker": marker, "color": colour, "markersize": 6.0}
        axes.plot([], [], label=name, **style)  # type: ignore[arg-type]
        for budget, (asr, over) in own.items():
            best = (name, budget) in front
            axes.plot([asr], [over], markerfacecolor=colour if best else "none", zorder=3 + best, **style)  # type: ignore[arg-type]
    _percent_axis(axes, "x", max((asr for asr, _ in everything), default=1.0))
    _percent_axis(axes, "y", max((over for _, over in everything), default=1.0))
    _label_front(axes, {(name, budget): pair for name, own in points.items() for budget, pair in own.items()}, front)
    axes.set_xlabel("attack success")
    axes.set_ylabel("over-refusal")
    axes.grid(color=LINE, linewidth=0.6)
    legend_below(figure, axes, columns=3)
    return figure


def _style(name: str, index: int) -> tuple[str, Any, str]:
    """Colour, line style and marker; random choice is grey whoever stands beside it."""
    if name == _RANDOM:
        return _RANDOM_COLOUR, ":", "x"
    return COLOURS[index % len(COLOURS)], STYLES[index % 3], MARKERS[index % len(MARKERS)]


def _draw(axes: Axes, name: str, entries: Mapping[int, Entry], index: int, beside: float) -> None:
    there = {budget: entry for budget, entry in sorted(entries.items()) if entry["mean"] is not None}
    if not there:
        return
    mean = np.array([entry["mean"] for entry in there.values()])
    ends = {k: np.array([e["mean"] if e[k] is None else e[k] for e in there.values()]) for k in ("low", "high")}
    reach = np.stack([np.maximum(0, mean - ends["low"]), np.maximum(0, ends["high"] - mean)])
    colour, style, marker = _style(name, index)
    axes.errorbar(
        np.array(list(there)) * beside, mean, yerr=reach, color=colour, linestyle=style, linewidth=1.5,
        elinewidth=0.9, capsize=2, marker=marker, markersize=4.5, label=name, zorder=3,
    )  # fmt: skip


def _label_front(
    axes: Axes, points: Mapping[tuple[str, int], tuple[float, float]], front: Collection[tuple[str, int]]
) -> None:
    """The budgets of the front beside its points; points that lie close share a label."""
    wide, high = (limits[1] - limits[0] for limits in (axes.get_xlim(), axes.get_ylim()))
    clumps: list[tuple[float, float, set[int]]] = []
    for key in sorted(front, key=lambda key: points[key]):
        asr, over = points[key]
        near = (c for c in clumps if abs(c[0] - asr) < _CLOSE * wide and abs(c[1] - over) < _CLOSE * high)
        clump = next(near, None)
        if clump is None:
            clumps.append((asr, over, {key[1]}))
        else:
            clump[2].add(key[1])
    for asr, over, budgets in clumps:
        text = ", ".join(f"{budget:,}" for budget in sorted(budgets))
        axes.annotate(text, (asr, over), xytext=(5, 6), textcoords="offset points", fontsize=7.5, zorder=5)


def _percent_axis(axes: Axes, which: str, highest: float) -> None:
    """From 0 to what is there, with round ticks in per cent; never so narrow that a single answer fills it."""
    top = next(top for top in (0.1, 0.2, 0.5, 1.0) if highest <= top or top == 1.0)
    ticks = [top * i / 4 if top in (0.2, 1.0) else top * i / 5 for i in range(6)]
    ticks = [tick for tick in ticks if tick <= top + 1e-9]
    names = [f"{100 * tick:g}%" for tick in ticks]
    limits = (-0.03 * top, 1.03 * top)
    if which == "x":
        axes.set_xticks(ticks, names)
        axes.set_xlim(*limits)
    else:
        axes.set_yticks(ticks, names)
        axes.set_ylim(*limits)
