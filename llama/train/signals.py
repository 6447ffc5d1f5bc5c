"""Asked to stop: a signal, a file left by the job script, or the job's time that runs out become one flag for the loop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ASKED = "stop-asked"
"""In an attempt's folder: the job script was told to stop, perhaps before the processes could hear a signal."""


class StopRequest:
    """While active, a signal asks the run to finish its step, save and end; a third SIGINT interrupts at once."""

    def __init__(self, ends: float | None = None) -> None:
        self.name: str | None = None
        self.ends = ends
        """When the job's time is over (seconds since the epoch); None: never, or unknown."""
        self.working = True
        """False while a process is still starting: SIGTERM then ends it at once, for there is nothing to save."""
        self.interrupts = 0
        self._before: dict[int, object] = {}

    @classmethod
    def of_job(cls) -> StopRequest:
        """With the end of the Slurm job's time, as slurm/job.sh gives it."""
        ends = os.environ.get("HERD_JOB_ENDS", "")
        return cls(float(ends) if ends else None)

    def __enter__(self) -> StopRequest:
        for number in STOPS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: installed from outside Python, which can not be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and not self.working:
            os._exit(128 + number)  # peers of a rank that died wait in vain for it, and Slurm for them
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 2:  # Ctrl-C arrives twice: from the terminal, and passed on by torchrun
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def look(self, attempt_folder: Path) -> None:
        """Hear a request that was made before this process could take signals."""
        if self.name is None and (attempt_folder / ASKED).exists():
            self.name = "SIGUSR1"

    def wanted(self, needed: float) -> bool:
        """Whether to stop now: asked to, or the `needed` seconds of the next step and save are not left."""
        if self.name is None and self.ends is not None and time.time() + needed > self.ends:
            self.name = "time limit"
        return self.received

    @property
    def received(self) -> bool:
        return self.name is not None
