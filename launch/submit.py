"""`herd submit RECIPE --nodes 4`: sbatch on the scripts of slurm/, after everything that can be checked was checked."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.errors import UserError
from launch import slurm
from launch.standing import judge, look
from llama.run_folder import RunFolder

if TYPE_CHECKING:
    from llama.config import Recipe

SCRIPTS = Path(__file__).resolve().parent.parent / "slurm"
STEPS = ("compile", "run", "export")


@dataclass(frozen=True)
class Wanted:
    """What a person asked for."""

    recipe: str
    """As given: a shell file, a YAML file or a name in configs/."""
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    chain: tuple[str, ...] = ("run",)
    folder: Path = field(default_factory=Path.cwd)
    """Where sbatch is called: relative paths, runs/ and logs are seen from there."""
    options: tuple[str, ...] = ()
    """Of sbatch, as it takes them."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the job needs beside those of the shell."""

    def option(self, *names: str) -> str | None:
        """The value of an option of sbatch; None when it was not given."""
        found = [word.partition("=")[2] for word in self.options if word.split("=")[0].lstrip("-") in names]
        return found[-1] if found else None


@dataclass(frozen=True)
class Plan:
    """A checked wish: what would be submitted."""

    wanted: Wanted
    recipe: Recipe
    run: RunFolder
    layout: str
    node_type: str
    ranks: int

    def command(self, step: str, after: str | None = None, test: bool = False) -> list[str]:
        """The sbatch command of a step, which waits for job `after`."""
        wanted, name = self.wanted, self.recipe.name
        words = ["sbatch", "--test-only" if test else "--parsable"]
        words += ["--nodes", str(1 if step == "export" else wanted.nodes)]
        if wanted.option("job-name", "J") is None:
            words += ["--job-name", name if step == "run" else f"{name}-{step}"]
        if wanted.option("comment") is None:
            words += ["--comment", slurm.comment(step, self.run.path)]
        if after is not None:
            words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        script = SCRIPTS / f"{step}.slurm"
        if script.is_relative_to(wanted.folder):
            script = script.relative_to(wanted.folder)
        arguments = [str(self.run.path)] if step == "export" else [wanted.recipe, *wanted.overrides]
        return [*words, *wanted.options, str(script), *arguments]


def check(wanted: Wanted) -> Plan:
    """Refuse whatever would fail later. UserError, and nothing is in the queue."""
    from launch.train import check_inputs
    from llama import capabilities
    from llama import recipe as recipes

    if "=" in wanted.recipe and not Path(wanted.recipe).exists():
        raise UserError(f"no recipe: {wanted.recipe} is an override; herd submit RECIPE {wanted.recipe} --nodes 4", 2)
    slurm.call(["sbatch", "--version"])
    if not (SCRIPTS / "run.slurm").is_file():
        raise UserError(
            f"no {SCRIPTS}/run.slurm: call herd from a checkout (pip install -e .), jobs run its scripts", 2
        )
    with contextlib.chdir(wanted.folder):
        arguments = [wanted.recipe, *wanted.overrides]
        if not wanted.recipe.endswith(".sh"):
            recipes.load(wanted.recipe, wanted.overrides)  # before the cluster is asked: a slip of the pen is told fast
        elif not Path(wanted.recipe).is_file():
            raise UserError(f"no recipe {wanted.recipe} in {wanted.folder}", 2)
        cluster = _nodes(wanted)
        node_type, ranks = _node_type(wanted, cluster)
        if wanted.recipe.endswith(".sh"):
            arguments = ask_shell(wanted.recipe, wanted.overrides, node_type)
        recipe = recipes.load(arguments[0], arguments[1:])
        for doubt in capabilities.check(recipe, capabilities.kind(node_type)):
            click.echo(f"herd: warning: {doubt}", err=True)
        layout = _lay_out(recipe, wanted.nodes, ranks)
        check_inputs(recipe)
        run = RunFolder(Path(recipe.folder).absolute())
        plan = Plan(wanted, recipe, run, layout, node_type, ranks)
        _check_folder(plan)
    for step in dict.fromkeys("export" if step == "export" else "run" for step in wanted.chain):
        try:
            slurm.call(plan.command(step, test=True), wanted.environment, wanted.folder)
        except UserError as error:
            raise UserError(f"Slurm would refuse this job: {str(error).removeprefix('sbatch: ')}", 2) from None
    return plan


def _nodes(wanted: Wanted) -> list[slurm.Node]:
    """The nodes of the partition; UserError when there are fewer than wanted."""
    partition = wanted.option("partition", "p") or os.environ.get("SBATCH_PARTITION")
    found = slurm.nodes(partition)
    if not found:
        known = ", ".join(slurm.partitions()) or "none"
        what = f"no partition {partition!r}" if partition else "no default partition; name one with --partition"
        raise UserError(f"{what}; the cluster has {known}", 2)
    there = {node.name: node for node in found}
    name = partition or found[0].partition.rstrip("*")
    if wanted.nodes > len(there):
        raise UserError(
            f"--nodes {wanted.nodes}: partition {name} has {len(there)} nodes; sinfo -p {name} lists them", 2
        )
    usable = sum(node.usable for node in there.values())
    if usable < wanted.nodes:
        click.echo(f"herd: only {usable} of {len(there)} nodes of partition {name} are in service now", err=True)
    return list(there.values())


def _node_type(wanted: Wanted, cluster: Sequence[slurm.Node]) -> tuple[str, int]:
    """Kind of the nodes and ranks on each, which slurm/env.sh knows: named by the user, or by the partition's devices."""
    kind = wanted.environment.get("HERD_NODE_TYPE") or os.environ.get("HERD_NODE_TYPE")
    asked = wanted.option("gres") or (f"gpu:{gpus}" if (gpus := wanted.option("gpus-per-node")) else None)
    sorts = {asked} if asked else {node.gres for node in cluster}
    found = {_devices(gres) for gres in sorts}
    if not kind:
        kinds = {name for name, _ in found}
        if len(kinds) > 1:
            raise UserError(
                f"the partition has nodes of several kinds ({', '.join(sorted(kinds))}); name yours with --node-type", 2
            )
        (kind,) = kinds
    given = dict(os.environ) | dict(wanted.environment)
    counts = {count for name, count in found if name == "gpu"}
    if kind == "gpu" and not given.get("HERD_RANKS_PER_NODE"):
        if len(counts) != 1:
            many = f"have {' or '.join(map(str, sorted(counts)))} GPUs" if counts else "name no GPUs in Slurm's gres"
            raise UserError(f"the partition's nodes {many}; say how many ranks a node has: HERD_RANKS_PER_NODE=8", 2)
        given["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(*counts)))  # as a step on such a node would see it
    given |= {"HERD_NODE_TYPE": kind, "HERD_ROOT": str(SCRIPTS.parent), "HERD_PYTHON": sys.executable}
    given.setdefault("HERD_CACHE", str(SCRIPTS.parent / ".cache/compile"))
    facts = 'source "$HERD_ROOT/slurm/env.sh" && echo "herd $HERD_NODE_TYPE $HERD_RANKS_PER_NODE"'
    done = subprocess.run(["bash", "-c", facts], env=given, capture_output=True, text=True, check=False)
    known = re.search(r"^herd (\S+) (\d+)$", done.stdout, re.MULTILINE)
    if not known or int(known[2]) < 1:
        said = done.stderr.strip().removeprefix("herd: ") or f"slurm/env.sh knows no ranks of node type {kind}"
        raise UserError(f"{said.splitlines()[-1]}", 2)
    return known[1], int(known[2])


def _devices(gres: str) -> tuple[str, int]:
    """Node type and number of devices that a gres text stands for."""
    name, count = slurm.devices(gres, "neuron")
    if count:
        return (name if name.startswith("trn") else "trn2"), count
    _, count = slurm.devices(gres, "gpu")
    return ("gpu", count) if count else ("cpu", 0)


def ask_shell(recipe: str, overrides: Sequence[str], node_type: str) -> list[str]:
    """What a recipe that is a shell file calls `herd train` with on a node of this type. UserError when it does not."""
    with tempfile.TemporaryDirectory(prefix="herd-") as folder:
        answer, ear = Path(folder, "answer"), Path(folder, "herd")
        ear.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$HERD_ANSWER"\n')
        ear.chmod(0o700)
        environment = os.environ | {
            "HERD": str(ear), "HERD_ANSWER": str(answer), "HERD_NODE_TYPE": node_type, "HERD_ROOT": str(SCRIPTS.parent),
        }  # fmt: skip
        try:
            done = subprocess.run(
                ["bash", recipe, *overrides], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=60, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(
                f'{recipe}: did not come to `"${{HERD:-herd}}" train ...` in 60 s; a recipe only names what to train', 2
            ) from None
        words = answer.read_text().split("\0")[:-1] if answer.exists() else []
    if done.returncode or len(words) < 2 or words[0] != "train":
        said = done.stderr.strip().splitlines()
        why = f"exit code {done.returncode}: {said[-1]}" if done.returncode and said else "it did not"
        raise UserError(
            f'{recipe}: a shell recipe ends in exec "${{HERD:-herd}}" train RECIPE [KEY=VALUE]... "$@", as slurm/llama_7b.sh '
            f"does; {why}",
            2,
        )
    return words[1:]


def _lay_out(recipe: Recipe, nodes: int, ranks: int) -> str:
    """The layout's name; UserError with the numbers of nodes that would do."""
    from llama.layout import layout

    try:
        return layout(recipe, nodes * ranks).name
    except ValueError as error:
        fits = []
        for number in range(1, max(64, 4 * nodes) + 1):
            with contextlib.suppress(ValueError):
                layout(recipe, number * ranks)
                fits.append(number)
        near = sorted(sorted(fits, key=lambda number: abs(number - nodes))[:4])
        hint = f"--nodes {', '.join(map(str, near))} would fit" if near else "no number of such nodes fits"
        raise UserError(f"recipe {recipe.name} on {nodes} × {ranks} ranks: {error}; {hint}", 2) from None


def _check_folder(plan: Plan) -> None:
    """Refuse a run folder in which another model was trained, or something trains or will."""
    import yaml

    run = plan.run
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        there = yaml.safe_load(run.recipe.read_text(encoding="utf-8")).get("model") or {}
        here: dict[str, Any] = plan.recipe.model_dump(mode="json")["model"]
        other = [f"{key}={there[key]}, not {here[key]}" for key in here if key in there and there[key] != here[key]]
        if other:
            raise UserError(
                f"run folder {run.path} is of another model (model.{'; model.'.join(other[:3])}); choose another run_dir=...",
                2,
            )
    if "run" not in plan.wanted.chain:
        return
    facts = look(run)
    state = judge(facts, time.time())
    if state.active:
        owner = facts.line.id if facts.line and facts.line.live else facts.owner.get("pid")
        what = "job" if facts.line and facts.line.live else "process"
        raise UserError(
            f"run folder {run.path} is taken by {what} {owner} ({state.text}); herd stop {run.path}, or choose another run_dir=...",
            2,
        )


def send(plan: Plan, say: Callable[[str], None]) -> dict[str, str]:
    """Submit the chain; the number of each step's job. Takes back what is queued when a later step is refused."""
    numbers: dict[str, str] = {}
    after = None
    for step in plan.wanted.chain:
        command = plan.command(step, after)
        say(slurm.shown(command, plan.wanted.environment, plan.wanted.folder))
        try:
            after = slurm.submit(command, plan.wanted.environment, plan.wanted.folder)
        except UserError:
            for number in numbers.values():
                slurm.cancel(number)
            raise
        numbers[step] = after
    return numbers


def show(plan: Plan) -> str:
    """The commands that would be run, as text that a shell takes, and the scripts."""
    wanted, lines, after = plan.wanted, [], None
    for step in wanted.chain:
        text = slurm.shown(plan.command(step, "HERD-AFTER" if after else None), wanted.environment, wanted.folder)
        text = text.replace("HERD-AFTER", f"${after}")
        lines.append(f"{step}=$({text})" if len(wanted.chain) > 1 else text)
        after = step
    for step in wanted.chain:
        script = SCRIPTS / f"{step}.slurm"
        lines += ["", f"# {script}", script.read_text().rstrip()]
    return "\n".join(lines)


def go(wanted: Wanted, dry_run: bool, into: RunFolder | None = None) -> None:
    """Check, then show or submit. UserError when the recipe does not lead `into` this run folder."""
    plan = check(wanted)
    if into and plan.run.path.resolve() != into.path.resolve():
        raise UserError(
            f"recipe {wanted.recipe} now trains in {plan.run.path}, not in {into.path}; add run_dir={into.path.absolute()}",
            2,
        )
    layout = f"{wanted.nodes} × {plan.ranks} ranks of {plan.node_type}, layout {plan.layout}"
    click.echo(f"{plan.recipe.name} on {layout}; run folder {plan.run.path}", err=True)
    if dry_run:
        click.echo(show(plan))
        return
    numbers = send(plan, click.echo)
    click.echo("submitted " + ", then ".join(f"{step} as job {number}" for step, number in numbers.items()))
    if "run" in numbers:
        folder = plan.run.path
        shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        click.echo(f"herd status {shown}    herd tail {shown}    herd stop {shown}")


def sbatch_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options of submit and resume that are handed to sbatch."""
    for option in reversed((
        click.option("--partition", "-p", help="Partition; the cluster's default when not given."),
        click.option("--time", "-t", help="Time limit of one start, such as 12:00:00; the run goes on after it."),
        click.option("--account", "-A", help="Account that is charged."),
        click.option("--qos", "-q", help="Quality of service."),
        click.option("--job-name", "-J", help="Name in the queue; the recipe's when not given."),
        click.option("--sbatch-option", multiple=True, metavar="KEY[=VALUE]", help="Any other option of sbatch."),
        click.option("--node-type", help="trn2.48xlarge, gpu, cpu ...; found from the partition's devices when not given."),
        click.option("--dry-run", is_flag=True, help="Check everything, print commands and scripts, queue nothing."),
    )):  # fmt: skip
        function = option(function)
    return function


def gathered(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of `sbatch_options` as sbatch takes them."""
    named = [(key.replace("_", "-"), options[key]) for key in ("partition", "time", "account", "qos", "job_name")]
    words = [f"--{key}={value}" for key, value in named if value]
    for text in options["sbatch_option"]:
        if not re.fullmatch(r"-{0,2}[a-z][a-z-]*(=.*)?", text):
            raise UserError(f"--sbatch-option {text!r} is not KEY=VALUE, such as constraint=h100", 2)
        words.append(f"--{text.lstrip('-')}")
    return tuple(words)


@click.command(short_help="Check a recipe and submit it to Slurm.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", "-N", type=click.IntRange(1), default=1, show_default=True, help="Nodes of the job.")
@click.option(
    "--chain",
    default="run",
    show_default=True,
    metavar="STEP,STEP",
    help="Of compile, run, export: each after the last.",
)
@sbatch_options
def command(recipe: str, overrides: tuple[str, ...], nodes: int, chain: str, dry_run: bool, **options: Any) -> None:
    """Check RECIPE (.sh, .yaml or a name in configs/) with KEY=VALUE overrides and submit it to Slurm.

    Refused before anything is queued: wrong keys, missing data, a layout that does not fit, a run folder that is taken,
    what the cluster does not have.

    \b
    herd submit ./llama_7b.sh --nodes 4 --chain compile,run,export
    herd submit llama3.1_8b_gpu --nodes 8 --time 12:00:00 data.train=/shared/corpus --dry-run
    """
    steps = tuple(chain.replace(" ", "").split(","))
    if not steps or steps != tuple(step for step in STEPS if step in steps):
        raise UserError(f"--chain {chain}: give one or more of {','.join(STEPS)}, in this order", 2)
    kind = {"HERD_NODE_TYPE": options["node_type"]} if options["node_type"] else {}
    go(Wanted(recipe, overrides, nodes, steps, Path.cwd(), gathered(options), kind), dry_run)
