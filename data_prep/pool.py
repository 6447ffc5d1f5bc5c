"""The workers of one machine: started, watched, started again when one dies, stopped together."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from data_prep.claims import Claims
from data_prep.errors import UserError
from data_prep.parts import disk_error
from data_prep.tokenizers import Tokenizer
from data_prep.work import Counters, Job, PartMismatchError, Worker

LOOK_SECONDS = 0.25
DEATHS = 3  # of workers over one part, before it is taken to be the part's fault

# spawn: a fork would copy this process's locks (rich's and PyTorch's threads hold some) and hang now and then
_CONTEXT = multiprocessing.get_context("spawn")


def run_here(job: Job, first: int, tokenizer: Tokenizer, counters: Counters, look: Callable[[], None]) -> None:
    """Do all work in this process. `look` is called after each part."""

    class Shown(Counters):
        def disk(self, consumed: int) -> None:
            super().disk(consumed)
            look()

    with Claims(job.folder) as claims:
        Worker(job, claims, Shown(counters.cells), tokenizer).run(first)


def run_workers(job: Job, firsts: Sequence[int], counters: Sequence[Counters], look: Callable[[], None]) -> None:
    """Start one process for each entry of `firsts` (the unit it begins with) and wait until the plan is done.

    `look` is called a few times a second. Raises UserError, PartMismatchError; a worker that dies without a word (killed,
    out of memory) is replaced, until DEATHS of them died over the same part.
    """
    running: dict[int, tuple[SpawnProcess, Any]] = {}
    deaths: Counter[str] = Counter()

    def start(index: int) -> None:
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_main, args=(job, firsts[index], counters[index].cells, theirs), daemon=True)
        with _held_back():
            process.start()
        theirs.close()
        running[index] = process, ours

    try:
        for index in range(len(firsts)):
            start(index)
        while running:
            connection.wait([process.sentinel for process, _ in running.values()], LOOK_SECONDS)
            look()
            for index, (process, pipe) in list(running.items()):
                if process.is_alive():
                    continue
                del running[index]
                try:
                    kind, text, code = pipe.recv()
                except EOFError:
                    kind, text, code = "dead", "", 0
                pipe.close()
                if kind == "user":
                    raise UserError(text, code)
                if kind == "engine":
                    raise PartMismatchError(text)
                if kind == "crash":
                    raise UserError(f"a worker failed, which is a fault of herd; please report it:\n{text}")
                if kind == "dead":
                    part = _part_of(job.folder, process.pid)
                    deaths[part] += 1
                    if deaths[part] >= DEATHS:
                        raise UserError(
                            f"{DEATHS} workers died at {part or 'the start'} (exit code {process.exitcode}), most likely "
                            f"for want of memory; what is done stays done: run again with fewer --workers"
                        )
                    start(index)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until a process is started whole: one that is cut off from what it is to do would print a
    traceback. SIGINT stays blocked in the new process, which would print one too while it loads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: came.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
        for got in came:
            signal.raise_signal(got)


def _part_of(folder: Path, pid: int | None) -> str:
    """The part that a process of this machine had claimed."""
    for path in folder.glob("*.claim"):
        try:
            if json.loads(path.read_text())["pid"] == pid:
                return path.name.removesuffix(".claim")
        except (OSError, ValueError, KeyError):
            continue
    return ""


def _main(job: Job, first: int, cells: Any, pipe: Any) -> None:
    """A worker process: the parent alone answers Ctrl-C, and the worker ends when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        with Claims(job.folder) as claims:
            Worker(job, claims, Counters(cells)).run(first)
        pipe.send(("done", "", 0))
    except UserError as error:
        pipe.send(("user", str(error), error.code))
    except PartMismatchError as error:
        pipe.send(("engine", str(error), 0))
    except OSError as error:  # inputs that cannot be read are UserErrors already
        pipe.send(("user", str(disk_error(error.filename or job.folder, error)), 1))
    except MemoryError:
        time.sleep(0.1)  # told as a death: another worker may have more luck, and three such end the work
    except BaseException:
        pipe.send(("crash", traceback.format_exc(), 0))


def cells() -> Any:
    """Numbers that a worker process writes and this one reads."""
    return _CONTEXT.RawArray("q", len(Counters.FIELDS))
