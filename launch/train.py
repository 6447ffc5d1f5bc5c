"""`herd train RECIPE [key=value ...]`: starts the processes it is asked for, and is what torchrun starts on a node."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError
from llama.peers import lost_peer
from llama.run_folder import LastWords, RunFolder

if TYPE_CHECKING:
    from llama.config import Recipe
    from llama.device import Device
    from llama.run_folder import Kind
    from llama.train.signals import StopRequest


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--processes", "-n", type=click.IntRange(1), help="Processes on this machine; one a GPU, or 1, when not given."
)
def command(recipe: str, overrides: tuple[str, ...], processes: int | None) -> None:
    """Train RECIPE, a file or a name in configs/, changed by KEY=VALUE overrides; resumes what its run folder holds.

    \b
    herd train tiny_cpu --processes 2
    herd train tiny_cpu -n 4 parallel.tensor_parallel=2 train.steps=50 run_dir=runs/tp2
    torchrun --nproc-per-node 8 -m launch.train llama3.1_8b_gpu
    """
    from llama import recipe as recipes

    launch(recipes.load(recipe, overrides), [recipe, *overrides], processes)


def launch(
    resolved: Recipe,
    arguments: list[str],
    processes: int | None,
    module: str = "launch.train",
    body: Callable[[Recipe, StopRequest | None], object] | None = None,
) -> None:
    """Run `body`, or training, in this process when torchrun started it; else start `processes` of `module`."""
    from llama import recipe as recipes

    # Trainium's runtime rounds stochastically by itself and reads this when torch is imported, so before that.
    os.environ.setdefault("NEURON_RT_STOCHASTIC_ROUNDING_EN", str(int(resolved.train.precision == "bf16_sr")))
    os.environ.setdefault("NEURON_RT_STOCHASTIC_ROUNDING_SEED", str(resolved.train.seed))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        work(resolved, body)
        return
    wanted = processes or local_devices()
    recipes.lay_out(resolved, wanted)
    check_inputs(resolved)
    if wanted == 1:
        work(resolved, body)
    else:
        start(wanted, module, arguments)


def local_devices() -> int:
    """Accelerators of this machine; 1 where there is only a CPU, or where HERD_DEVICE asks for it."""
    import torch

    return 1 if found_device().type == "cpu" else torch.accelerator.device_count()


def found_device() -> Device:
    """The device to run on; UserError when the one asked for is not there."""
    from llama.device import find_device

    try:
        return find_device()
    except ValueError as error:
        raise UserError(str(error), 2) from None


def check_inputs(recipe: Recipe) -> None:
    """Refuse what cannot work before any process is started: missing or damaged token files, an unwritable folder."""
    from llama.data.blend_file import open_sources

    if not recipe.data.train:
        raise UserError(
            f"recipe {recipe.name}: data.train names no token files; give a prefix made by herd prep tokenize", 2
        )
    if recipe.chat is not None:
        from llama.chat.encoded import check_chat

        check_chat(recipe)
    else:
        open_sources((*recipe.data.train, *recipe.data.validation), thorough=True)
    if recipe.train.init_from:
        from llama import hf

        hf.checkpoint_reader(recipe.train.init_from, recipe.model)  # reads headers only
    elif recipe.lora.rank:
        raise UserError(
            f"recipe {recipe.name}: lora.rank={recipe.lora.rank} trains adapters on weights that stay as they are; "
            "give them as train.init_from=DIRECTORY",
            2,
        )
    if recipe.lora.init_from:
        from llama import hf

        hf.adapter_reader(recipe.lora.init_from, recipe)
    if recipe.log.mlflow:
        from llama.train.mlflow_run import tracking_uri

        tracking_uri(recipe.log.mlflow)
    folder = Path(recipe.folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(
            f"run folder {folder} cannot be made: {existing} is not writable; choose another run_dir=...", 2
        )


def start(processes: int, module: str, arguments: list[str]) -> None:
    """Run a module in `processes` processes under torchrun's own agent, on this machine alone."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"herd-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode < 0:
            raise UserError(f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}") from None
        sys.exit(first.exitcode)  # it has said why
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))


def work(recipe: Recipe, body: Callable[[Recipe, StopRequest | None], object] | None = None) -> None:
    """This process's part of the run: join the others, train, leave."""
    from llama.train.watchdog import Watchdog

    with ExitStack() as joining:
        if "HERD_RUN" in os.environ and "RANK" in os.environ:  # in a job, also a rank that never arrives is told
            world, limits = int(os.environ["WORLD_SIZE"]), recipe.resilience
            run, attempt = RunFolder(Path(os.environ["HERD_RUN"])), int(os.environ["HERD_ATTEMPT"])
            timeout = limits.first_step_timeout if limits.hang_timeout else 0.0
            joining.enter_context(Watchdog(run, attempt, int(os.environ["RANK"]), ("",) * world, timeout))
        join(recipe)
    if body is not None:
        body(recipe, listening)
    else:
        from llama.train.loop import train

        train(recipe, listening)
    import torch.distributed as dist

    dist.destroy_process_group()


def join(recipe: Recipe) -> None:
    """Meet the other ranks."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from llama.device import local_rank

    device = found_device()
    limits = recipe.resilience
    # Longer than the watchdog waits, which knows more than that a collective took too long.
    patience = timedelta(seconds=max(limits.hang_timeout, limits.first_step_timeout, 1800) + 120)
    if "RANK" in os.environ:
        dist.init_process_group(device.communication, timeout=patience)
    else:
        dist.init_process_group(device.communication, store=dist.HashStore(), rank=0, world_size=1)
    if device.type != "cpu":  # only now: Trainium's runtime must not be touched before there is a process group
        torch.get_device_module(device.type).set_device(local_rank())
    dist.barrier()


listening: StopRequest | None = None
"""Hears signals from the start of a process that torchrun started, long before training does."""


def main(command: click.Command = command) -> None:
    """What torchrun starts: like the command, but of an error that many ranks meet only the first is printed.

    Each rank that fails leaves in the run folder why, for whoever decides what comes next (launch/job.py).
    """
    global listening
    from llama.train.signals import StopRequest

    listening = StopRequest.of_job().__enter__()
    listening.working = False
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        order = failing_order()
        first = order == 1 or (order == 0 and os.environ.get("RANK", "0") == "0")
        text, code = explain(error)
        leave_word(error, text, order)
        if text is not None:
            if first:
                click.echo(f"herd: {text}", err=True)
        elif first or not joined():  # else it is most likely a peer's end that this rank ran into
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)  # without waiting for threads or peers: torchrun ends those


def explain(error: Exception) -> tuple[str | None, int]:
    """What a person can do about an error, and the exit code; None where only a traceback helps."""
    if isinstance(error, UserError):
        return str(error), error.code
    if ends_as(error) == "memory":
        remedy = "lower train.micro_batch_size or use train.activation_checkpointing=full"
        return f"rank {os.environ.get('RANK', '0')} ran out of memory: {remedy} ({str(error).splitlines()[0]})", 1
    if ends_as(error) == "peer":
        return f"rank {os.environ.get('RANK', '0')} lost another rank: {str(error).strip().splitlines()[0]}", 1
    if ends_as(error) == "user" and isinstance(error, OSError):
        return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}", 1
    return None, 1


def ends_as(error: Exception) -> Kind:
    """The kind of end that an error is."""
    if isinstance(error, UserError):
        return "node" if getattr(error, "nodes", ()) else "user"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return "user"
    return "peer" if lost_peer(error) else "error"


def leave_word(error: Exception, text: str | None, order: int) -> None:
    """Write down why this rank ends, in the run folder."""
    opening = sys.modules.get("llama.train.opening")
    place = opening.current if opening is not None else None
    if place is None and "HERD_RUN" in os.environ:
        place = RunFolder(Path(os.environ["HERD_RUN"])), int(os.environ.get("HERD_ATTEMPT", "1"))
    if place is None:
        return
    run, attempt = place
    nodes = tuple(getattr(error, "nodes", ()))
    words = text or f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
    rank = int(os.environ.get("RANK", "0"))
    run.leave_word(attempt, LastWords(ends_as(error), words, rank, nodes=nodes, order=order))
    if order == 1 and ends_as(error) != "peer":
        with contextlib.suppress(OSError):
            run.record("end", attempt, outcome="failed", reason=words)


def joined() -> bool:
    """Whether this process has met the others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def failing_order() -> int:
    """1 for the first rank to fail, 2 for the next; 0 where ranks have not met, or cannot speak to each other now."""
    if not joined():
        return 0
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        return int(dist.distributed_c10d._get_default_store().add("herd/errors", 1))
    return 0


if __name__ == "__main__":
    main()
