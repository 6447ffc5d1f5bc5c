"""`herd compile RECIPE [key=value ...]`: compiles what `herd train` with the same words will run, and keeps only that."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError
from launch import train as launched

if TYPE_CHECKING:
    from llama.config import Recipe
    from llama.train.graphs import Count, Graphs
    from llama.train.signals import StopRequest

STEPS = 4
"""The first compiles; by the last every buffer has been used again."""
GRACE = 5.0
"""Seconds in which ranks fail alike; one that waits in a collective for one that failed does not."""


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--processes", "-n", type=click.IntRange(1), help="Processes on this machine; one a GPU, or 1, when not given."
)
def command(recipe: str, overrides: tuple[str, ...], processes: int | None) -> None:
    """Compile RECIPE's graphs ahead of its run: give it what `herd train` will be given.

    Takes four real steps and, where the recipe validates, one batch of validation, on the real layout. Keeps the graphs
    for all nodes and later jobs in HERD_CACHE, and nothing else: no checkpoint, no run folder.

    \b
    herd compile tiny_cpu --processes 2 train.compile=true
    torchrun --nproc-per-node 8 -m launch.compile llama3.1_8b_gpu
    """
    from llama import recipe as recipes

    resolved = recipes.load(recipe, overrides)
    if not resolved.train.compile:
        if os.environ.get("RANK", "0") == "0":
            click.echo("Total graphs: 0 / compiled: 0 / cached: 0 / failed: 0")
            click.echo("herd: this recipe compiles nothing (train.compile=false)")
        return
    launched.launch(ahead(resolved), [recipe, *overrides], processes, "launch.compile", compile_graphs)


def ahead(recipe: Recipe) -> Recipe:
    """The recipe with what no graph depends on reduced to what compiling takes."""
    from llama.compile_manifest import cache_folder
    from llama.config import Validation

    validates = recipe.validation.interval > 0
    changes = {
        "train": {"steps": STEPS, "epochs": None, "init_from": None},
        "validation": Validation(interval=STEPS if validates else 0, batches=1).model_dump(),
        "checkpoint": {"interval": 0, "at_end": False, "keep_best": False},
        "log": {"interval": 1, "tensorboard": False},
        "data": {"order_samples": None},
    }
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update={**sections, "run_dir": str(cache_folder() / "compiling")})


def compile_graphs(recipe: Recipe, stop: StopRequest | None = None) -> None:
    """This rank's part, when all ranks have met. Raises UserError when a graph fails."""
    import torch.distributed as dist

    from llama import recipe as recipes
    from llama.device import find_device
    from llama.train import opening
    from llama.train.graphs import Graphs, is_compile_error, reason
    from llama.train.loop import train

    started, speaks = time.monotonic(), dist.get_rank() == 0
    recipe = recipe.model_copy(update={"run_dir": throw_away(recipe)})
    device = find_device()
    recipes.check_device(recipe, device)
    graphs = Graphs(recipe, device, recipes.lay_out(recipe, dist.get_world_size()))
    verdict = graphs.load()
    if speaks:
        click.echo(f"compile cache {verdict}")
    try:
        outcome = train(recipe, stop, graphs)
        count, seconds = graphs.count(), time.monotonic() - started
        if outcome.stopped_by:
            raise UserError(f"compiling was stopped by {outcome.stopped_by}; nothing is kept, the same command does it")
        trouble = graphs.save(seconds)
    except Exception as error:
        if not is_compile_error(error):
            raise
        if os.environ.get("TORCHDYNAMO_VERBOSE") == "1":
            traceback.print_exc()
        graphs.failed += 1
        tell_failure(graphs)
        raise UserError(
            f"a graph of {recipe.name} cannot be compiled: {reason(error)}; TORCHDYNAMO_VERBOSE=1 shows where, "
            "train.compile=false trains without"
        ) from error
    finally:
        opening.current = None  # last words would make the folder anew
        if speaks:
            shutil.rmtree(recipe.run_dir, ignore_errors=True)
    if speaks:
        click.echo(str(count))
        click.echo(f"herd: compiled ahead in {seconds:.1f} s; graphs are in {graphs.folder}")
    if trouble:
        raise UserError(trouble)


def throw_away(recipe: Recipe) -> str:
    """A run folder for these few steps, which all nodes see; the first rank makes it."""
    import torch.distributed as dist

    told, where = ["", ""], Path(recipe.run_dir)
    if dist.get_rank() == 0:
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            told[0] = tempfile.mkdtemp(prefix=f"{where.name}-", dir=where.parent)
        except OSError as error:
            told[1] = f"compile cache {where.parent} cannot be written: {error.strerror or error}; set HERD_CACHE"
    dist.broadcast_object_list(told, src=0)
    if told[1]:
        raise UserError(told[1])
    return told[0]


def tell_failure(graphs: Graphs) -> None:
    """The line of counts, by the first rank to fail: those that wait for it in a collective cannot count with it."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    own = graphs.own_count()
    order = store.add("herd/graphs/failures", 1)
    store.set(f"herd/graphs/failure/{order}", ",".join(map(str, own.numbers())))
    with contextlib.suppress(Exception):
        if order > 1:
            store.wait(["herd/graphs/said"], timedelta(seconds=2 * GRACE))  # the error's own line comes after
            return
        deadline = time.monotonic() + GRACE
        while store.add("herd/graphs/failures", 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.1)
        click.echo(str(failures(store)))
        store.set("herd/graphs/said", "1")


def failures(store: object) -> Count:
    """What the ranks that failed have counted."""
    from llama.train.graphs import Count

    total = Count()
    for order in range(1, int(store.add("herd/graphs/failures", 0)) + 1):  # type: ignore[attr-defined]
        value = store.get(f"herd/graphs/failure/{order}").decode()  # type: ignore[attr-defined]
        total += Count(*map(int, value.split(",")))
    return total


def main() -> None:
    """What torchrun starts."""
    launched.main(command)


if __name__ == "__main__":
    main()
