"""Asked to stop: SIGTERM, SIGINT and SIGUSR1 become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While active, a signal asks the run to finish its step, save and end; a third SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.interrupts = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOPS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: installed from outside Python, which can not be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 2:  # Ctrl-C arrives twice: from the terminal, and passed on by torchrun
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @property
    def received(self) -> bool:
        return self.name is not None
