"""Trains a sweep's points on this machine, one after another, each by a `herd train` of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from launch.sweep_grid import Point
from launch.sweep_table import DONE, state_of
from llama.run_folder import RunFolder, read_json

if TYPE_CHECKING:
    from llama.config import Recipe

ROOT = Path(__file__).resolve().parent.parent
LOG = "sweep.log"
"""In a point's folder: what its `herd train` printed."""
FREE = (
    "name",
    "run_dir",
    "log.",
    "checkpoint.",
    "resilience.",
    "train.steps",
    "train.epochs",
    "validation.",
    "data.prefetch",
)
"""Keys, or beginnings of keys, in which a point that goes on may differ from its first part."""


@dataclass(frozen=True)
class Planned:
    """A point with its recipe; or, instead of that, why there can be none."""

    point: Point
    recipe: Recipe | None
    refusal: str = ""


def plan(name: str, points: Sequence[Point], folder: Path) -> list[Planned]:
    """The recipe of each point. Raises UserError when no point has one, or a point's folder is of another recipe."""
    from llama import recipe as recipes

    found = []
    for point in points:
        try:
            recipe = recipes.load(name, [*point.overrides, f"run_dir={folder / point.name}"])
        except UserError as error:
            found.append(Planned(point, None, str(error)))
            continue
        check_same(recipe)
        found.append(Planned(point, recipe))
    if all(planned.recipe is None for planned in found):
        raise UserError(found[0].refusal, 2)
    return found


def check_same(recipe: Recipe) -> None:
    """Refuse a run folder whose run was made of something else: its figures would be compared as if they were this one's."""
    from llama import recipe as recipes

    file = RunFolder(Path(recipe.folder)).recipe
    if not file.is_file():
        return
    old, new = (flat(r.model_dump(mode="json")) for r in (recipes.load(str(file)), recipe))
    other = [key for key in new if not key.startswith(FREE) and old.get(key) != new[key]]
    if other:
        raise UserError(
            f"{recipe.folder} was trained with {other[0]}={old.get(other[0])}, not {new[other[0]]}; choose another --name, "
            "or remove that folder",
            2,
        )


def flat(keys: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys as a.b."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


class Forward:
    """While active, signals that ask this process to stop are passed on to the training that it waits for."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.heard: int | None = None

    def __enter__(self) -> Forward:
        self.before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
        if self.child is not None:
            self.child.send_signal(number)


def train(planned: Sequence[Planned], name: str, processes: int | None, say: Callable[[str], None]) -> dict[str, str]:
    """Train what is not finished. Returns why points have no result, by their names.

    Ends the process with 128 + signal when it was asked to stop, once the point at work has saved.
    """
    failed: dict[str, str] = {}
    with Forward() as forward:
        for number, item in enumerate(planned, 1):
            place = f"{number}/{len(planned)} {item.point.name}"
            if item.recipe is None:
                failed[item.point.name] = item.refusal
                say(f"{place}: refused: {item.refusal}")
                continue
            run = RunFolder(Path(item.recipe.folder))
            state = state_of(run, item.recipe)
            if state == DONE:
                say(f"{place}: finished already")
                continue
            say(f"{place}: training, {state}; log in {run.path / LOG}")
            began = time.monotonic()
            code = _train(item, name, processes, forward, place)
            state = state_of(run, item.recipe)
            say(f"{place}: {_outcome(run, state)}, {time.monotonic() - began:.0f} s")
            if forward.heard:
                say("stopped; the same command goes on from here")
                sys.exit(128 + forward.heard)
            if code or state != DONE:
                failed[item.point.name] = _why(run, code)
                say(f"{place}: failed: {failed[item.point.name]}; going on with the others")
    return failed


def command_of(item: Planned, name: str, processes: int | None) -> list[str]:
    """The `herd train` of a point."""
    assert item.recipe is not None
    words = ["herd", "train", name, *item.point.overrides, f"run_dir={item.recipe.folder}"]
    return [*words, "--processes", str(processes)] if processes else words


def _train(item: Planned, name: str, processes: int | None, forward: Forward, place: str) -> int:
    """One `herd train`, its words in the point's log; its exit code."""
    assert item.recipe is not None
    run = RunFolder(Path(item.recipe.folder))
    command = [sys.executable, "-m", "launch.cli", *command_of(item, name, processes)[1:]]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        log = (run.path / LOG).open("ab")
    except OSError as error:
        raise UserError(f"{run.path}: cannot be written: {error.strerror}; choose another --folder") from None
    with log:
        forward.child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C comes once, from here
        )  # fmt: skip
        if forward.heard:  # between two points
            forward.child.send_signal(forward.heard)
        try:
            _watch(forward.child, run, place)
        finally:
            child, forward.child = forward.child, None
    return child.returncode


def _watch(child: subprocess.Popen[bytes], run: RunFolder, place: str) -> None:
    """Until the process has ended, on a terminal with its newest step."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        child.wait()
        return
    with console.status(place) as shown:
        while True:
            try:
                child.wait(1)
                return
            except subprocess.TimeoutExpired:
                now = read_json(run.status)
                if now:
                    shown.update(f"{place}: step {now.get('step')}/{now.get('steps')}, loss {now.get('loss', 0):.4f}")


def _outcome(run: RunFolder, state: str) -> str:
    losses = [event["loss"] for event in run.history() if event["event"] == "validation"]
    if losses:
        return f"{state}, validation loss {losses[-1]:.4f}"
    loss = read_json(run.status).get("loss")
    return f"{state}, loss {loss:.4f}" if isinstance(loss, float) else state


def _why(run: RunFolder, code: int) -> str:
    """The reason that its `herd train` gave, or the last line it printed."""
    try:
        lines = (run.path / LOG).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line.removeprefix("herd: ") for line in lines if line.startswith("herd: ")]
    return (said or [line for line in lines if line.strip()] or [f"exit code {code}"])[-1]
