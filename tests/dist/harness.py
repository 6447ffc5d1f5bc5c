"""Several real processes on gloo for a test, forked from a server that has torch and our packages loaded already.

A case costs 0.1-0.6 s so, against 4-13 s of torchrun. Processes are fresh for each case: a collective that does not
match aborts them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "llama.parallel.apply",
    "llama.train.optim",
    "tests.dist.harness",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _worker(
    rank: int,
    world: int,
    rendezvous: str,
    pipe: Connection,
    function: Callable[..., Any],
    args: Any,
    enter: Callable[[], str] | None,
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    try:
        backends = "gloo" if enter is None else enter()
        dist.init_process_group(backends, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        result = function(rank, *args)
        torch.save(result, f"{rendezvous}.{rank}")
        pipe.send(None)
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        pipe.send(traceback.format_exc())
        os._exit(1)


def run(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    dying: tuple[int, ...] = (),
    enter: Callable[[], str] | None = None,
) -> list[Any]:
    """Call function(rank, *args) in `world` processes joined by gloo; their results by rank.

    Ranks in `dying` are expected to be killed midway; they have no result. `function` must be importable. `enter` is
    called first of all in each process and names the backends to meet with. Raises AssertionError with the first
    traceback when a rank fails or time runs out.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world):
            receive, send = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_worker, args=(rank, world, rendezvous, send, function, args, enter), daemon=True
            )
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        failure, waiting, deadline = None, dict(zip(pipes, range(world), strict=True)), time.monotonic() + timeout
        try:
            while waiting and failure is None:
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    failure = f"ranks {sorted(waiting.values())} still ran after {timeout} s"
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    rank = waiting.pop(pipe)
                    try:
                        text = pipe.recv()
                    except EOFError:
                        text = None if rank in dying else "the process died"
                    failure = failure or (text and f"rank {rank} of {world}: {text}")
        finally:
            for process in processes:
                if failure:
                    process.kill()
                process.join(timeout=20)
        assert failure is None, failure
        return [
            None if rank in dying else torch.load(f"{rendezvous}.{rank}", weights_only=False) for rank in range(world)
        ]
