"""`herd sweep RECIPE KEY=V1,V2`: a run for each combination, and the table that compares them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from data_prep.errors import UserError
from launch.submit import gathered, sbatch_options
from launch.sweep_grid import points, read


class _Words(click.Command):
    """Keeps what stands behind -- apart, where click would mix it with the arguments before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.obj = tuple(args[at + 1 :])
        return super().parse_args(ctx, args[:at])


@click.command(cls=_Words, short_help="Runs over a grid of values, and their comparison.")
@click.argument("recipe")
@click.argument("words", nargs=-1, metavar="[KEY=V1,V2 | KEY=VALUE]... [-- KEY=VALUE...]")
@click.option("--name", help="Folder of the sweep in runs/, or a path. [default: RECIPE-sweep]")
@click.option("--processes", "-n", type=click.IntRange(1), help="Of each run; as herd train has it when not given.")
@click.option("--random", "sample", type=click.IntRange(1), help="Train so many points of the grid, drawn by --seed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--table", "only_table", is_flag=True, help="Train nothing: compare what there is.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON, and nothing else.")
@click.option(
    "--slurm", "on_slurm", is_flag=True, help="As a Slurm array, a task for each point, and a job for the table."
)
@click.option("--nodes", "-N", type=click.IntRange(1), default=1, show_default=True, help="Nodes of each task.")
@click.option("--at-once", type=click.IntRange(1), help="Tasks that may run at the same time; all when not given.")
@sbatch_options
@click.pass_context
def command(
    ctx: click.Context,
    recipe: str,
    words: tuple[str, ...],
    name: str | None,
    processes: int | None,
    sample: int | None,
    seed: int,
    only_table: bool,
    as_json: bool,
    on_slurm: bool,
    nodes: int,
    at_once: int | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train RECIPE once for each combination of the values given with commas, and compare the runs.

    A list that is itself a value stands in brackets: lora.targets=[q,v],all-linear are two values; null is written null.
    Behind -- stand overrides for all points whose commas are their own: -- data.split=95,5,0
    A point is a run in runs/NAME/POINT. The same command goes on where it ended: finished points are skipped. A point
    that fails is told and the others go on; exit code 1 then. The table is in table.md and table.json beside the runs.
    With --slurm points are tasks of one array, points that are not finished are submitted again by the same command, and
    a job that waits for the array writes the table.

    \b
    herd sweep smollm2_chat lora.r=8,16 lora.targets=attention,all-linear data.train=alpaca.json \\
        train.init_from=SmolLM2-135M --processes 2
    herd sweep smollm2_chat lora.rank=4,8,16,32 lora.quantize=null,nf4 optimizer.lr=1e-5,1e-4 --random 6 --slurm
    herd sweep smollm2_chat lora.r=8,16 lora.targets=attention,all-linear --table
    """
    from launch import sweep_run, sweep_slurm, sweep_table

    axes, fixed = read(words, ctx.obj)
    if any(key in ("run_dir", "name") for key in (word.partition("=")[0] for word in (*words, *fixed))):
        raise UserError("run_dir and name are the sweep's own; --name names its folder in runs/", 2)
    if recipe.endswith(".sh"):
        raise UserError(f"{recipe}: a sweep takes a YAML recipe or a name in configs/", 2)
    title = name or f"{Path(recipe).name.removesuffix('.yaml')}-sweep"
    folder = Path(title) if "/" in title else Path("runs") / title
    chosen = points(axes, fixed, sample, seed)
    planned = sweep_run.plan(recipe, chosen, folder)
    failed: dict[str, str] = {}
    say = (lambda text: click.echo(text, err=True)) if as_json else click.echo
    if not only_table:
        grid = " × ".join(str(len(axis.values)) for axis in axes)
        say(f"{title}: {len(chosen)} points of {grid}, in {folder}")
        if dry_run and not on_slurm:
            for item in planned:
                say(item.refusal or shlex.join(sweep_run.command_of(item, recipe, processes)))
            return
        if on_slurm:
            kind = {"HERD_NODE_TYPE": options["node_type"]} if options["node_type"] else {}
            same = [recipe, *words, "--name", name or title, *(["--random", sample, "--seed", seed] if sample else [])]
            again = (*map(str, same), *(["--", *ctx.obj] if ctx.obj else []))
            array = sweep_slurm.Array(folder, nodes, at_once, gathered(options), kind, again)
            failed = sweep_slurm.queue(planned, recipe, array, say, dry_run)
            if failed:
                raise UserError(f"{len(failed)} of {len(planned)} points are not queued")
            return
        failed = sweep_run.train(planned, recipe, processes, say)
    rows = [sweep_table.row(item.point.name, dict(item.point.chosen), item.recipe) for item in planned if item.recipe]
    rows, by = sweep_table.order(rows)
    best = next(item for item in planned if item.point.name == rows[0].name)
    assert best.recipe is not None
    if all(row.state == "not begun" for row in rows):
        raise UserError(f"{folder}: no point has begun; leave --table out to train them", 2)
    text = sweep_table.write(folder, title, rows, by, sweep_table.take(rows[0], best.recipe))
    click.echo((folder / "table.json").read_text() if as_json else text, nl=False)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(planned)} points failed: {'; '.join(failed)}; the same command tries again"
        )
