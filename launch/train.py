"""`herd train RECIPE [key=value ...]`: starts the processes it is asked for, and is what torchrun starts on a node."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from llama.config import Recipe
    from llama.device import Device


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

    resolved = recipes.load(recipe, overrides)
    # Trainium's runtime rounds stochastically by itself and reads this when torch is imported, so before that.
    os.environ.setdefault("NEURON_RT_STOCHASTIC_ROUNDING_EN", str(int(resolved.train.precision == "bf16_sr")))
    os.environ.setdefault("NEURON_RT_STOCHASTIC_ROUNDING_SEED", str(resolved.train.seed))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        work(resolved)
        return
    wanted = processes or local_devices()
    recipes.lay_out(resolved, wanted)
    check_inputs(resolved)
    if wanted == 1:
        work(resolved)
    else:
        start(wanted, [recipe, *overrides])


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
    from data_prep.indexed import IndexedDataset

    if not recipe.data.train:
        raise UserError(
            f"recipe {recipe.name}: data.train names no token files; give a prefix made by herd prep tokenize", 2
        )
    for source in (*recipe.data.train, *recipe.data.validation):
        IndexedDataset(source.path)
    if recipe.train.init_from:
        from llama import hf

        hf.checkpoint_reader(recipe.train.init_from, recipe.model)  # reads headers only
    folder = Path(recipe.folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(
            f"run folder {folder} cannot be made: {existing} is not writable; choose another run_dir=...", 2
        )


def start(processes: int, arguments: list[str]) -> None:
    """Run this module in `processes` processes under torchrun's own agent, on this machine alone."""
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
        elastic_launch(config, sys.executable)("-m", "launch.train", *arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode < 0:
            raise UserError(f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}") from None
        sys.exit(first.exitcode)  # it has said why
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))


def work(recipe: Recipe) -> None:
    """This process's part of the run: join the others, train, leave."""
    import torch
    import torch.distributed as dist

    from llama.device import local_rank
    from llama.train.loop import train

    device = found_device()
    if device.type != "cpu":
        torch.get_device_module(device.type).set_device(local_rank())
    if "RANK" in os.environ:
        dist.init_process_group(device.communication)
    else:
        dist.init_process_group(device.communication, store=dist.HashStore(), rank=0, world_size=1)
    train(recipe)
    dist.destroy_process_group()


def main() -> None:
    """What torchrun starts: like the command, but of an error that many ranks meet only the first is printed."""
    try:
        command(standalone_mode=False)
    except UserError as error:
        if first_to_fail():
            click.echo(f"herd: {error}", err=True)
        sys.stderr.flush()
        os._exit(error.code)  # without waiting for threads or peers: torchrun ends those
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception:
        if not joined() or first_to_fail():  # else it is most likely a peer's end that this rank ran into
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def joined() -> bool:
    """Whether this process has met the others."""
    import torch.distributed as dist

    return bool(dist.is_initialized())


def first_to_fail() -> bool:
    """Whether no other rank has reported an error yet; before the ranks are joined the first rank speaks."""
    import torch.distributed as dist

    if not joined():
        return os.environ.get("RANK", "0") == "0"
    store = dist.distributed_c10d._get_default_store()
    return bool(store.add("herd/errors", 1) == 1)


if __name__ == "__main__":
    main()
