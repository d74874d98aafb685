"""Rows done and memory against time, for corpora of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clifflab.artifacts import write_atomic
from clifflab.bench.scale import Course
from clifflab.errors import OutputError
from clifflab.report.style import COLOURS, LINE, STYLES, WIDTH, styled

KINDS = (".png", ".svg", ".pdf")
_MIB = 2**20


def check_place(path: Path) -> Path:
    """The plot's file, before anything runs.

    Raises:
        OutputError: It is of no kind that can be drawn.
    """
    if path.suffix not in KINDS:
        raise OutputError("--plot", path, "unknown kind of file", f"give a {', '.join(KINDS[:-1])} or {KINDS[-1]} file")
    return path


def write_plot(courses: Sequence[Course], path: Path) -> None:
    """Draw the courses of several runs to a file."""
    figure = draw(courses)
    write_atomic(path, lambda scratch: figure.savefig(scratch, format=path.suffix[1:], dpi=160))


@styled
def draw(courses: Sequence[Course]) -> Figure:
    """Two panels: rows done by share of the corpus, so that straight lines mean an even speed, and memory.

    Args:
        courses: How the runs went, the smallest corpus first.
    """
    figure = Figure(figsize=(2 * WIDTH, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, course in enumerate(courses):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
        times, done = zip(*course.done, strict=True)
        label = f"{course.rows:,} rows in {course.seconds:,.0f} s: {course.rows / course.seconds:,.0f} rows/s"
        left.plot(
            [0.0, *(time / course.seconds for time in times)], [0.0, *(rows / course.rows for rows in done)],
            color=colour, linestyle=style, label=label,
        )  # fmt: skip
        seconds = [time / course.seconds for time, _ in course.memory]
        total = [memory.total / _MIB for _, memory in course.memory]
        both = [(memory.driver + memory.workers) / _MIB for _, memory in course.memory]
        right.plot(seconds, total, color=colour, linestyle=style, label=f"{course.rows:,} rows, all processes")
        right.plot(
            seconds, both, color=colour, linestyle=style, linewidth=0.8, alpha=0.6,
            label=f"{course.rows:,} rows, driver and workers",
        )  # fmt: skip
    _finish(left, "Rows done", "share of the corpus")
    _finish(right, "Memory (proportional set size)", "MiB")
    left.set_ylim(0, 1.02)
    right.set_ylim(0, None)
    return figure


def _finish(axes: Axes, title: str, what: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("share of the run's time")
    axes.set_ylabel(what)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.legend(loc="lower right")
