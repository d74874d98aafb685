"""Progress of a run on standard error: a live bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """What a run tells while it works."""

    def start(self, title: str, total: int, done: int) -> None:
        """A step begins: ``done`` of ``total`` units are there already."""
        ...

    def advance(self) -> None:
        """One more unit is done."""
        ...

    def finish(self) -> None:
        """The step is whole."""
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

    def advance(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def abort(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Terminal:
    """Bars on a terminal, plain lines in a file or a pipe."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._title, self._total, self._start = "", 0, 0.0

    def start(self, title: str, total: int, done: int) -> None:
        """Show the step."""
        self._title, self._total, self._start = title, total, time.monotonic()
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._progress.start()
            self._progress.add_task(title, total=max(total, 1), completed=done)

    def advance(self) -> None:
        """Move the bar."""
        if self._progress:
            self._progress.advance(self._progress.task_ids[0])

    def abort(self) -> None:
        """Take the bar away and give the cursor back."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def finish(self) -> None:
        """Replace the bar by a line."""
        self.abort()
        seconds = time.monotonic() - self._start
        self._console.print(f"[green]done[/] {self._title:<24} {self._total:>5} units {seconds:7.1f} s", soft_wrap=True)

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
