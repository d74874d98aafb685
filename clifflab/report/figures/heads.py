"""Heads: maps of all of them, rankings against each other, and what several do together.

Shape suffixes: L layers, H heads of a layer (the most that any layer has).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from clifflab.report.style import COLOURS, INK, LINE, ORANGE, SOFT, legend_below, panel, styled
from clifflab.science.stats import Floats

Head = tuple[int, int]
_PLANTED = COLOURS[2]
_UNDEFINED = "#dcdcdc"
_CELLS = 3.3 * 72  # points that the cells of one row share
_BAND = "#9a9a9a"
KINDS = {"suppression": "suppression heads", "promoting": "refusal-promoting heads"}
_MANY = 1000  # points that are drawn as an image, which would else make the page heavy


@styled
def head_map(
    grid_LH: Floats, what: str, title: str, marked: Collection[Head] = (), planted: Collection[Head] = ()
) -> Figure:
    """A number of every head, layers upwards and heads to the right, white at 0.

    Args:
        grid_LH: The number, ``[L, H]``; NaN where there is none, which is drawn grey.
        what: Name of the number.
        title: Title of the panel.
        marked: Heads that get a ring: the suppression heads.
        planted: Heads that get a frame: those known to be planted.
    """
    layers, heads = grid_LH.shape
    tall = min(max(0.45, 0.16 * layers), 4.2)
    figure, axes = panel(tall + 0.95, title)
    finite = np.abs(grid_LH[np.isfinite(grid_LH)])
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    axes.set_facecolor(_UNDEFINED)
    image = axes.imshow(
        np.where(np.isfinite(grid_LH), grid_LH, np.nan), aspect="auto", origin="lower", vmin=-reach, vmax=reach,
        cmap="RdBu_r", interpolation="nearest",
    )  # fmt: skip
    cell = min(_CELLS / heads, tall * 72 / layers)
    # Black on white is seen on any ground.
    ring = max(2.5, min(0.55 * cell, 8.0))
    for number, (layer, head) in enumerate(sorted(marked)):
        for colour, width in (("white", 2.6), (INK, 1.2)):
            axes.plot(
                head, layer, marker="o", markersize=ring, markerfacecolor="none", markeredgecolor=colour,
                markeredgewidth=width, linestyle="", zorder=4,
                label="suppression head" if colour == INK and not number else None,
            )  # fmt: skip
    for number, (layer, head) in enumerate(sorted(planted)):
        for colour, width in (("white", 3.4), (_PLANTED, 1.8)):
            axes.add_patch(
                Rectangle(
                    (head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False,
                    zorder=3, label="planted head" if colour == _PLANTED and not number else None,
                )
            )  # fmt: skip
    if not np.isfinite(grid_LH).all():
        axes.fill_between([], [], color=_UNDEFINED, label="not defined")
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(-0.5, layers - 0.5)
    axes.set_xticks(range(0, heads, -(-heads // 9)))
    axes.set_yticks(range(0, layers, -(-layers // max(1, min(9, int(4 * tall))))))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=what, aspect=max(6.0, 7 * tall), ticks=MaxNLocator(5))
    legend_below(figure, axes, columns=3)
    return figure


@styled
def rank_scatter(
    ranks: Mapping[Head, tuple[int, int]],
    estimate: str,
    title: str,
    marked: Collection[Head] = (),
    planted: Collection[Head] = (),
) -> Figure:
    """Rank by an estimate against rank by the exact effect, both logarithmic, a point a head.

    Args:
        ranks: Rank by the estimate and by the exact effect of each head, from 1.
        estimate: Name of the estimate.
        title: Title of the panel.
        marked: Suppression heads.
        planted: Heads known to be planted.
    """
    figure, axes = panel(3.1, title)
    last = max((max(pair) for pair in ranks.values()), default=1)
    axes.plot([1, max(last, 2)], [1, max(last, 2)], color=SOFT, linewidth=0.8, linestyle=":", label="same rank")
    for name, heads, colour, marker, size in (
        ("other heads", ranks.keys() - set(marked), COLOURS[5], "o", 3.5),
        ("suppression head", ranks.keys() & set(marked), COLOURS[1], "s", 6.0),
    ):
        points = [ranks[head] for head in sorted(heads)]
        if points:
            axes.plot(
                [x for x, _ in points], [y for _, y in points], linestyle="", label=name, color=colour, marker=marker,
                markersize=size, rasterized=len(points) > _MANY,
            )  # fmt: skip
    framed = [ranks[head] for head in sorted(planted) if head in ranks]
    if framed:
        axes.plot(
            [x for x, _ in framed], [y for _, y in framed], linestyle="", marker="s", markersize=10,
            markerfacecolor="none", markeredgecolor=_PLANTED, markeredgewidth=1.6, label="planted head",
        )  # fmt: skip
    axes.set_xlabel(f"rank by {estimate}")
    axes.set_ylabel("rank by exact effect")
    for set_scale, set_limits in ((axes.set_xscale, axes.set_xlim), (axes.set_yscale, axes.set_ylim)):
        set_scale("log")
        set_limits(max(2.0, 1.25 * last), 0.85)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if tick <= 1.05 * last]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=LINE, linewidth=0.6)
    legend_below(figure, axes)
    return figure


@styled
def joint_curve(
    lines: Mapping[str, Sequence[Mapping[str, Any] | None]],
    band: Sequence[Mapping[str, Any] | None],
    counts: Sequence[int | None],
    fractions: Sequence[float],
    title: str,
    gap: float | None = None,
) -> Figure:
    """What removing the first heads together does, against random heads of the same layers.

    Args:
        lines: For each kind of heads the effect on the refusal log-odds (``mean``, ``low``, ``high``) at each share.
        band: Of random heads, ``mean``, ``min``, ``max``, ``low`` and ``high`` over draws; ``None`` without draws.
        counts: How many heads each share is.
        fractions: The shares.
        title: Title of the panel.
        gap: Plain minus attacked log-odds: what there is to win back.
    """
    figure, axes = panel(2.8, title)
    if gap is not None:
        axes.axhline(gap, color=INK, linewidth=0.9, linestyle="--", label="gap to plain requests")
    axes.axhline(0, color=SOFT, linewidth=0.7)
    draw_band(axes, band)
    for index, (kind, entries) in enumerate(lines.items()):
        draw_line(axes, entries, index, KINDS.get(kind, kind))
    axes.set_xlim(-0.3, len(fractions) - 0.7)
    axes.set_xticks(range(len(fractions)), share_names(fractions, counts))
    axes.set_xlabel("share of all heads removed (heads)")
    axes.set_ylabel("change of refusal log-odds")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    legend_below(figure, axes)
    return figure


def draw_band(axes: Axes, band: Sequence[Mapping[str, Any] | None], name: str = "random heads") -> None:
    """Random draws at each place: their mean, the middle 95% of them, and all of them."""
    there = [i for i, entry in enumerate(band) if entry and entry["mean"] is not None]
    if not there:
        return

    def at(key: str) -> list[float]:
        found = [band[i] or {} for i in there]
        return [entry["mean"] if entry.get(key) is None else entry[key] for entry in found]

    axes.fill_between(there, at("min"), at("max"), color=_BAND, alpha=0.22, linewidth=0, label=f"{name}: all draws")
    axes.fill_between(there, at("low"), at("high"), color=_BAND, alpha=0.4, linewidth=0, label=f"{name}: 95% of draws")
    axes.plot(
        there,
        at("mean"),
        color="#6a6a6a",
        linewidth=1.2,
        linestyle=":",
        marker=".",
        markersize=4,
        label=f"{name}: mean",
    )


def draw_line(axes: Axes, entries: Sequence[Mapping[str, Any] | None], index: int, name: str) -> None:
    """Means with 95% whiskers at each place; one without a mean is left out."""
    there = [i for i, entry in enumerate(entries) if entry and entry["mean"] is not None]
    if not there:
        return
    found = [entries[i] or {} for i in there]
    mean = np.array([entry["mean"] for entry in found])
    ends = {k: np.array([e["mean"] if e.get(k) is None else e[k] for e in found]) for k in ("low", "high")}
    reach = [np.maximum(0, mean - ends["low"]), np.maximum(0, ends["high"] - mean)]
    colour, style, marker = ((COLOURS[1], "-", "s"), (COLOURS[0], "--", "^"), (ORANGE, "-.", "D"))[index]
    beside = 0.05 * (index - 0.5)  # whiskers stay apart
    axes.errorbar(
        np.array(there) + beside, mean, yerr=reach, color=colour, linestyle=style, linewidth=1.5,
        elinewidth=0.9, capsize=2, marker=marker, markersize=4.5, label=name, zorder=3,
    )  # fmt: skip


def share_names(fractions: Sequence[float], counts: Sequence[int | None]) -> list[str]:
    """Shares as per cent with the number of heads that they are."""
    return [
        f"{100 * share:g}%" if count is None else f"{100 * share:g}% ({count:,})"
        for share, count in zip(fractions, counts, strict=True)
    ]
