"""The first rank's record of a run, for people and programs that look at it from outside: events and newest figures."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from llama.run_folder import RunFolder, now, write_json

PAUSE = 2.0
"""Seconds between two writings of status.json."""


class Journal:
    """Writes on one rank, elsewhere nothing. A disk that is full never ends a run here: its checkpoint will say so."""

    def __init__(self, run: RunFolder, attempt: int, writes: bool):
        self.run, self.attempt, self.writes = run, attempt, writes
        self.written = 0.0
        self.validation_loss: float | None = None
        self.figures: dict[str, Any] = {}

    def event(self, event: str, **facts: Any) -> None:
        """Add an event, such as save or skip, to events.jsonl."""
        if self.writes:
            with contextlib.suppress(OSError):
                self.run.record(event, self.attempt, **facts)

    def samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Add what the model wrote to samples.jsonl."""
        if self.writes:
            lines = (
                json.dumps({"step": step, "attempt": self.attempt, **s}, ensure_ascii=False) + "\n" for s in samples
            )
            with contextlib.suppress(OSError), self.run.samples.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def status(self, last: bool = False, **figures: Any) -> None:
        """Replace the newest figures; not more often than every PAUSE seconds but for the last."""
        self.figures = figures
        if self.writes and (last or time.monotonic() - self.written > PAUSE):
            self.written = time.monotonic()
            facts = {"time": now(), "epoch": time.time(), "attempt": self.attempt, **figures}
            with contextlib.suppress(OSError):
                write_json(self.run.status, facts | {"validation_loss": self.validation_loss}, sync=False)

    def validated(self, loss: float) -> None:
        """Put a validation's loss among the newest figures; the last one comes after the last step."""
        self.validation_loss = loss
        if self.figures:
            self.status(last=True, **self.figures)
