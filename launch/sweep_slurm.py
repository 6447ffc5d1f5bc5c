"""A sweep as one Slurm array: a task for each point that is not finished, and the table once they have ended.

What a task trains stands in the sweep's folder, a line a point; slurm/sweep.slurm reads its own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import UserError
from launch import slurm, submit
from launch.sweep_run import Planned, command_of
from launch.sweep_table import DONE, state_of
from llama.run_folder import RunFolder

POINTS = "points"
"""In a sweep's folder: the `herd train` of each point, a line each; a task's number is that of its line, from 0."""
SHARED = ("partition", "account", "qos", "time")
"""Options of sbatch that the table's job takes from the points'."""


@dataclass(frozen=True)
class Array:
    """What a person asked for."""

    folder: Path
    nodes: int
    """Of each point."""
    at_once: int | None
    """Points that may run at the same time; None: all."""
    options: tuple[str, ...]
    """Of sbatch, as it takes them."""
    environment: dict[str, str]
    again: tuple[str, ...]
    """Words after `herd sweep --table` that make this sweep's table."""

    def command(self, numbers: Sequence[int]) -> list[str]:
        """The sbatch command for the points of these numbers."""
        limit = f"%{self.at_once}" if self.at_once else ""
        return [
            "sbatch", "--parsable", f"--array={ranges(numbers)}{limit}", f"--nodes={self.nodes}",
            f"--job-name={self.folder.name}", f"--comment={comment(self.folder)}", *self.options, script("sweep"),
            str(self.folder / POINTS),
        ]  # fmt: skip

    def table_command(self, after: str) -> list[str]:
        """The sbatch command for the table, once the array `after` has ended, however it did."""
        mine = [word for word in self.options if word.partition("=")[0].lstrip("-") in SHARED]
        return [
            "sbatch", "--parsable", f"--dependency=afterany:{after}", f"--job-name={self.folder.name}-table", *mine,
            script("sweep_table"), *self.again,
        ]  # fmt: skip


def script(name: str) -> str:
    """A script of slurm/, as it is seen from here."""
    path = submit.SCRIPTS / f"{name}.slurm"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def comment(folder: Path) -> str:
    """What Slurm writes beside the array, by which its tasks are found."""
    return f"herd sweep {folder.absolute()}"


def ranges(numbers: Sequence[int]) -> str:
    """0-2,5 of 0, 1, 2, 5: sbatch takes no list of any length."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def read_lines(folder: Path) -> list[str]:
    """The commands of a sweep's folder; none before the first array."""
    try:
        return (folder / POINTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def write_lines(folder: Path, lines: Sequence[str]) -> None:
    """The file of points, whole or not at all."""
    aside = folder / f".{POINTS}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / POINTS)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another --name") from None


def queued(folder: Path, lines: Sequence[str]) -> dict[str, str]:
    """The task that waits or runs for each run folder, by the last word of its line."""
    found = {}
    for job in slurm.queue("--array", f"--user={os.geteuid()}"):
        number = job.task.rpartition("_")[2]
        if job.live and job.comment == comment(folder) and number.isdigit() and int(number) < len(lines):
            found[shlex.split(lines[int(number)])[-1].partition("=")[2]] = job.task
    return found


def queue(
    planned: Sequence[Planned], recipe: str, array: Array, say: Callable[[str], None], dry_run: bool
) -> dict[str, str]:
    """Submit what is neither finished nor in the queue. Returns why points are not queued, by their names."""
    failed: dict[str, str] = {}
    lines = read_lines(array.folder)
    at_work = queued(array.folder, lines)
    chosen: dict[str, int] = {}
    for item in planned:
        name = item.point.name
        if item.recipe is None:
            failed[name] = item.refusal
            say(f"{name}: refused: {item.refusal}")
            continue
        run = RunFolder(Path(item.recipe.folder))
        if state_of(run, item.recipe) == DONE:
            say(f"{name}: finished already")
            continue
        if str(run.path) in at_work:
            say(f"{name}: in the queue already, task {at_work[str(run.path)]}")
            continue
        overrides = (*item.point.overrides, f"run_dir={run.path}")
        wanted = submit.Wanted(recipe, overrides, array.nodes, options=array.options, environment=array.environment)
        line = shlex.join(command_of(item, recipe, None))
        try:
            if "\n" in line:
                raise UserError("a value with a line break cannot be queued; put it into the recipe", 2)
            submit.check(replace(wanted, chain=("run",)))
        except UserError as error:
            failed[name] = str(error)
            say(f"{name}: not queued: {error}")
            continue
        # Lines stay where they are: a task that waits reads its own when it starts.
        if line not in lines:
            lines.append(line)
        chosen[name] = lines.index(line)
    if chosen:
        _submit(array, lines, chosen, say, dry_run)
    return failed


def _submit(
    array: Array, lines: Sequence[str], chosen: dict[str, int], say: Callable[[str], None], dry_run: bool
) -> None:
    """The array and the table's job."""
    numbers = list(chosen.values())
    command = array.command(numbers)
    if dry_run:
        for name, number in chosen.items():
            say(f"# {number}: {name}: {lines[number]}")
        say(slurm.shown(command, array.environment))
        say(slurm.shown(array.table_command("ARRAY"), array.environment))
        return
    write_lines(array.folder, lines)
    job = slurm.submit(command, array.environment, Path.cwd())
    for name, number in chosen.items():
        say(f"{name}: task {job}_{number}")
    table = array.folder / "table.md"
    try:
        after = slurm.submit(array.table_command(job), array.environment, Path.cwd())
    except UserError as error:
        say(f"array {job} is queued, its table is not ({error}); herd sweep ... --table makes it")
        return
    limit = f", {array.at_once} at once" if array.at_once else ""
    many = "1 point" if len(chosen) == 1 else f"{len(chosen)} points"
    say(f"array {job}: {many}{limit}; job {after} then writes {table}")
