"""`herd tail RUN`: what a node of a run prints, from one attempt into the next, until the run ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from data_prep.errors import UserError
from launch.standing import State, find, judge, look
from llama.run_folder import RunFolder, read_json

PAUSE = 0.3
"""Seconds between two looks at a log."""
ASK = 5.0
"""Seconds between two questions whether the run has ended: each costs Slurm's controller something."""


def log_of(run: RunFolder, attempt: int, node: str | None) -> Path | None:
    """The log of a node, named or counted, in an attempt; the first node's when None. None: it is not there (yet).

    Raises UserError when the attempt has logs, but none of that node.
    """
    logs = {path.stem: path for path in run.attempt(attempt).glob("*.log")}
    if not logs:
        return None
    starts = [e for e in run.history() if e["event"] == "start" and e.get("attempt") == attempt]
    known = (starts[-1].get("nodes") if starts else None) or read_json(run.job).get("nodes") or []
    order = [*dict.fromkeys(name for name in known if name in logs), *sorted(set(logs) - set(known))]
    if node is None:
        return logs[order[0]]
    if node in logs:
        return logs[node]
    if node.isdigit() and int(node) < len(order):
        return logs[order[int(node)]]
    numbered = ", ".join(f"{i} {name}" for i, name in enumerate(order[:16]))
    raise UserError(f"--node {node}: attempt {attempt} has logs of {numbered}{', ...' if len(order) > 16 else ''}", 2)


def last_lines(path: Path, count: int) -> tuple[bytes, int]:
    """The last lines of a file, and where it ends."""
    with path.open("rb") as file:
        size = end = file.seek(0, 2)
        data = b""
        while end > 0 and data.count(b"\n") <= count:
            start = max(0, end - 65536)
            file.seek(start)
            data, end = file.read(end - start) + data, start
    lines = data.splitlines(keepends=True)
    return b"".join(lines[-count:] if count else []), size


@dataclass
class Tail:
    """Reads on where it stopped, and goes to the next attempt's file when there is one."""

    run: RunFolder
    node: str | None
    attempt: int | None
    """Stay with this one; None: the newest."""
    lines: int
    out: IO[bytes]
    head: Callable[[str], None]
    shown: Path | None = None
    place: int = 0

    def look(self) -> bool:
        """Show what is new; whether there was any."""
        new = self._read()
        attempts = [self.attempt] if self.attempt else self.run.attempts()[-1:]
        path = log_of(self.run, attempts[0], self.node) if attempts else None
        if path is None or path == self.shown:
            return new
        self.head(f"==> attempt {attempts[0]}, {path.stem} <==")
        first, self.shown = self.shown is None, path
        if first:
            data, self.place = last_lines(path, self.lines)
            self.out.write(data)
            self.out.flush()
        else:
            self.place = 0
            self._read()
        return True

    def _read(self) -> bool:
        if self.shown is None:
            return False
        with self.shown.open("rb") as file:
            if file.seek(0, 2) < self.place:
                self.place = 0  # written anew
            file.seek(self.place)
            data = file.read()
        self.place += len(data)
        self.out.write(data)
        self.out.flush()
        return bool(data)


def follow(tail: Tail, state: Callable[[], State]) -> State:
    """Show what comes until the run has ended; its state then."""
    told = ""
    while True:
        known, asked = state(), time.monotonic()
        if not known.active:
            time.sleep(PAUSE)  # the last lines may still be on their way through the file server
            tail.look()
            return known
        while time.monotonic() - asked < ASK:
            tail.look()
            if tail.shown is None and known.text != told:
                tail.head(known.text)
                told = known.text
            time.sleep(PAUSE)


@click.command(short_help="Follow what a node of a run prints.")
@click.argument("run")
@click.option("--node", help="Its name, or its number from 0. [default: the first]")
@click.option("--attempt", type=click.IntRange(1), help="[default: the newest]")
@click.option("--lines", "-n", type=click.IntRange(0), default=40, show_default=True, help="Lines to begin with.")
@click.option("--follow/--no-follow", "-f", "following", default=None, help="Show what comes. [default: on a terminal]")
def command(run: str, node: str | None, attempt: int | None, lines: int, following: bool | None) -> None:
    """What the nodes of RUN (a run folder, or its name under runs/) print; ends when the run ends.

    \b
    herd tail runs/llama2_7b_gpu
    herd tail llama2_7b_gpu --node 3 --attempt 2 --no-follow
    """
    folder = find(run)
    if attempt is not None and attempt not in folder.attempts():
        known = ", ".join(map(str, folder.attempts())) or "none"
        raise UserError(f"{folder.path} has no logs of attempt {attempt}; there are {known}", 2)
    tail = Tail(folder, node, attempt, lines, sys.stdout.buffer, lambda text: click.echo(text, err=True))
    sys.stdout.flush()
    if following or (following is None and sys.stdout.isatty()):
        try:
            state = follow(tail, lambda: judge(look(folder), time.time()))
        except KeyboardInterrupt:
            return
        if tail.shown is not None:
            click.echo(f"==> {state.text} <==", err=True)
            return
    else:
        tail.look()
    if tail.shown is None:
        log = read_json(folder.job).get("log")
        hint = f"; the job's own log is {log}" if log else "; local runs print on their terminal"
        raise UserError(f"{folder.path} has no logs of nodes yet ({judge(look(folder), time.time()).text}){hint}", 1)
