"""Where a run's figures go. What goes wrong in a sink is told once and never ends the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

Ended = Literal["finished", "stopped", "failed"]
Say = Callable[[str], None]


class Sink(Protocol):
    """Takes figures, on the first rank."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of one step."""

    def text(self, step: int, tag: str, text: str) -> None:
        """A text of one step, such as what the model answers."""

    def flush(self) -> None:
        """Have what was taken on disk, where that is quick."""

    def close(self, ended: Ended) -> None:
        """Nothing comes any more."""


class TensorBoard:
    """Event files in the run's folder. A disk that is full ends them, not the run: its next checkpoint will."""

    def __init__(self, folder: Path, first_step: int, say: Say):
        from torch.utils.tensorboard import SummaryWriter

        # Points after the step resumed from belong to a part that was lost: this hides them. Step 0 is a validation's
        # before a fresh run, which an attempt that saved nothing may have made too.
        self.board: Any = SummaryWriter(str(folder), purge_step=first_step and first_step + 1, flush_secs=10)
        self.say = say

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()])

    def text(self, step: int, tag: str, text: str) -> None:
        self._write(lambda board: board.add_text(tag, text, step))

    def flush(self) -> None:
        self._write(lambda board: board.flush())

    def close(self, ended: Ended) -> None:
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()

    def _write(self, what: Callable[[Any], object]) -> None:
        if self.board is None:
            return
        try:
            what(self.board)
        except OSError as error:
            self.board = None
            self.say(f"warning: TensorBoard's events can no longer be written: {error.strerror or error}")
