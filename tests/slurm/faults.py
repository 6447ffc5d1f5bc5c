"""A run on the lab that is disturbed in every way a cluster knows, and what is left of it in the end.

tests/slurm/test_lifecycle.py and benchmarks/soak.py use it: the same faults, by name or drawn by a seed.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.run_folder import RunFolder, complete, read_json

STEP = re.compile(r"step +(\d+)/\d+  loss (\S+)")
RANK = r"-u -m launch\.train "

RECIPE = """
name: soak
model: {vocab_size: 512, hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 4}
data: {train: corpus, seq_length: 64}
train: {steps: 100, global_batch_size: 8, micro_batch_size: 4, precision: fp32}
optimizer: {lr: 3.0e-3}
schedule: {warmup_steps: 5}
checkpoint: {interval: 5, keep_last: 3}
resilience: {hang_timeout: 6, first_step_timeout: 60, stop_margin: 5, fruitless_attempts: 30}
"""


def final_files(folder: Path) -> dict[str, Any]:
    """Size and checksum of every file of the newest checkpoint: equal for equal weights and moments on one layout."""
    manifest = read_json(complete(folder)[-1] / "herd.json")
    return {name: sums for name, sums in manifest["files"].items() if name != ".metadata"} | {
        "state": manifest["state"]
    }


@dataclass
class Hit:
    """One fault that was made."""

    fault: str
    attempt: int
    step: int
    """Newest step when it was made."""
    made: float
    """Moment of it."""
    seconds: float = 0.0
    """Until the next step was done."""
    redone: int = 0
    """Steps that had to be done again."""


@dataclass
class Disturbed:
    """A run of run.slurm in `folder`, as its user and the cluster's bad days see it."""

    lab: Any
    folder: Path
    words: Sequence[str]
    """Behind `sbatch --nodes N SCRIPT`: the recipe and overrides."""
    environment: dict[str, str]
    script: Path
    nodes: int = 2
    run_dir: str = "runs/soak"
    options: Sequence[str] = ()
    """More words for sbatch."""
    job: int = 0
    hits: list[Hit] = field(default_factory=list)

    @property
    def run(self) -> RunFolder:
        folder = self.folder / self.run_dir
        return RunFolder(self.lab.outside(folder) if folder.is_relative_to(self.lab.folder / "disks") else folder)

    def submit(self) -> Disturbed:
        """sbatch."""
        command = ["sbatch", "--nodes", self.nodes, *self.options, self.script, *self.words, f"run_dir={self.run_dir}"]
        self.job = self.lab.submit(*command, cwd=self.folder, **self.environment)
        return self

    def log(self) -> str:
        """The job's log so far."""
        path = self.folder / f"{self.script.name}-{self.job}.log"
        return path.read_text() if path.exists() else "no log was written"

    def steps(self) -> list[tuple[int, int]]:
        """(attempt, step) of all steps that were shown, in order."""
        found = []
        for attempt in self.run.attempts():
            for path in sorted(self.run.attempt(attempt).glob("*.log")):
                found += [(attempt, int(match[1])) for match in STEP.finditer(path.read_text())]
        return found

    def newest(self) -> tuple[int, int]:
        """Newest attempt and its newest step; (0, 0) before the first."""
        return max(self.steps(), default=(0, 0))

    def until(self, true: Callable[[], Any], seconds: float = 60.0, ended: bool = False) -> None:
        """Wait for something; fail with the log when it takes too long or, unless `ended`, the job is over."""
        deadline = time.monotonic() + seconds
        while not true():
            over = not ended and self.lab.state(self.job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            if over and true():
                return
            assert not over, f"the job is {self.lab.state(self.job)}\n{self.log()}"
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.lab.logs()}\n{self.log()}"
            time.sleep(0.1)

    def trains(self, more: int = 1, attempt: int = 0) -> None:
        """Wait until an attempt after `attempt` has done so many steps."""

        def there() -> bool:
            newest = self.newest()[0]
            return newest > attempt and sum(a == newest for a, _ in self.steps()) >= more

        self.until(there, 90)

    def ends(self, seconds: float = 120.0) -> str:
        """Wait until the job is over; Slurm's word for how."""
        return str(self.lab.wait(self.job, seconds))

    def rank_of(self, node: str) -> int:
        """The process that trains on a node."""
        self.until(lambda: self.lab.pids(node, RANK))
        return int(self.lab.pids(node, RANK)[0])

    def strike(self, fault: str, draw: random.Random) -> Hit:
        """Make a fault, somewhere on the run's nodes."""
        self.mend()
        hosts = self.lab.wait_running(self.job)
        hit = Hit(fault, max(self.run.attempts()), self.newest()[1], time.monotonic())
        self.hits.append(hit)
        FAULTS[fault](self, draw.choice(hosts), draw)
        return hit

    def begins(self) -> None:
        """Wait until the attempt after the last fault has all its ranks, though they may still be starting."""
        last = self.hits[-1].attempt

        def there() -> bool:
            if max(self.run.attempts()) == last:
                return False
            return all(self.lab.pids(node, RANK) for node in self.lab.wait_running(self.job))

        self.until(there, 90)

    def recovers(self) -> None:
        """Wait until training goes on after the last fault; note what the faults since the last time have cost."""
        waiting = [hit for hit in self.hits if not hit.seconds]
        if not waiting:
            return
        last = waiting[-1]
        self.trains(1, last.attempt - (last.fault == "pause"))
        first = min(step for attempt, step in self.steps() if attempt == self.newest()[0])
        for hit in waiting:
            hit.seconds = time.monotonic() - hit.made
        done = max((step for attempt, step in self.steps() if attempt <= last.attempt), default=0)
        last.redone = max(0, done + 1 - first) if last.fault != "pause" else 0
        self.mend()

    def mend(self) -> None:
        """All nodes work, so that the next fault meets a whole cluster."""
        for number in range(self.lab.nodes):
            node = f"node{number + 1}"
            if not self.lab.alive(node):
                self.lab.start(node)
            elif any(hit.fault == "down" for hit in self.hits[-2:]):
                with contextlib.suppress(AssertionError):  # it is not down
                    self.lab.resume(node)


def _kill_rank(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.signal(node, run.rank_of(node), signal.SIGKILL)


def _hang(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.signal(node, run.rank_of(node), signal.SIGSTOP)


def _pause(run: Disturbed, node: str, draw: random.Random) -> None:
    rank = run.rank_of(node)
    run.lab.signal(node, rank, signal.SIGSTOP)
    time.sleep(1.0)
    run.lab.signal(node, rank, signal.SIGCONT)


def _drain(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.run("scancel", "--batch", "--signal=USR1", run.job)


def _requeue(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.run("scontrol", "requeue", run.job)


def _cancel(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.run("scancel", run.job)
    assert run.ends() == "CANCELLED"
    run.submit()  # its user, the next morning


def _preempt(run: Disturbed, node: str, draw: random.Random) -> None:
    command = ["sbatch", "--partition=urgent", "--exclusive", f"--nodes={run.lab.nodes}", "--output=/dev/null"]
    other = run.lab.submit(*command, "--wrap=true", cwd=run.folder)
    assert run.lab.wait(other, 60) == "COMPLETED"


def _down(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.down(node)


def _node_killed(run: Disturbed, node: str, draw: random.Random) -> None:
    run.lab.kill(node)


def _corrupt(run: Disturbed, node: str, draw: random.Random) -> None:
    """Damage the newest checkpoint while the run is stopped, then kill it."""
    run.until(lambda: len(complete(run.run.path)) >= 2)
    ranks = [(host, run.rank_of(host)) for host in run.lab.wait_running(run.job)]
    for host, rank in ranks:
        run.lab.signal(host, rank, signal.SIGSTOP)
    newest = complete(run.run.path)[-1]
    victim = draw.choice(sorted(path for path in newest.iterdir() if path.name != "herd.json"))
    data = bytearray(victim.read_bytes())
    kind = draw.choice(["cut", "flip", "gone"])
    if kind == "gone":
        victim.unlink()
    elif kind == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[draw.randrange(len(data))] ^= 0x40
        victim.write_bytes(data)
    for host, rank in ranks:
        run.lab.signal(host, rank, signal.SIGKILL)


FAULTS: dict[str, Callable[[Disturbed, str, random.Random], None]] = {
    "kill": _kill_rank,
    "hang": _hang,
    "pause": _pause,
    "corrupt": _corrupt,
    "drain": _drain,
    "requeue": _requeue,
    "preempt": _preempt,
    "cancel": _cancel,
    "down": _down,
    "node": _node_killed,
}
"""Name of a fault -> what it does to a run, given one of its nodes."""
EARLY = {"kill", "drain", "requeue", "preempt", "cancel", "pause", "node"}
"""What may also meet a run that is still starting."""
CHEAP = ("kill", "kill", "kill", "pause", "pause", "corrupt")
"""What is answered inside the job, drawn more often than what takes Slurm half a minute."""


def draw_faults(draw: random.Random, count: int, spread: bool) -> list[str]:
    """Each fault once, the rest by chance: with `spread` all alike, else mostly what costs seconds; in any order."""
    more = [draw.choice(list(FAULTS) if spread or draw.random() < 0.05 else CHEAP) for _ in range(count)]
    chosen = [*FAULTS, *more][:count]
    draw.shuffle(chosen)
    return chosen


def disturb(run: Disturbed, seed: int, count: int, spread: bool = False) -> Iterator[Hit]:
    """Make so many faults; unless `spread`, many of them while the run is still starting after the one before."""
    draw = random.Random(seed)
    for fault in draw_faults(draw, count, spread):
        early = not spread and run.hits and run.hits[-1].fault != "pause" and fault in EARLY
        if early and draw.random() < 0.6:
            run.begins()
            time.sleep(draw.uniform(0, 3))
        else:
            run.recovers()
            run.trains(draw.randint(2, 9))
        yield run.strike(fault, draw)
    run.recovers()
