"""How far work is: a bar on a terminal, a line now and then in a log, nothing when not asked; all on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class Progress:
    """Shows a share of work done (0 to 1), what has been read since the start, and the time left."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.start = shown, time.monotonic()
        self._next, self._first = self.start + PLAIN_SECONDS, -1.0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("choosing an engine", total=1.0)
        return self

    def say(self, line: str) -> None:
        """One line beside the bar."""
        if self.shown:
            print(line, file=self._bar.console.file if self._bar else sys.stderr, flush=True)

    def update(self, share: float, text_bytes: int, documents: int, tokens: int) -> None:
        """Show that `share` of all is done; the other counts are of this process's time alone."""
        if not self.shown:
            return
        now = time.monotonic()
        seconds = max(1e-9, now - self.start)
        if self._first < 0:  # loading and choosing are over
            self._first, self.start, seconds = share, now, 1e-9
        said = f"{text_bytes / 1e6 / max(1.0, seconds):.1f} MB/s, {documents:,} documents, {tokens:,} tokens"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(1.0, share), description=said)
        elif now >= self._next:
            self._next = now + PLAIN_SECONDS
            left = seconds * (1 - share) / (share - self._first) if share > self._first else 0
            print(f"{share:.1%}, {said}, {left:,.0f} s left", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
