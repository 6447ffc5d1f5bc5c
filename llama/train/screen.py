"""What a person sees of a run: on a terminal a bar with the newest step under the lines that stay, in a log plain lines."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINES = 20
"""Steps of the whole run that leave a line on a terminal, where the bar shows the rest."""


class Screen:
    """Prints on the rank that `speaks`; elsewhere silent."""

    def __init__(self, speaks: bool, first_step: int, steps: int):
        self.speaks, self.steps = speaks, steps
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if speaks and sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(highlight=False, soft_wrap=True),
                refresh_per_second=4,
            )
            self.task = self.bar.add_task("", total=steps, completed=first_step)
            self.bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False)
        elif self.speaks:
            print(text, flush=True)

    def step(self, step: int, figures: str, left: str) -> None:
        """The newest step."""
        if self.bar is None:
            self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  {figures}  left {left}")
            return
        self.bar.update(self.task, completed=step, description=figures)
        if step % max(1, self.steps // LINES) == 0:
            self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  {figures}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
        sys.stdout.flush()
