"""`herd resume RUN [--nodes 8]`: submit a run again as it was submitted, on another number of nodes if asked."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from data_prep.errors import UserError
from launch.standing import find, judge, look
from launch.submit import Wanted, gathered, go, sbatch_options
from llama.run_folder import RunFolder, read_json


def wanted(run: RunFolder, nodes: int | None, overrides: tuple[str, ...], options: tuple[str, ...]) -> Wanted:
    """What was submitted, from job.json, with changes. UserError when no job ever ran in this folder."""
    job = read_json(run.job)
    if not job.get("recipe") or not job.get("submit_dir"):
        raise UserError(
            f"{run.path}: no Slurm job ran here, so there is nothing to submit again; "
            f"herd submit {run.recipe} --nodes {nodes or 1} run_dir={run.path} does",
            2,
        )
    folder = Path(job["submit_dir"])
    if not folder.is_dir():
        raise UserError(f"{run.path}: the folder where it was submitted, {folder}, is gone; use herd submit", 2)
    kept = [("partition", job.get("partition")), ("account", job.get("account")), ("qos", job.get("qos"))]
    kept.append(("time", _limit(job)))
    if name := job.get("name"):
        kept.append(("job-name", name))
    given = {word.split("=")[0].lstrip("-") for word in options}
    moved = "partition" in given
    more = tuple(
        f"--{key}={value}" for key, value in kept if value and key not in given and not (moved and key == "qos")
    )
    same = {} if moved else {"HERD_NODE_TYPE": job.get("node_type"), "HERD_RANKS_PER_NODE": job.get("ranks_per_node")}
    environment = {key: str(value) for key, value in same.items() if value}
    changes = (*job.get("overrides", ()), *overrides)
    return Wanted(
        job["recipe"],
        changes,
        nodes or len(job.get("nodes", ())) or 1,
        ("run",),
        folder,
        (*more, *options),
        environment,
    )


def _limit(job: dict[str, Any]) -> str | None:
    """The time limit that the job had, in minutes as sbatch takes them; None: unknown or none."""
    try:
        seconds = float(job["ends"]) - datetime.fromisoformat(job["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None
    return str(-(-int(seconds) // 60)) if 0 < seconds < 365 * 86400 else None


@click.command(short_help="Submit a run again, on another number of nodes if asked.")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", "-N", type=click.IntRange(1), help="Nodes of the job; as many as before when not given.")
@sbatch_options
def command(run: str, overrides: tuple[str, ...], nodes: int | None, dry_run: bool, **options: Any) -> None:
    """Submit RUN (a run folder, or its name under runs/) again: it goes on from its newest checkpoint.

    Recipe, overrides, partition, time limit and kind of node are those of its last job, changed by what is given here.

    \b
    herd resume runs/llama2_7b_gpu
    herd resume llama2_7b_gpu --nodes 8 train.steps=20000
    """
    folder = find(run)
    facts = look(folder)
    state = judge(facts, time.time())
    if state.active:
        raise UserError(f"{folder.path} is at work ({state.text}); herd stop {folder.path} first", 2)
    wish = wanted(folder, nodes, overrides, gathered(options))
    if options["node_type"]:
        wish = Wanted(**vars(wish) | {"environment": {"HERD_NODE_TYPE": options["node_type"]}})
    click.echo(f"goes on from step {folder.newest_step()} ({state.text})", err=True)
    go(wish, dry_run, folder)
