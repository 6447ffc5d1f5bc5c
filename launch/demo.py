"""`make demo`: from text that Python carries to a trained Llama and a sample of it, by the commands a person types.

`python -m launch.demo [--to runs/demo] [--fresh]`. Each part is a `herd` command, shown before it runs. demo.json says
which are done: they are not done again unless --fresh, or something before them was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.errors import UserError
from launch.plot import LOSS, VALIDATION, read_scalars
from llama import recipe as recipes
from llama.config import Recipe

RECIPE, PROCESSES, MEGABYTES = "demo", 2, 1.8
PROMPT = "The import statement"
STATE = "demo.json"


@dataclass(frozen=True)
class Part:
    """One command of the demo and what it makes."""

    name: str
    title: str
    command: list[str]
    """What follows `herd`."""
    makes: tuple[Path, ...]
    """The last of them is there only when the part is done."""


def plan(to: Path, recipe: Recipe) -> list[Part]:
    """The parts, in order."""
    data, run, model, curves = to / "data", to / "run", to / "model", to / "curves.png"
    text, tokenizer, tokens = data / "text.jsonl", data / "tokenizer.model", data / "text"
    last = run / "checkpoints" / f"step-{recipe.train.steps:08d}"
    text_command = ["prep", "demo-text", str(data), "--megabytes", str(MEGABYTES)]
    text_command += ["--vocab-size", str(recipe.model.vocab_size)]
    tokens_command = ["prep", "tokenize", str(text), "--tokenizer", str(tokenizer), "--output", str(tokens)]
    train_command = ["train", RECIPE, "--processes", str(PROCESSES), f"data.train={tokens}", f"run_dir={run}"]
    sample_command = ["generate", str(model), PROMPT, "--max-tokens", "100", "--temperature", "0.5", "--top-p", "0.9"]
    return [
        Part("text", "Text and its tokenizer", text_command, (text, tokenizer)),
        Part("tokens", "Token file", [*tokens_command, "--overwrite"], (data / "text.bin", data / "text.idx")),
        Part("train", f"Training on {PROCESSES} processes", train_command, (run, last)),
        Part("plot", "Loss curve", ["plot", str(run), "--to", str(curves)], (curves,)),
        Part("export", "Hugging Face checkpoint", ["export", str(run), "--to", str(model), "--overwrite"], (model,)),
        Part("generate", "Sample", sample_command, (to / "sample.txt",)),
    ]


class Demo:
    """Runs the parts that are not done yet and remembers them in demo.json."""

    def __init__(self, to: Path, console: Console):
        self.to, self.console, self.recipe = to, console, recipes.load(RECIPE)
        self.parts = plan(to, self.recipe)
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = 0
        self.done: dict[str, Any] = {}

    def prepare(self, fresh: bool) -> None:
        """Make the folder, or read what is done in it; UserError when it holds something else."""
        state = self.to / STATE
        try:
            if self.to.exists() and not state.is_file() and (not self.to.is_dir() or any(self.to.iterdir())):
                raise UserError(f"{self.to}: holds something else than the demo; choose another folder with --to", 2)
            self.to.mkdir(parents=True, exist_ok=True)
            if fresh:
                for part in self.parts:
                    remove(part)
            elif state.is_file():
                self.done = json.loads(state.read_text())
            self.remember()
        except OSError as error:
            raise UserError(f"{self.to}: cannot be written: {error.strerror}; choose another folder, --to") from error
        except ValueError:
            raise UserError(f"{state}: is damaged; --fresh starts again") from None

    def remember(self) -> None:
        """Write demo.json, whole or not at all."""
        aside = self.to / (STATE + ".tmp")
        aside.write_text(json.dumps(self.done, indent=1) + "\n")
        aside.replace(self.to / STATE)

    def key(self, part: Part) -> str:
        """Changes when the part would make something else: by its command, or by the recipe."""
        return hashlib.sha256(json.dumps([part.command, recipes.dump(self.recipe)]).encode()).hexdigest()[:16]

    def run(self) -> None:
        """Every part that is not done; raises SystemExit with the code of a part that fails."""
        again = False
        for number, part in enumerate(self.parts, 1):
            self.console.print(f"\n[bold]{number}/{len(self.parts)} {part.title}[/bold]")
            known, key = self.done.get(part.name, {}), self.key(part)
            same = not again and known.get("key") == key
            if same and known["complete"] and all(path.exists() for path in part.makes):
                self.console.print(f"done before, in {known['seconds']:.1f} s; --fresh does it again", style="dim")
                self.show(part)
                continue
            if again or (known and not same):
                remove(part)  # of other inputs or settings
            spent = known["seconds"] if same and not known["complete"] else 0.0  # an interrupted training goes on
            started = time.monotonic()
            code = self.call(part)
            seconds = spent + time.monotonic() - started
            complete = code == 0 and all(path.exists() for path in part.makes)
            self.done[part.name] = {"key": key, "seconds": round(seconds, 1), "complete": complete}
            self.remember()
            if self.stopped:
                self.console.print("\nstopped; the same command goes on from here")
                raise SystemExit(128 + self.stopped)
            if not complete:
                self.console.print(f"\n{shell(part.command)}\nfailed with exit code {code}", style="red")
                raise SystemExit(code or 1)
            self.show(part)
            again = True

    def call(self, part: Part) -> int:
        """Run a part's command, shown as a person types it; its exit code."""
        self.console.print(f"$ {escape(shell(part.command))}", style="cyan", soft_wrap=True, highlight=False)
        threads = str(max(1, (os.cpu_count() or 1) // PROCESSES))
        command = [sys.executable, "-m", "launch.cli", *part.command]
        sample = part.makes[0] if part.name == "generate" else None
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(sample.open("w")) if sample else None
            self.child = subprocess.Popen(command, stdout=out, env={"OMP_NUM_THREADS": threads, **os.environ})
        return self.child.wait()

    def show(self, part: Part) -> None:
        """The sample, whose command writes to a file."""
        if part.name == "generate":
            self.console.print(part.makes[0].read_text(), markup=False, highlight=False, end="")

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Wait for the command to end well: Ctrl-C has reached it too, anything else is passed on."""
        self.stopped = number
        if number != signal.SIGINT and self.child is not None:
            self.child.send_signal(number)


def shell(command: list[str]) -> str:
    """A command as a person types it."""
    return f"herd {shlex.join(command)}"


def remove(part: Part) -> None:
    """What the part made."""
    for path in part.makes:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def size(path: Path) -> str:
    """Of a file or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    return f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total / 1e3:,.1f} kB"


def summary(demo: Demo) -> Table:
    """What was made, how large it is, how long it took, and how training went."""
    table = Table(title="What the demo made", title_justify="left", title_style="bold")
    table.add_column("part")
    table.add_column("where", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("time", justify="right")
    for part in demo.parts:
        for path in part.makes if part.name == "text" else part.makes[:1]:
            first = path == part.makes[0]
            took = f"{demo.done[part.name]['seconds']:.1f} s" if first else ""
            table.add_row(part.title if first else "", str(path), size(path), took)
    run = demo.parts[2].makes[0]
    table.add_row("TensorBoard", str(run / "tensorboard"), size(run / "tensorboard"))
    table.add_section()
    curves, sequence = read_scalars(run), demo.recipe.data.seq_length
    loss, validation = curves[LOSS], curves.get(VALIDATION)
    table.add_row("training loss", f"{loss.values[0]:.2f} -> {loss.values[-1]:.2f} in {loss.steps[-1]} steps")
    if validation is not None:
        table.add_row("validation loss", f"{validation.values[0]:.2f} -> {validation.values[-1]:.2f}")
    speed = statistics.median(curves["throughput"].values) * sequence
    table.add_row("speed", f"{speed:,.0f} tokens/s, median")
    total = sum(part["seconds"] for part in demo.done.values())
    table.add_row("all parts", "", "", f"{total:.0f} s")
    return table


def next_commands(demo: Demo) -> list[tuple[str, str]]:
    """(command, what it shows)."""
    to, run, tensor = demo.to, demo.to / "run", demo.to / "tp2"
    train = [*demo.parts[2].command[:-1], f"run_dir={tensor}", "parallel.tensor_parallel=2", "train.steps=50"]
    return [
        (f"tensorboard --logdir {shlex.quote(str(to))}", "the curves, live"),
        (f"herd generate {shlex.quote(str(to / 'model'))} 'A class is' --temperature 0.8", "another sample"),
        (
            f"{shell(train)} && {shell(['plot', str(run), str(tensor), '--to', str(to / 'two.png')])}",
            "the same model cut over both processes, and both curves in one picture",
        ),
    ]


@click.command()
@click.option(
    "--to", default="runs/demo", show_default=True, type=click.Path(path_type=Path),
    help="Folder that everything is written to.",
)  # fmt: skip
@click.option("--fresh", is_flag=True, help="Do everything again.")
def command(to: Path, fresh: bool) -> None:
    """Train a small Llama on Python's own documentation, from text to a sample, with the commands you would type.

    \b
    python -m launch.demo --to runs/demo
    """
    console = Console(soft_wrap=False)
    demo = Demo(to, console)
    demo.prepare(fresh)
    before = {number: signal.signal(number, demo.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        demo.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print()
    console.print(summary(demo))
    console.print("\n[bold]Next[/bold]")
    if shutil.which("herd") is None:
        console.print(f"source {Path(sys.prefix) / 'bin' / 'activate'}", style="cyan", soft_wrap=True)
    for text, shows in next_commands(demo):
        console.print(f"# {shows}", style="dim", highlight=False)
        console.print(escape(text), style="cyan", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the demo; a UserError becomes one line and its exit code."""
    try:
        command(standalone_mode=True)
    except UserError as error:
        click.echo(f"demo: {error}", err=True)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
