"""Rates against the share of heads that were removed in generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from clifflab.report.figures.heads import KINDS, draw_band, draw_line, share_names
from clifflab.report.style import LINE, legend_below, panel, shorten, styled


@styled
def dose_response(
    lines: Mapping[str, Sequence[Mapping[str, Any] | None]],
    band: Sequence[Mapping[str, Any] | None],
    fractions: Sequence[float],
    counts: Sequence[int | None],
    what: str,
    title: str,
) -> Figure:
    """A rate against the share of heads removed: chosen heads of each kind, and random ones.

    Args:
        lines: For each kind (``suppression``, ``promoting``) the rate (``mean``, ``low``, ``high``) at every share.
        band: Of random heads ``mean``, ``low``, ``high``, ``min`` and ``max`` over draws at every share.
        fractions: The shares, 0 first.
        counts: How many heads each is.
        what: Label of the vertical axis.
        title: Title of the panel.
    """
    figure, axes = panel(2.7, shorten([title], 52)[0])
    draw_band(axes, band)
    for index, (kind, entries) in enumerate(lines.items()):
        draw_line(axes, entries, index, KINDS.get(kind, kind))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(-0.2, len(fractions) - 0.8)
    axes.set_xticks(range(len(fractions)), share_names(fractions, counts))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("share of all heads removed (heads)")
    axes.set_ylabel(what)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    legend_below(figure, axes)
    return figure
