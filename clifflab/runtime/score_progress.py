"""Progress of a scoring job: rows, speeds, time left, rejects; a live line on a terminal, else one in a while."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

_EVERY = 15.0  # seconds between two lines where there is no terminal
_RECENT = 60.0  # seconds that speeds are taken over


class ScoreProgress:
    """Counts receipts on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._total = self._done = self._rejected = self._tokens = 0
        self._recent: deque[tuple[float, int, int]] = deque()
        self._told = 0.0

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True, markup=False)

    def begin(self, total: int) -> None:
        """A job of so many rows; the blocks that are done already follow."""
        self._total = total
        self._told = time.monotonic()

    def work(self) -> None:
        """Show where the job stands."""
        now = self._told = time.monotonic()
        self._recent = deque([(now, self._done, self._tokens)])
        if self._done:
            self.note(f"going on: {self._done:,} of {self._total:,} rows are done")
        if self._console.is_terminal:
            self._live = Live(self._line(), console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def add(self, receipt: dict[str, Any]) -> None:
        """Move on by a block."""
        self._count(receipt)
        if not self._recent:
            return  # done by an earlier run
        now = time.monotonic()
        self._recent.append((now, self._done, self._tokens))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RECENT:
            self._recent.popleft()
        if self._live:
            self._live.update(self._line())
        elif now - self._told >= _EVERY:
            self._told = now
            self._console.print(self._line(), soft_wrap=True)

    def end(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()
            self._live = None

    def _count(self, receipt: dict[str, Any]) -> None:
        self._done += receipt["rows"]
        self._tokens += receipt["tokens"]
        self._rejected += sum(receipt["rejected"].values())

    def _line(self) -> Text:
        (before, done, tokens), now = self._recent[0], time.monotonic()
        seconds = max(now - before, 1e-9)
        rows_per_second, tokens_per_second = (self._done - done) / seconds, (self._tokens - tokens) / seconds
        parts = [f"{self._done:,} of {self._total:,} rows"]
        if rows_per_second:
            left = (self._total - self._done) / rows_per_second
            parts += [f"{rows_per_second:,.0f} rows/s", f"{tokens_per_second:,.0f} tokens/s", f"{_clock(left)} left"]
        parts.append(f"{self._rejected:,} rejected")
        return Text("  ".join(parts))


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
