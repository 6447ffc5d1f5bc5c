"""Many parts of a stage over processes, with progress; the parts decide the bytes, never the processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Any

from data_prep.dedup.plan import Plan
from data_prep.errors import UserError

PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal
_plan: Plan | None = None  # of a worker process


def default_workers() -> int:
    """Cores this process may use (a Slurm job's share, not the whole node's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(plan: Plan) -> None:
    """The parent alone answers Ctrl-C, and a worker ends when its parent is gone."""
    global _plan
    _plan = plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(work: Callable[[Plan, int], Any], item: int) -> Any:
    assert _plan is not None
    return work(_plan, item)


class Pool:
    """Runs `work(plan, item)` for items; with one worker in this very process."""

    def __init__(self, plan: Plan, workers: int, shown: bool):
        self.plan, self.workers, self.shown = plan, workers, shown
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:  # a part may take minutes and is nothing without its end
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, name: str, work: Callable[[Plan, int], Any], items: Sequence[int]) -> dict[int, Any]:
        """The result of each item. Raises UserError when a worker process dies."""
        results: dict[int, Any] = {}
        with Progress(name, len(items), self.shown) as progress:
            for item, result in self._results(work, items):
                results[item] = result
                progress.advance()
        return results

    def _results(self, work: Callable[[Plan, int], Any], items: Sequence[int]) -> Iterator[tuple[int, Any]]:
        if self.workers == 1 or len(items) == 1:
            yield from ((item, work(self.plan, item)) for item in items)
            return
        if self._executor is None and items:
            self._executor = ProcessPoolExecutor(
                self.workers,
                # spawn: a fork would copy this process's locks (rich's thread holds some) and hang now and then
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self.plan,),
            )
        try:
            assert self._executor is not None or not items
            futures = {self._executor.submit(_call, work, item): item for item in items} if self._executor else {}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process died, most likely for want of memory; try again with fewer than"
                f" --workers {self.workers}; what is finished is kept"
            ) from error


class Progress:
    """Parts done of a stage: a bar on a terminal, a line every ten seconds and at the end elsewhere; on stderr."""

    def __init__(self, name: str, total: int, shown: bool):
        self.name, self.total, self.shown = name, total, shown and total > 0
        self.done, self.start = 0, time.monotonic()
        self._next = self.start + PLAIN_SECONDS
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total)
        return self

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self.shown and (now >= self._next or self.done == self.total):
            self._next = now + PLAIN_SECONDS
            seconds = now - self.start
            left = seconds / self.done * (self.total - self.done)
            print(
                f"{self.name}: {self.done} of {self.total} parts, {seconds:.0f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
