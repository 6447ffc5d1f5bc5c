"""`herd parity RECIPE --reference gpu.yaml --candidate trn.yaml`: trains both, and a second seed, then compares them."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.errors import UserError
from launch.compare import check_picture, options_from, rule_options, show, write
from launch.submit import gathered, sbatch_options
from llama.run_folder import RunFolder

if TYPE_CHECKING:
    from launch.submit import Plan
    from llama.config import Recipe

MAY_DIFFER = (
    "name", "run_dir", "parallel", "checkpoint", "resilience", "log", "validation", "optimizer.state_dtype", "data.prefetch",
    "data.tokenizer", "train.precision", "train.micro_batch_size", "train.activation_checkpointing", "train.compile",
    "train.loss_chunk", "train.garbage_collection_steps",
)  # fmt: skip
"""Keys in which the recipes of a pair may differ: what changes where and how it is computed, not what."""


@dataclass(frozen=True)
class Side:
    """One of the runs: what it is called, its recipe, the file and the folder it lies in."""

    name: str
    recipe: Recipe
    file: Path
    seed: bool = False
    """Whether it is a further seed of the reference."""

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.file.parent / self.name)

    @property
    def done(self) -> bool:
        """Whether it was trained to its last step."""
        ends = [event for event in self.run.history() if event["event"] == "end"]
        if not ends or ends[-1].get("outcome") != "finished":
            return False
        return self.recipe.train.epochs is not None or ends[-1].get("step") == self.recipe.train.steps


@click.command(short_help="Train a pair of recipes and compare them.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--reference", required=True, help="Recipe file with the lines of the reference, laid over RECIPE.")
@click.option("--candidate", required=True, help="Recipe file with the lines of the candidate, laid over RECIPE.")
@click.option(
    "--seeds", type=click.IntRange(1), default=2, show_default=True,
    help="Seeds of the reference; from the second on they are its band.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="Of the runs; runs/parity-NAME by default."
)
@click.option(
    "--processes", "-n", default="1", show_default=True, metavar="N[,M]",
    help="Processes on this machine: of the reference, and of the candidate where it needs another number.",
)  # fmt: skip
@click.option(
    "--slurm", is_flag=True, help="Submit the runs and, behind them, the comparison; --nodes and below are for it."
)
@click.option("--nodes", "-N", default="1", show_default=True, metavar="N[,M]", help="Nodes, of either side.")
@click.option(
    "--reference-option", multiple=True, metavar="KEY=VALUE", help="Of sbatch, for the reference: partition=gpu."
)
@click.option(
    "--candidate-option", multiple=True, metavar="KEY=VALUE", help="Of sbatch, for the candidate: partition=trn2."
)
@sbatch_options
@rule_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    reference: str,
    candidate: str,
    seeds: int,
    folder: Path | None,
    processes: str,
    slurm: bool,
    nodes: str,
    reference_option: tuple[str, ...],
    candidate_option: tuple[str, ...],
    dry_run: bool,
    **given: Any,
) -> None:
    """Train RECIPE as the reference says and as the candidate says, from the same weights on the same batches; compare.

    The two files hold what differs: layout, precision, checkpointing. KEY=VALUE overrides go over both. A second seed of
    the reference says how far runs of one recipe lie apart. The same command goes on where it was stopped.
    Exit codes are those of herd compare.

    \b
    herd parity tiny_cpu --reference fp32.yaml --candidate bf16.yaml train.steps=200
    herd parity llama3.1_8b --reference llama3.1_8b_gpu --candidate llama3.1_8b_trn2 --slurm --nodes 4,2 \\
        --reference-option partition=gpu --candidate-option partition=trn2 train.steps=2000
    """
    check_picture(given["to"])
    counts = pair_of(nodes if slurm else processes, "--nodes" if slurm else "--processes")
    sides = lay_out(recipe, overrides, reference, candidate, seeds, folder)
    if slurm:
        options = (*reference_option,), (*candidate_option,)
        submit(sides, counts, options, given, dry_run)
        return
    if dry_run:
        for side in sides:
            click.echo(shlex.join(train_command(side, counts)))
        click.echo(shlex.join(compare_command(sides, given)))
        return
    for side in sides:
        train(side, counts)
    raise SystemExit(judge(sides, given))


def pair_of(text: str, option: str) -> tuple[int, int]:
    """ "4,2" as the numbers of reference and candidate; one number is both."""
    words = text.split(",")
    if len(words) > 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(
            f"{option} {text}: give one number, or two such as 4,2: of the reference and of the candidate", 2
        )
    return int(words[0]), int(words[-1])


def lay_out(
    recipe: str, overrides: Sequence[str], reference: str, candidate: str, seeds: int, folder: Path | None
) -> list[Side]:
    """The runs, their recipes written into the folder. UserError where the pair is none, or the folder is another's."""
    from llama import recipe as recipes

    base = recipes.load(recipe, overrides)
    folder = folder or Path("runs") / f"parity-{base.name}"
    first = _side("reference", base, overrides, reference, folder)
    more = [
        _side(
            f"reference-seed{number}",
            base,
            (*overrides, f"train.seed={base.train.seed + number - 1}"),
            reference,
            folder,
        )
        for number in range(2, seeds + 1)
    ]
    last = _side("candidate", base, overrides, candidate, folder)
    check_pair(first.recipe, last.recipe, reference, candidate)
    sides = [first, *(replace(side, seed=True) for side in more), last]
    for side in sides:
        if side.file.exists() and recipes.load(str(side.file)) != side.recipe and side.run.path.exists():
            raise UserError(
                f"{side.file}: holds another recipe, from which {side.run.path} was trained; choose another --folder, or remove "
                "this one",
                2,
            )
    for side in sides:
        write(side.file, recipes.dump(side.recipe))
    return sides


def _side(name: str, base: Recipe, overrides: Sequence[str], lines: str, folder: Path) -> Side:
    """One run's recipe: RECIPE, the lines of its file over it, the overrides over both."""
    import tempfile

    import yaml

    from llama import recipe as recipes

    path = recipes.find(lines)
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}", 2) from None
    if not isinstance(keys, dict):
        raise UserError(f"{path}: is no mapping of keys such as parallel: and train:", 2)
    keys = {key: value for key, value in keys.items() if key not in ("base", "name", "run_dir")}
    whole = recipes.merge(base.model_dump(mode="json"), keys)
    with tempfile.TemporaryDirectory(prefix="herd-parity-") as aside:
        file = Path(aside) / path.name
        file.write_text(yaml.safe_dump(whole), encoding="utf-8")
        own = [f"name={base.name}-{name}", f"run_dir={folder / name}", "log.tensorboard=true"]
        try:
            recipe = recipes.load(str(file), (*overrides, *own))
        except UserError as error:
            raise UserError(str(error).replace(str(file), str(path)), error.code) from None
    return Side(name, recipe, folder / f"{name}.yaml")


def check_pair(first: Recipe, last: Recipe, reference: str, candidate: str) -> None:
    """Refuse recipes that would not compute the same thing."""
    ours, theirs = (dict(flat(recipe.model_dump(mode="json"))) for recipe in (first, last))
    other = [
        f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not any(key == k or key.startswith(f"{k}.") for k in MAY_DIFFER)
    ]
    if other:
        raise UserError(
            f"{reference} and {candidate} are no pair: {'; '.join(other[:4])}; they may differ in layout, precision and what "
            "else changes no mathematics",
            2,
        )


def flat(keys: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Nested keys as a.b.c."""
    found: list[tuple[str, Any]] = []
    for key, value in keys.items():
        found += flat(value, f"{above}{key}.") if isinstance(value, Mapping) else [(f"{above}{key}", value)]
    return found


def train_command(side: Side, counts: tuple[int, int]) -> list[str]:
    """`herd train` of one run."""
    number = counts[1 if side.name == "candidate" else 0]
    return [sys.executable, "-m", "launch.cli", "train", str(side.file), "--processes", str(number)]


def compare_command(sides: Sequence[Side], given: Mapping[str, Any]) -> list[str]:
    """`herd compare` of all runs, with the rules that were asked for."""
    folder = sides[0].file.parent
    words = [sys.executable, "-m", "launch.cli", "compare"]
    for side in sides[:-1]:
        words += ["--reference", str(side.run.path)]
    words += [str(sides[-1].run.path), "--same-start"]
    names = {"start": "from"}
    for key in rule_keys():
        if given[key] is not None:
            words += [f"--{names.get(key, key).replace('_', '-')}", str(given[key])]
    words += [
        "--to",
        str(given["to"] or folder / "parity.png"),
        "--markdown",
        str(given["markdown"] or folder / "parity.md"),
    ]
    return [*words, *(["--json"] if given["as_json"] else [])]


def rule_keys() -> list[str]:
    """The options of the rules."""
    from dataclasses import fields

    from llama.compare import Options

    return [field.name for field in fields(Options) if field.name != "same_start"]


def train(side: Side, counts: tuple[int, int]) -> None:
    """Train one run in processes of its own, unless it is done. Raises SystemExit with the code of one that fails."""
    if side.done:
        click.echo(f"{side.name}: trained before, in {side.run.path}", err=True)
        return
    click.echo(f"{side.name}: {shlex.join(train_command(side, counts)[1:])}", err=True)
    child = subprocess.Popen(train_command(side, counts), stdout=sys.stderr)  # stdout is for the verdict
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal has told the child as well: it saves and ends
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
        click.echo("stopped; the same command goes on from here", err=True)
        raise SystemExit(130) from None
    if code:
        raise UserError(
            f"{side.name}: training ended with exit code {code}; the same command goes on from its checkpoint", code
        )
    if not side.done:
        click.echo(f"{side.name}: stopped before its last step; the same command goes on from here", err=True)
        raise SystemExit(1)


def judge(sides: Sequence[Side], given: dict[str, Any]) -> int:
    """Compare what was trained, write picture and report; the exit code."""
    from llama.compare import compare, open_run

    runs = [open_run(side.run.path, side.name) for side in sides]
    found = compare(runs[:-1], runs[-1], options_from(given, True))
    folder = sides[0].file.parent
    show(
        [found],
        given | {"to": given["to"] or folder / "parity.png", "markdown": given["markdown"] or folder / "parity.md"},
    )
    return found.exit_code


def submit(
    sides: Sequence[Side],
    counts: tuple[int, int],
    options: tuple[Sequence[str], Sequence[str]],
    given: dict[str, Any],
    dry_run: bool,
) -> None:
    """Submit every run, and behind all of them the comparison; nothing where one of them would be refused."""
    from launch import slurm
    from launch.submit import Wanted, check

    shared = gathered(given)
    kind = {"HERD_NODE_TYPE": given["node_type"]} if given["node_type"] else {}
    plans: list[Plan] = []
    for side in sides:
        place = 1 if side.name == "candidate" else 0
        more = gathered(
            dict.fromkeys(("partition", "time", "account", "qos", "job_name")) | {"sbatch_option": options[place]}
        )
        plans.append(check(Wanted(str(side.file), (), counts[place], ("run",), Path.cwd(), (*shared, *more), kind)))
    numbers: dict[str, str] = {}
    try:
        for side, plan in zip(sides, plans, strict=True):
            words = plan.command("run")
            line = slurm.shown(words, kind)
            if dry_run:
                click.echo(f"{variable(side)}=$({line})")
                numbers[side.name] = f"${variable(side)}"
                continue
            click.echo(line)
            numbers[side.name] = slurm.submit(words, kind, Path.cwd())
        words = job_command(sides, list(numbers.values()), shared, given)
        if dry_run:
            after = ":".join(numbers.values())
            click.echo(slurm.shown(job_command(sides, ["AFTER"], shared, given)).replace("AFTER", after))
            return
        click.echo(slurm.shown(words))
        last = slurm.submit(words, {}, Path.cwd())
    except UserError:
        for number in [] if dry_run else numbers.values():
            slurm.cancel(number)
        raise
    said = ", ".join(f"{name} as job {number}" for name, number in numbers.items())
    folder = sides[0].file.parent
    click.echo(
        f"submitted {said}, then the comparison as job {last}: {folder}/compare-{last}.log, parity.md, parity.png"
    )


def variable(side: Side) -> str:
    """The name of a run's job number in a shell."""
    return side.name.replace("-", "_")


def job_command(
    sides: Sequence[Side], after: Sequence[str], shared: Sequence[str], given: Mapping[str, Any]
) -> list[str]:
    """sbatch of the comparison: one node, when all runs have succeeded."""
    from launch import slurm

    folder, name = sides[0].file.parent, sides[0].recipe.name.removesuffix("-reference")
    kept = [word for word in shared if word.split("=")[0] in ("--account", "--qos", "--partition")]
    return [
        "sbatch", "--parsable", "--nodes", "1", "--job-name", f"{name}-compare",
        "--comment", slurm.comment("compare", folder.absolute()), f"--dependency=afterok:{':'.join(after)}",
        "--kill-on-invalid-dep=yes", f"--output={folder}/compare-%j.log", *kept,
        f"--wrap={shlex.join(compare_command(sides, given))}",
    ]  # fmt: skip
