"""Notices a run that hangs: writes where each rank stands, names the silent one, and ends the process for a new start."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from llama.run_folder import LastWords, Lock, RunFolder

GRACE = 5.0
"""Most seconds that ranks leave each other to write their stacks, since the first to end takes the others along."""
TOUCH = 10.0
"""Seconds between signs of life in the run folder's lock."""


class Watchdog:
    """A thread that ends the process when `beat` was not called for `timeout` seconds; 0: never.

    It also shows on the first rank that the owner of the run folder's lock lives. When the interpreter itself is stuck,
    so that no thread runs, faulthandler's own timer ends the process a little later.
    """

    def __init__(
        self, run: RunFolder, attempt: int, rank: int, hosts: Sequence[str], timeout: float, lock: Lock | None = None
    ):
        self.run, self.attempt, self.rank, self.hosts, self.lock = run, attempt, rank, hosts, lock
        self.limit = timeout
        self.since, self.doing = time.monotonic(), "starting"
        self.ended = threading.Event()
        self.stacks: IO[str] | None = None
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.limit:
            with contextlib.suppress(OSError):  # a node that does not see the folder is for preflight to name
                self.stacks = (self.run.attempt(self.attempt) / f"stacks-rank{self.rank:05d}.txt").open("w")
        self.beat(self.doing)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.thread.join()
        if self.stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self.stacks.close()
            with contextlib.suppress(OSError):
                if (path := Path(self.stacks.name)).stat().st_size == 0:
                    path.unlink()

    def beat(self, doing: str, limit: float | None = None) -> None:
        """Progress was made; `doing` says in a word what comes next, `limit` changes the seconds it may take."""
        self.since, self.doing = time.monotonic(), doing
        if limit is not None and self.limit:
            self.limit = limit
        if self.stacks is not None:
            faulthandler.dump_traceback_later(self.limit + 2 * GRACE + 5, exit=True, file=self.stacks)

    def _watch(self) -> None:
        touched = time.monotonic()
        while not self.ended.wait(min(1.0, self.limit / 10) if self.limit else 1.0):
            now = time.monotonic()
            if self.lock is not None and now - touched > TOUCH:
                self.lock.beat()
                touched = now
            if self.limit and now - self.since > self.limit:
                self._end(now - self.since)

    def _end(self, silent: float) -> None:
        """Write stacks, wait for the others to write theirs, say who did not, end."""
        stacks = self.stacks or sys.stderr
        stacks.write(f"rank {self.rank}: no progress for {silent:.0f} s in {self.doing}\n")
        stacks.flush()
        faulthandler.dump_traceback(stacks, all_threads=True)
        with contextlib.suppress(OSError):
            os.fsync(stacks.fileno())
        self._flight_recorder()
        if self.ended.wait(min(GRACE, self.limit / 2)):
            return  # it went on after all
        folder = self.run.attempt(self.attempt)
        mute = []
        for rank, host in enumerate(self.hosts):
            path = folder / f"stacks-rank{rank:05d}.txt"
            if not path.exists() or path.stat().st_size == 0:
                mute.append((rank, host))
        text = f"no progress for {silent:.0f} s in {self.doing}"
        if mute:
            names = ", ".join(f"rank {rank} on {host}" if host else f"rank {rank}" for rank, host in mute[:8])
            text += f"; {names}{' and more' if len(mute) > 8 else ''} did not even write a stack, the others wait"
        nodes = tuple(sorted({host for _, host in mute if host}))
        word = LastWords("hang", f"{text}; stacks are in {folder}", self.rank, nodes=nodes)
        self.run.leave_word(self.attempt, word)
        if self.rank == next((r for r in range(len(self.hosts)) if (r, self.hosts[r]) not in mute), 0):
            print(f"herd: {word.text}", flush=True)
        os._exit(1)

    def _flight_recorder(self) -> None:
        """torch's record of the last collectives, where TORCH_FR_BUFFER_SIZE asked for one (slurm/env.sh does)."""
        c10d = sys.modules.get("torch._C._distributed_c10d")
        with contextlib.suppress(Exception):
            dump: Callable[[], bytes] | None = getattr(c10d, "_dump_nccl_trace", None)
            dump = dump or getattr(c10d, "_dump_fr_trace", None)  # the name since torch 2.10, for every backend
            if dump is not None:
                (self.run.attempt(self.attempt) / f"flight-rank{self.rank:05d}.pickle").write_bytes(dump())
