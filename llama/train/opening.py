"""Enters a run folder: makes it, takes its lock, numbers the attempt, writes down what the run is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.errors import UserError
from llama import provenance
from llama import recipe as recipes
from llama.config import Recipe
from llama.node import node_name
from llama.run_folder import Lock, RunFolder
from llama.train.journal import Journal
from llama.train.watchdog import Watchdog


@dataclass(frozen=True)
class Opened:
    """A run folder that this run holds."""

    run: RunFolder
    attempt: int
    """Number of this start of the run, from 1."""
    hosts: tuple[str, ...]
    """Node of each rank, by Slurm's name where there is one."""
    lock: Lock | None
    """Held by the first rank."""
    journal: Journal
    watchdog: Watchdog
    version: str
    """Of this code; on the first rank."""
    notes: tuple[str, ...]
    """What the first rank should say."""


current: tuple[RunFolder, int] | None = None
"""Folder and attempt of the run that this process is in: where its last words go."""


@contextmanager
def open_run(recipe: Recipe) -> Iterator[Opened]:
    """The run folder for as long as this run holds it. Collective.

    Raises UserError on every rank: folder not writable, of another model, or being trained in by another run.
    """
    global current
    rank, run = dist.get_rank(), RunFolder(Path(recipe.folder))
    lock, version, notes, trouble = None, "", [], ""
    attempt = 0
    with ExitStack() as stack:
        if rank == 0:
            try:
                attempt = int(os.environ.get("HERD_ATTEMPT") or max(run.attempts(), default=0) + 1)
                run.attempt(attempt).mkdir(parents=True, exist_ok=True)
                lock = Lock(run, attempt)
                note = lock.acquire()
                stack.callback(lock.release)
                notes += [note] if note else []
                recipes.save(recipe, run.recipe)
                version = provenance.record(run)
            except OSError as error:
                trouble = (
                    f"run folder {run.path} cannot be written: {error.strerror or error}; choose another run_dir=..."
                )
            except UserError as error:
                trouble = str(error)
        shared: list[Any] = [(attempt, trouble)]
        dist.broadcast_object_list(shared, src=0)
        attempt, trouble = shared[0]
        if trouble:
            raise UserError(trouble, 2)
        current = run, attempt
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, node_name())
        limits = recipe.resilience
        timeout = max(limits.hang_timeout, limits.first_step_timeout) if limits.hang_timeout else 0.0
        watchdog = stack.enter_context(Watchdog(run, attempt, rank, hosts, timeout, lock))
        journal = Journal(run, attempt, writes=rank == 0)
        yield Opened(run, attempt, tuple(hosts), lock, journal, watchdog, version, tuple(notes))
    current = None
