"""A followed job on a terminal, or as plain lines in a file or a pipe."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from clifflab.errors import one_line


class JobScreen:
    """The job's lines on standard output, where it stands on standard error."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live: Live | None = None
        if sys.stdout.isatty() and sys.stderr.isatty():
            self._live = Live(Text(), console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def line(self, text: str) -> None:
        """Print a line; what could drive a terminal is shown as its code."""
        safe = "".join(c if c == "\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        if self._live:
            self._console.print(Text(safe), soft_wrap=True)
        else:
            click.echo(safe)

    def status(self, text: str) -> None:
        """Replace the last line of a terminal; print it elsewhere."""
        if self._live:
            self._live.update(Text(one_line(text), style="cyan"))
        else:
            click.echo(f"[{one_line(text)}]", err=True)

    def note(self, text: str) -> None:
        """Print a word of clifflab's own."""
        if self._live:
            self._console.print(Text(f"clifflab: {text}"), soft_wrap=True)
        else:
            click.echo(f"clifflab: {text}", err=True)

    def close(self) -> None:
        """Give the terminal back."""
        if self._live:
            self._live.stop()
            self._live = None
