"""Figures of one model, as SVG text."""

from __future__ import annotations

import io
import math
import re

import matplotlib as mpl
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any kind of colour vision; line styles repeat the distinction in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_CLOSING_WIDTH = 9  # per cent of the thinking axis that one closing token takes


def curves_figure(curves: pa.Table, labels: dict[str, str], closing: list[str], name: str) -> str:
    """Mean refusal score over the thinking and the closing tokens, harmful sets beside benign ones.

    Args:
        curves: Rows of ``curves.parquet`` of one probe at its reported layer, all outcomes together.
        labels: Label of each set, in the study's order.
        closing: Text of the closing tokens, last one at the final position.
        name: Unique name of the figure in its page; letters, digits and ``-``.
    """
    kinds = [kind for kind in ("harmful", "benign") if kind in labels.values()]
    tail = _tail(curves)
    figure = Figure(figsize=(5.2 * len(kinds) + 0.8, 4.4), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        drawn = 0
        for set_name, label in labels.items():
            rows = curves.filter(pc.equal(curves["set"], set_name))
            if label != kind or not rows.num_rows:
                continue
            colour, style = _COLOURS[drawn % len(_COLOURS)], _STYLES[(drawn // len(_COLOURS)) % len(_STYLES)]
            _draw_curve(axis, rows, set_name, colour, style, tail)
            drawn += 1
        _frame(axis, closing, f"{kind} requests", tail)
    axes[0].set_ylabel("refusal score")
    return _svg(figure, name)


def layer_map(curves: pa.Table, title: str, reported: int, closing: list[str], name: str) -> str:
    """Mean score by layer and position of one set, with the reported layer marked."""
    layers = max(curves["layer"].to_pylist()) + 1
    thinking = sorted(set(curves.filter(pc.equal(curves["axis"], "thinking"))["position"].to_pylist()))
    tail = sorted(set(curves.filter(pc.equal(curves["axis"], "closing"))["position"].to_pylist()))
    places = [("thinking", p) for p in thinking] + [("closing", p) for p in tail]
    grid = [[math.nan] * len(places) for _ in range(layers)]
    for row in curves.select(["layer", "axis", "position", "mean"]).to_pylist():
        grid[row["layer"]][places.index((row["axis"], row["position"]))] = row["mean"]
    figure = Figure(figsize=(5.6, 1.6 + 0.16 * layers + 0.9), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
    axis.axvline(len(thinking) - 0.5, color="white", linewidth=1.5)
    axis.axhline(reported - 0.5, color="#D55E00", linewidth=1)
    axis.axhline(reported + 0.5, color="#D55E00", linewidth=1)
    step = max(1, len(thinking) // 4)
    ticks = list(range(0, len(thinking), step)) + [len(thinking) + i for i in range(len(tail))]
    names = [f"{p}%" for p in thinking[::step]] + _closing_names(closing, len(tail))
    axis.set_xticks(ticks, names, fontsize=8)
    for label in axis.get_xticklabels()[len(ticks) - len(tail) :]:
        label.set(rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(0, layers, max(1, layers // 8)))
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="refusal score")
    return _svg(figure, name)


def _draw_curve(axis: Axes, rows: pa.Table, name: str, colour: str, style: str, tail: int) -> None:
    points = sorted(
        (_place(row["axis"], row["position"], tail), row["mean"], row["low"], row["high"]) for row in rows.to_pylist()
    )
    x, mean = [p[0] for p in points], [p[1] for p in points]
    low = [p[1] if p[2] is None else p[2] for p in points]
    high = [p[1] if p[3] is None else p[3] for p in points]
    axis.plot(x, mean, color=colour, linestyle=style, linewidth=1.8, label=name)
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _frame(axis: Axes, closing: list[str], title: str, tail: int) -> None:
    places = [_place("closing", i - tail + 1, tail) for i in range(tail)]
    if places:
        axis.axvspan(100, places[-1] + _CLOSING_WIDTH / 2, color="#000000", alpha=0.05, linewidth=0)
    axis.set_ylim(-0.02, 1.02)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([0, 25, 50, 75, *places], ["0%", "25%", "50%", "75%", *_closing_names(closing, tail)], fontsize=8)
    for label in axis.get_xticklabels()[4:]:
        label.set(rotation=30, ha="right", rotation_mode="anchor")
    axis.set_xlabel("thinking, then closing tokens", fontsize=9)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _place(axis: str, position: int, tail: int) -> float:
    """Place on the joined axis: a bin's lower end, or one step per closing token after 100%."""
    return float(position) if axis == "thinking" else 100.0 + _CLOSING_WIDTH * (position + tail)


def _tail(curves: pa.Table) -> int:
    """How many closing tokens are drawn."""
    return len(set(curves.filter(pc.equal(curves["axis"], "closing"))["position"].to_pylist()))


def _closing_names(closing: list[str], count: int) -> list[str]:
    shown = [repr(text)[1:-1].replace("$", r"\$") for text in closing[-count:]] if count else []
    return [""] * (count - len(shown)) + shown


def _svg(figure: Figure, name: str) -> str:
    """The figure as SVG text without the XML prologue, the same bytes for the same numbers.

    Ids carry the figure's name, so that several figures stand in one page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
