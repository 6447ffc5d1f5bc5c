"""MLflow beside TensorBoard. A thread speaks to the server, so that a slow one never slows training.

What the server has not taken yet waits in memory up to a bound; what is beyond it is dropped, counted and told.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from llama.config import Recipe
from llama.run_folder import RunFolder
from llama.train.mlflow_run import SETTINGS, MlflowRun, Point, in_short, tracking_uri, without_password
from llama.train.sinks import Ended, Say

POINTS, TEXTS = 50_000, 1_000
"""How many wait for the server at most."""
BATCH = 1_000
"""Points in one request, as many as MLflow takes."""
PATIENCE = 10.0
"""Seconds that the end of a run waits for the server."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts to reach a server that is away."""


class Mlflow:
    """The sink: what comes is put down and sent by a thread."""

    def __init__(self, recipe: Recipe, run: RunFolder, facts: Mapping[str, str], say: Say):
        """`facts`: tags of where it runs. Raises UserError when MLflow is not installed; a server that is away is told."""
        uri = tracking_uri(recipe.log.mlflow or "")
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self.remote, self.say, self.place = MlflowRun(recipe, run, facts, uri), say, without_password(uri)
        self.points: deque[Point] = deque()
        self.texts: deque[tuple[int, str, str]] = deque()
        self.dropped, self.away = 0, False
        self.wake, self.closed = threading.Condition(), threading.Event()
        self.ended: Ended = "failed"
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        moment = time.time_ns() // 1_000_000
        self._put(self.points, POINTS, [(plain(name), float(value), moment, step) for name, value in values.items()])

    def text(self, step: int, tag: str, text: str) -> None:
        self._put(self.texts, TEXTS, [(step, plain(tag), text)])

    def flush(self) -> None:
        """Nothing: the thread is at it."""

    def close(self, ended: Ended) -> None:
        """Wait PATIENCE seconds for what is not sent yet, and say what was lost."""
        self.ended = ended
        with self.wake:
            self.closed.set()
            self.wake.notify()
        self.thread.join(PATIENCE)
        lost = self.dropped + len(self.points) + len(self.texts)
        if lost or self.thread.is_alive():
            self.say(f"warning: MLflow at {self.place} lacks {lost} figures and texts of this run")

    def _put(self, queue: deque[Any], bound: int, items: list[Any]) -> None:
        with self.wake:
            fits = len(queue) + len(items) <= bound
            if fits:
                queue.extend(items)
            self.wake.notify()
        if not fits:
            if not self.dropped:
                self.say(f"warning: MLflow at {self.place} is too slow; what it has no room for is not sent")
            self.dropped += len(items)

    def _work(self) -> None:
        """The thread: open the run, send what comes, end the run. What fails is tried again, ever less often."""
        pause, last_tries = 1.0, 2
        while last_tries:
            with self.wake:
                self.wake.wait_for(lambda: self.points or self.texts or self.closed.is_set() or not self.remote.id)
            try:
                if not self.remote.id:
                    self.remote.open()
                self._send(self.points, BATCH, self.remote.send)
                self._send(self.texts, 1, lambda texts: self.remote.text(*texts[0]))
                if self.closed.is_set() and not (self.points or self.texts):
                    self.remote.end(self.ended)
                    return
                if self.away:
                    self.say(f"MLflow at {self.place} answers again")
                pause, self.away = 1.0, False
            except Exception as error:  # whatever it is, the run goes on
                if not self.away:
                    self.say(f"warning: MLflow at {self.place}: {in_short(error)}; figures wait, training goes on")
                self.away = True
                last_tries -= self.closed.is_set()
                self.closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _send(self, queue: deque[Any], at_once: int, send: Callable[[list[Any]], None]) -> None:
        while queue:
            with self.wake:
                items = list(islice(queue, at_once))
            try:
                send(items)
            except Exception as error:
                if not refused(error):
                    raise
                if not self.dropped:
                    self.say(f"warning: MLflow at {self.place} refuses figures: {in_short(error)}")
                self.dropped += len(items)
            for _ in items:
                queue.popleft()


def plain(name: str) -> str:
    """A name of the characters that MLflow knows."""
    return re.sub(r"[^\w./: -]", "_", name).strip("/.")


def refused(error: Exception) -> bool:
    """Whether the server would say the same again."""
    code = getattr(error, "get_http_status_code", lambda: 0)()
    return 400 <= code < 500 and code not in (401, 403, 408, 429)
