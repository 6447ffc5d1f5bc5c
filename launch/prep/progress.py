"""A bar on a terminal, a line every ten seconds elsewhere, both on stderr; and what SIGTERM means to a verb."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

PLAIN_SECONDS = 10.0


@contextlib.contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes done since its last call, of `total`."""
    start = last = time.monotonic()
    done = 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=max(1, total))
            yield lambda count: bar.advance(task, count)
        return

    def plain(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            left = (now - start) * (total - done) / max(1, done)
            share, speed = done / max(1, total), done / 1e6 / (now - start)
            print(f"{what}: {share:.1%}, {speed:,.0f} MB/s, {left:,.0f} s left", file=sys.stderr, flush=True)

    yield plain


def stop_at_sigterm() -> None:
    """SIGTERM unwinds as Ctrl-C does, so that nothing half-written stays."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def default_workers() -> int:
    """Cores this process may use (a Slurm job's share, not the whole node's), up to 16: disks give no more then."""
    import os

    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
