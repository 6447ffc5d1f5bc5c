"""How a run stands, from its folder and the queue: `judge` alone decides, and is a pure function.

Nothing is asked of the nodes and nothing of sacct, so it also tells of runs whose job is long forgotten.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import click

from data_prep.errors import UserError
from launch import slurm
from llama import run_folder
from llama.run_folder import STALE, LastWords, RunFolder

Word = Literal[
    "waiting", "starting", "training", "silent", "ending", "restarting", "finished", "stopped", "failed", "lost", "unknown"
]  # fmt: skip
ACTIVE: tuple[Word, ...] = ("waiting", "starting", "training", "silent", "ending", "restarting")
"""States that a run leaves by itself; in all others it stays until somebody starts it."""

QUIET = 300.0
"""Seconds without a step or event after which training is called silent; a save or validation may take minutes."""
SLOW_STEPS = 20
"""Or that many of its own steps, where those are long."""

ENDED = {
    "TIMEOUT": "ran into its time limit before it could save",
    "NODE_FAIL": "lost a node",
    "OUT_OF_MEMORY": "ran out of host memory",
    "CANCELLED": "was cancelled",
    "PREEMPTED": "was preempted",
    "BOOT_FAIL": "lost a node at its start",
    "DEADLINE": "did not end before its deadline",
    "FAILED": "failed",
    "COMPLETED": "ended",
    "REVOKED": "was revoked",
}


@dataclass(frozen=True)
class Facts:
    """All that is known of a run from outside."""

    job: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    events: Sequence[dict[str, Any]] = ()
    stop: dict[str, Any] = field(default_factory=dict)
    """stop.json"""
    owner: dict[str, Any] = field(default_factory=dict)
    """Whom lock.json names."""
    beat: float | None = None
    """Seconds since the owner showed that it lives; None: nobody trains here."""
    gone: bool = False
    """The owner was a process of this machine and is no more."""
    line: slurm.Job | None = None
    """The run's newest job in the queue."""
    asked: bool = False
    """Whether Slurm answered, so that a missing line means a job that is gone."""
    words: Sequence[LastWords] = ()
    """Last words of ranks that failed in the newest attempt, the cause first."""

    @property
    def attempt(self) -> int:
        numbers = [self.job.get("attempt"), self.status.get("attempt"), self.owner.get("attempt")]
        return max((n for n in [*numbers, *(event.get("attempt") for event in self.events)] if n), default=0)

    def last(self, *names: str) -> dict[str, Any]:
        """The newest of these events in the newest attempt."""
        found = (e for e in reversed(self.events) if e["event"] in names and e.get("attempt") == self.attempt)
        return next(found, {})

    @property
    def jobs(self) -> set[str]:
        """Numbers of the jobs that began to work here last: by the lock, which is newer where it is there, and job.json."""
        return {str(found["job"]) for found in (self.owner, self.job) if found.get("job")}

    @property
    def local(self) -> bool:
        """Whether the newest attempt runs, or ran, without Slurm."""
        if self.owner and self.beat is not None:
            return not self.owner.get("job")
        newest = self.events[-1] if self.events else self.job
        return not (newest.get("job") or self.job.get("attempt") == self.attempt)


@dataclass(frozen=True)
class State:
    """How a run stands: a word for programs, a line for people."""

    word: Word
    text: str

    @property
    def active(self) -> bool:
        return self.word in ACTIVE


def judge(facts: Facts, now: float) -> State:
    """How the run stands at `now`, seconds since the epoch."""
    line = facts.line
    if facts.local and not facts.gone and facts.beat is not None and facts.beat < STALE:
        return _working(facts, now)
    if line and line.waiting:
        again = line.id == str(facts.job.get("job")) and facts.events
        waits = f"waiting in the queue: {line.why()}"
        return State("restarting", f"restarting, {waits}") if again else State("waiting", waits)
    if line and line.live:
        return _running(facts, line, now)
    if not facts.asked and facts.beat is not None and facts.beat < STALE:  # the lock is the only sign of life
        return _working(facts, now)
    return _over(facts, None if facts.local else line)


def _running(facts: Facts, line: slurm.Job, now: float) -> State:
    """A job that holds nodes."""
    if line.state == "CONFIGURING":
        return State("starting", "starting: its nodes are being made ready")
    if line.state in ("SUSPENDED", "STOPPED"):
        return State("waiting", "suspended by Slurm: its nodes work for another job")
    if line.id not in facts.jobs:
        return State("starting", f"starting: job {line.id} has its nodes")
    verdict = facts.last("verdict")
    if verdict.get("verdict") in ("restart", "requeue"):
        return State("restarting", _said("restarting", verdict.get("reason")))
    if verdict.get("verdict") == "stop" and str(facts.stop.get("job")) not in facts.jobs:
        return State("ending", _said("ending", verdict.get("reason")))  # when preempted, it waits again in a moment
    if verdict:
        return _over(facts, None)
    if lost := facts.last("lost"):
        return State("restarting", _said("restarting", lost.get("reason")))
    return _working(facts, now)


def _working(facts: Facts, now: float) -> State:
    """An attempt whose processes are there, or should be."""
    if facts.last("end"):
        return State("ending", "saved and ended; its processes are leaving")
    step = int(facts.status.get("step") or 0) if facts.status.get("attempt") == facts.attempt else 0
    times = [_epoch(event.get("time")) for event in facts.events[-1:]] + [_epoch(facts.job.get("started"))]
    sign = max([float(facts.status.get("epoch") or 0), *times]) if step else max(times)
    quiet = now - sign if sign else 0.0
    mine = facts.owner.get("attempt") == facts.attempt  # else the lock is what a dead attempt left
    if mine and facts.beat is not None and min(facts.beat, quiet) > STALE:
        host = facts.owner.get("host") or "its first node"
        return State("silent", f"silent for {_minutes(min(facts.beat, quiet))} ({host} lost?)")
    number = f" (attempt {facts.attempt})" if facts.attempt > 1 else ""
    if not step:
        since = f", for {_minutes(quiet)}" if quiet > 60 else ""
        before: dict[str, Any] = next((event for event in reversed(facts.events) if event["event"] == "verdict"), {})
        if before.get("verdict") in ("restart", "requeue") and str(before.get("job")) in facts.jobs:
            return State("restarting", _said(f"restarting{number}{since}", before.get("reason")))
        return State("starting", f"compiling/starting{number}{since}")
    if quiet > max(QUIET, SLOW_STEPS * float(facts.status.get("step_time") or 0)):
        return State("silent", f"silent for {_minutes(quiet)} (its processes live; hung, or a long save?)")
    return State("training", "training")


def _over(facts: Facts, line: slurm.Job | None) -> State:
    """A run that nothing works on."""
    if not facts.events and not facts.job and not facts.owner:
        return State(
            "unknown", "never started" if line is None else f"job {line.id} {ENDED.get(line.state, line.state)}"
        )
    end, verdict = facts.last("end"), facts.last("verdict")
    reason = verdict.get("reason") or end.get("reason")
    outcome = {"done": "finished", "stop": "stopped", "fail": "failed"}.get(verdict.get("verdict", ""), "")
    if not outcome and verdict:  # it was to go on, but no job is there to do so
        if str(facts.stop.get("job")) == str(facts.job.get("job")):
            return State("stopped", "stopped by you")
        how = f"job {facts.job.get('job')} {ENDED[line.state]}" if line and line.state in ENDED else "its job is gone"
        return State("lost", f"{how} when it was to start again ({first_line(reason)}); herd resume goes on")
    outcome = outcome or str(end.get("outcome", ""))
    if outcome == "finished":
        return State("finished", "finished")
    if outcome == "stopped":
        mine = facts.stop and str(facts.stop.get("job")) == str(facts.job.get("job"))
        if mine or (facts.local and str(reason).startswith("SIG")):  # who else would signal a process here
            return State("stopped", "stopped by you")
        return State("stopped", _said("stopped", reason))
    if outcome == "failed":
        return State("failed", _said("failed", reason or (facts.words[0].text if facts.words else "")))
    if facts.words:
        return State("failed", _said("failed", facts.words[0].text))
    if line and line.state in ENDED:
        return State("lost", f"lost: job {line.id} {ENDED[line.state]}; herd resume goes on")
    if not facts.asked and not facts.local:
        return State("unknown", f"unknown: no Slurm here to ask about job {facts.job.get('job')}")
    return State("lost", f"lost: attempt {facts.attempt} ended without a word; the same command goes on")


def _said(word: str, reason: object) -> str:
    text = first_line(reason)
    return f"{word}: {text}" if text else word


def first_line(reason: object) -> str:
    return ("" if reason is None else str(reason)).strip().partition("\n")[0]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _epoch(moment: object) -> float:
    """Seconds since the epoch of 2026-11-22T08:00:00.123Z; 0 of anything else."""
    with contextlib.suppress(ValueError, TypeError):
        return datetime.fromisoformat(str(moment)).timestamp()
    return 0.0


def gather(run: RunFolder, queue: Sequence[slurm.Job] | None) -> Facts:
    """What the run's folder and the queue say now; queue None: there is no Slurm to ask."""
    job, owner, beat = run_folder.read_json(run.job), run_folder.read_json(run.lock), None
    with contextlib.suppress(OSError):
        beat = max(0.0, time.time() - run.lock.stat().st_mtime)
    here = owner.get("host") == socket.gethostname() and not owner.get("job")
    facts = Facts(
        job=job, status=run_folder.read_json(run.status), events=list(run.history()), owner=owner, beat=beat,
        gone=here and run_folder.born(int(owner.get("pid", 0))) != owner.get("born"), line=newest(run, (job, owner), queue or []),
        asked=queue is not None, stop=run_folder.read_json(run.stop),
    )  # fmt: skip
    return Facts(**vars(facts) | {"words": run.last_words(facts.attempt)})


def newest(run: RunFolder, known: Iterable[dict[str, Any]], queue: Iterable[slurm.Job]) -> slurm.Job | None:
    """The job that trains in this folder, or will, or was the last to; `known`: job.json and the lock's owner."""
    folder, ids = str(run.path.absolute()), {str(facts.get("job")) for facts in known}
    mine = [line for line in queue if line.id in ids or (line.step == "run" and line.run == folder)]
    return max(mine, key=lambda line: (line.live, not line.waiting, int(line.id)), default=None)


def ask(ids: Iterable[str] = ()) -> list[slurm.Job] | None:
    """This user's jobs and those of the given numbers; None where Slurm is missing or does not answer."""
    if not slurm.here():
        return None
    try:
        found = slurm.mine()
        known = {line.id for line in found}
        return found + slurm.jobs(number for number in ids if number not in known)
    except UserError as error:
        if "configuration source" not in str(error):  # else its commands are here, but no cluster
            click.echo(f"herd: {error}; judged by the run folders alone", err=True)
        return None


def find(name: str | Path) -> RunFolder:
    """The run folder of this path, or of this name under runs/, or that a job in the queue will make.

    UserError when there is none.
    """
    given = Path(name)
    places = (given, Path("runs") / given)
    for path in places:
        if is_run(path):
            return RunFolder(path)
    promised = {line.run for line in (ask() if slurm.here() else None) or [] if line.live}
    for path in places:
        if str(path.absolute()) in promised:
            return RunFolder(path)
    if given.exists():
        raise UserError(f"{name}: is no run folder: it has no recipe.yaml and no job.json", 2)
    import difflib

    known = [str(path.relative_to("runs")) for path in runs(Path("runs"))]
    near = difflib.get_close_matches(given.name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"runs/ has {', '.join(known[:8]) or 'none'}; herd status lists all"
    raise UserError(f"no run {str(name)!r}: neither a folder nor a name under runs/; {hint}", 2)


def runs(below: Path) -> list[Path]:
    """Run folders up to two levels below a folder."""
    return sorted(path for pattern in ("*", "*/*") for path in below.glob(pattern) if is_run(path))


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("recipe.yaml", "job.json", "events.jsonl"))


def look(run: RunFolder) -> Facts:
    """What is known of one run now."""
    return gather(run, ask(ids_of(run)))


def ids_of(run: RunFolder) -> list[str]:
    """Numbers of the jobs that the run's folder names."""
    found = (run_folder.read_json(path).get("job") for path in (run.job, run.lock))
    return [str(number) for number in found if number]
