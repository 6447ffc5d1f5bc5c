"""`herd plan RECIPE --nodes 4 --node-type trn2.48xlarge`: does it fit and how long does it take, before anything is queued."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama.config import Recipe
    from llama.plan.counts import Counts
    from llama.plan.estimate import Estimate, Place
    from llama.plan.speed import Rates
    from llama.plan.suggest import Suggestion


@click.command(
    epilog="Example: herd plan llama3.1_8b_trn2 --nodes 4 --node-type trn2.48xlarge; herd plan tiny_cpu --processes 2"
)
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", "-N", type=click.IntRange(1), default=1, show_default=True, help="Nodes.")
@click.option(
    "--node-type", help="trn2.48xlarge, 8xh100, p5.48xlarge ..., or cpu: this machine, once it is calibrated."
)
@click.option("--processes", "-n", type=click.IntRange(1), help="Ranks on a node, when not all of its devices.")
@click.option("--mfu", type=click.FloatRange(0.01, 1), help="Share of the peak that matrix products reach; assumed.")
@click.option(
    "--suggest", "search", is_flag=True, help="Search layouts, checkpointing and micro-batches; the best five."
)
@click.option("--dry-run/--formulas", "dry", default=True, help="Count by running the real code dry, or by formulas.")
@click.option("--calibrate", is_flag=True, help="Measure this machine first, a minute or two, and keep what it gives.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw memory, time and the pipeline to this file.")
@click.option("--json", "as_json", is_flag=True, help="Everything that was found, for a script.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    nodes: int,
    node_type: str | None,
    processes: int | None,
    mfu: float | None,
    search: bool,
    dry: bool,
    calibrate: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Whether RECIPE is valid on nodes of a type, fits their memory, and how long it takes; nothing is queued or trained.

    What a rank computes, sends and holds is counted by running the training step's real code without tensors, on as many
    ranks as there would be. How fast nodes are is published or, with --calibrate, measured. Exit code 0: it fits;
    1: it does not; 2: the recipe is not valid there.
    """
    from launch.plan_words import as_data, estimate_in_words, suggestion_in_words
    from llama.plan.estimate import estimate

    if picture is not None:
        from launch.plot import check_ending

        check_ending(picture)
    kind = node_type or os.environ.get("HERD_NODE_TYPE") or "cpu"
    if calibrate:
        _calibrate(kind, processes or 1)
        if recipe is None:
            return
    if recipe is None:
        raise click.UsageError("RECIPE is missing: a file or a name in configs/ (herd plan --calibrate takes none)")
    resolved = load(recipe, overrides, kind)
    place, rates = place_of(kind, nodes, processes, mfu)
    found: Suggestion | None = None
    if search:
        from llama.plan.suggest import suggest

        with _progress("searching") as beat:
            found = suggest(resolved, place, rates, beat=beat)
    own, warnings = None, list[str]()
    if found is None or found.own is not None:
        warnings = check(resolved, place)
        counts = _counted(resolved, place) if dry else []
        own = estimate(resolved, place, rates, counts)
    if as_json:
        click.echo(json.dumps(as_data(own, rates, found) | {"warnings": warnings}, indent=2))
    else:
        lines = [] if own is None else estimate_in_words(own, rates, dry)
        lines += [f"warning     {warning}" for warning in warnings]
        lines += [] if found is None else suggestion_in_words(found, own is not None)
        for line in lines:
            click.echo(line)
    if picture is not None:
        from launch.plan_picture import draw

        draw(own, found, picture)
        click.echo(f"drawn in {picture}", err=as_json)
    if not _useful(own, found):
        sys.exit(1)


def _useful(own: Estimate | None, found: Suggestion | None) -> bool:
    return bool(found.best) if found is not None else own is not None and own.fits


def load(recipe: str, overrides: tuple[str, ...], kind: str) -> Recipe:
    """The recipe, also of a shell file that names one for this kind of node."""
    from llama import recipe as recipes

    arguments = [recipe, *overrides]
    if recipe.endswith(".sh"):
        from launch.submit import ask_shell

        if not Path(recipe).is_file():
            raise UserError(f"no recipe {recipe} here", 2)
        arguments = ask_shell(recipe, overrides, kind)
    return recipes.load(arguments[0], arguments[1:])


def place_of(kind: str, nodes: int, processes: int | None, mfu: float | None) -> tuple[Place, Rates]:
    """The nodes and how fast they are. Raises UserError for a type that nobody knows and a CPU that nobody measured."""
    from dataclasses import replace

    from llama.plan.estimate import Place
    from llama.plan.nodes import node_type
    from llama.plan.speed import rates_of

    if kind == "cpu":
        from llama.plan.calibrate import load_rates, this_node

        if mfu is not None:
            raise UserError("--mfu is of a published peak, and a CPU has none; herd plan --calibrate measures it", 2)
        ranks = processes or 1
        return Place(this_node(ranks), nodes), load_rates(ranks)
    try:
        node = node_type(kind)
    except ValueError as error:
        raise UserError(f"--node-type: {error}", 2) from None
    if processes is not None:
        node = replace(node, ranks=processes)
    return Place(node, nodes), rates_of(node, mfu)


def check(recipe: Recipe, place: Place) -> list[str]:
    """Refuse what does not divide and what the device cannot do; what is merely doubtful, in words. Raises UserError."""
    from llama import capabilities
    from llama import recipe as recipes

    recipes.lay_out(recipe, place.world)
    return capabilities.check(recipe, capabilities.kind(place.node.device))


def _counted(recipe: Recipe, place: Place) -> list[Counts]:
    from llama.config import ZERO_BUBBLE
    from llama.device import find_device
    from llama.plan.analytic import representatives
    from llama.plan.dry import count_ranks

    schedule = recipe.parallel.pipeline_schedule
    if recipe.parallel.pipeline_parallel > 1 and schedule in ZERO_BUBBLE and not find_device("cpu").zero_bubble:
        raise UserError(
            f"parallel.pipeline_schedule={schedule}: this machine's torch is older than 2.13 and cannot run it dry; "
            "--formulas plans without running",
            1,
        )
    return count_ranks(recipe, place.world, representatives(recipe, place.world), place.node.device)


def _calibrate(kind: str, processes: int) -> None:
    """Measure this machine with so many processes at work."""
    from llama.plan.calibrate import calibrate, save_rates

    if kind != "cpu":
        raise UserError("--calibrate measures this machine; on a node of the cluster call it there, in a job", 2)
    if (busy := os.getloadavg()[0]) > 0.5:
        click.echo(
            f"warning: {busy:.1f} processes were at work here in the last minute; rates measured beside others are too low, "
            "several times so with one process: measure again when it is quiet",
            err=True,
        )
    click.echo(f"measuring this machine with {processes} process{'es' * (processes > 1)} for about a minute", err=True)
    rates = calibrate(processes)
    click.echo(f"kept in {save_rates(rates)}", err=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing in a log: a search takes seconds."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what)
        yield lambda done, of: bar.update(task, completed=done, total=of)
