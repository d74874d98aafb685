"""Progress of a run on standard error: a live bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """What a run tells while it works."""

    def start(self, title: str, total: int, done: int) -> None:
        """A step begins: ``done`` of ``total`` units are there already. Others may be under way."""
        ...

    def advance(self, title: str) -> None:
        """One more unit of a step is done."""
        ...

    def finish(self, title: str) -> None:
        """A step is whole."""
        ...

    def abort(self) -> None:
        """The run ends here, whatever the reason: leave the terminal as it was."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...


class Silent:
    """Tells nothing: for use from Python."""

    def start(self, title: str, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, title: str) -> None:
        """Nothing."""

    def finish(self, title: str) -> None:
        """Nothing."""

    def abort(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass
class _Running:
    """A step that is under way: its units, since when, and its bar."""

    total: int
    began: float
    bar: TaskID | None = None


class Terminal:
    """Bars on a terminal, plain lines in a file or a pipe."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._steps: dict[str, _Running] = {}

    def start(self, title: str, total: int, done: int) -> None:
        """Show the step."""
        step = self._steps[title] = _Running(total, time.monotonic())
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._progress.start()
        step.bar = self._progress.add_task(title, total=max(total, 1), completed=done)

    def advance(self, title: str) -> None:
        """Move the step's bar."""
        step = self._steps.get(title)
        if self._progress and step and step.bar is not None:
            self._progress.advance(step.bar)

    def abort(self) -> None:
        """Take the bars away and give the cursor back."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def finish(self, title: str) -> None:
        """Replace the step's bar by a line."""
        step = self._steps.pop(title)
        if self._progress and step.bar is not None:
            self._progress.remove_task(step.bar)
        if not self._steps:
            self.abort()
        seconds = time.monotonic() - step.began
        self._console.print(f"[green]done[/] {title:<24} {step.total:>5} units {seconds:7.1f} s", soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True, markup=False)


class Counted(Protocol):
    """What a scoring job tells while it works."""

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def begin(self, total: int) -> None:
        """A job of so many rows; the blocks that are done already follow."""
        ...

    def work(self) -> None:
        """The work begins."""
        ...

    def add(self, receipt: dict[str, Any]) -> None:
        """A block is done."""
        ...

    def end(self) -> None:
        """The run ends here, whatever the reason."""
        ...


class SilentCount:
    """Tells nothing: for use from Python."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, total: int) -> None:
        """Nothing."""

    def work(self) -> None:
        """Nothing."""

    def add(self, receipt: dict[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
