"""A run's folder: what lies where, and the records in it that outlive a process. Needs no torch, so that it reads fast.

recipe.yaml            the resolved recipe, itself a recipe
job.json               who runs it now: Slurm job, nodes, command, log
code.json, code.diff   version of this code, and what was changed in it without a commit
environment.json       versions and variables that decide how it runs
events.jsonl           start, resume, save, skip, end, verdict: one JSON object a line, in order
status.json            newest step, loss, speed
samples.jsonl          what the model wrote at validations: one JSON object a prompt
lock.json              the process that trains here now
logs/attempt-0003/     nodeN.log, last words of ranks that failed, stacks of ranks that hung
tensorboard/  checkpoints/
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from data_prep.errors import UserError

MANIFEST = "herd.json"
"""The file that makes a checkpoint's folder a checkpoint."""
PREFIX = "step-"
DAMAGED = ".damaged"
"""Behind the name of a checkpoint that was found damaged."""

Kind = Literal["user", "memory", "node", "killed", "hang", "error", "peer"]
"""What ended a rank: what its user can mend, memory, a bad node, a signal, no progress, anything else, another rank's end."""
FINAL: tuple[Kind, ...] = ("user", "memory")
"""Ends that another attempt would meet again."""

STALE = 120.0
"""Seconds without a sign after which a lock's owner counts as dead."""


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints of a run folder, oldest first."""
    found = (folder / "checkpoints").glob(f"{PREFIX}*/{MANIFEST}")
    return sorted(path.parent for path in found if path.parent.name[len(PREFIX) :].isdigit())


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named for."""
    return int(checkpoint.name[len(PREFIX) :])


def now() -> str:
    """This moment in UTC, as 2026-11-22T08:00:00.123Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Write JSON whole or not at all; without `sync` a power failure may still lose it."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is missing or no such thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class LastWords:
    """Why a rank ended an attempt."""

    kind: Kind
    text: str
    rank: int
    host: str = field(default_factory=socket.gethostname)
    nodes: tuple[str, ...] = ()
    """Nodes at fault, for kind "node"."""
    order: int = 0
    """1 for the first rank of the attempt to fail, where the ranks could still tell; 0: unknown."""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RunFolder:
    """Names of a run's files, and its records."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock.json"

    @property
    def stop(self) -> Path:
        """Written by `herd stop`: {"job": id} must not be started again by itself."""
        return self.path / "stop.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.path / "checkpoints" / f"{PREFIX}{step:08d}"

    def attempt(self, number: int) -> Path:
        """Folder of one attempt's logs."""
        return self.path / "logs" / f"attempt-{number:04d}"

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        names = (path.name.removeprefix("attempt-") for path in (self.path / "logs").glob("attempt-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def newest_step(self) -> int:
        """The step of the newest finished checkpoint; 0 when there is none."""
        found = complete(self.path)
        return step_of(found[-1]) if found else 0

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the validation with the lowest loss, as the newest checkpoint knows it; None before any."""
        found = complete(self.path)
        state = read_json(found[-1] / MANIFEST).get("state") if found else None
        if not isinstance(state, dict) or not state.get("best_step") or state.get("best_loss") is None:
            return None
        return int(state["best_step"]), float(state["best_loss"])

    def record(self, event: str, attempt: int, **facts: Any) -> None:
        """Add a line to events.jsonl. One process at a time does so: the first rank, or what starts and ends it."""
        line = {"time": now(), "event": event, "attempt": attempt, "job": os.environ.get("SLURM_JOB_ID"), **facts}
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.events, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data  # a power failure cut the line before
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def history(self) -> Iterator[dict[str, Any]]:
        """The events in order; a line that a crash cut is left out."""
        try:
            lines = self.events.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    yield event

    def leave_word(self, attempt: int, word: LastWords) -> None:
        """Write why this rank ends, where `after` looks for it; silent when the folder cannot be written, or seen."""
        if not self.path.is_dir():
            return  # a node that does not see it must not make one of its own
        with contextlib.suppress(OSError):
            self.attempt(attempt).mkdir(parents=True, exist_ok=True)
            write_json(self.attempt(attempt) / f"failed-rank{word.rank:05d}.json", asdict(word))

    def last_words(self, attempt: int) -> list[LastWords]:
        """Why ranks ended in this attempt, the likely cause first: who knew its cause, then who was first to end."""
        words = []
        for path in self.attempt(attempt).glob("failed-rank*.json"):
            with contextlib.suppress(TypeError):
                found = read_json(path)
                words.append(LastWords(**found | {"nodes": tuple(found.get("nodes", ()))}))
        weight = {kind: place for place, kind in enumerate(get_args(Kind))}
        return sorted(words, key=lambda word: (weight.get(word.kind, 9), word.order or 1 << 30, word.time))


class Lock:
    """The right to train in a run folder: a file that names its owner, which shows that it lives by touching it.

    It survives a crash, so a dead owner must be told from a living one: a process that is gone from this host, an
    earlier attempt of the same Slurm job, a Slurm job that `squeue` does not know as running, or an owner that has not
    touched the file for STALE seconds by the file server's own clock.
    """

    def __init__(self, run: RunFolder, attempt: int):
        self.path = run.lock
        self.mine = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "attempt": attempt,
            "since": now(),
        }

    def check(self) -> None:
        """Raise UserError when somebody else trains here, without taking the lock."""
        owner = read_json(self.path)
        if owner and not self._dead(owner):
            raise self._refusal(owner)

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        run = self.path.parent
        return UserError(
            f"run folder {run} is being trained in by {_in_words(owner)}; wait, stop that one (herd stop {run}), or choose "
            "another run_dir=...",
            2,
        )

    def acquire(self) -> str | None:
        """Take the lock; a line on whose it was when it had to be taken over. Raises UserError when the owner lives."""
        note = None
        for _ in range(5):
            aside = self.path.with_name(f".lock.{self.mine['token']}")
            write_json(aside, self.mine)
            try:
                os.link(aside, self.path)  # fails when there is one: atomic on NFS too
                return note
            except FileExistsError:
                pass
            finally:
                aside.unlink(missing_ok=True)
            owner = read_json(self.path)
            if why := self._dead(owner):
                note = f"the lock of {_in_words(owner)} is taken over: {why}"
                stale = self.path.with_name(f".lock.stale.{uuid.uuid4().hex}")
                with contextlib.suppress(FileNotFoundError):
                    self.path.rename(stale)
                if read_json(stale).get("token") != owner.get("token"):  # another took over between: give it back
                    with contextlib.suppress(OSError):
                        os.link(stale, self.path)
                stale.unlink(missing_ok=True)
                continue
            raise self._refusal(owner)
        raise UserError(f"run folder {self.path.parent}: others keep taking its lock; try again", 2)

    def _dead(self, owner: dict[str, Any]) -> str | None:
        """Why the owner is dead; None: it may live."""
        job = owner.get("job")
        if job and job == self.mine["job"]:
            return "an earlier attempt of this job"
        if owner.get("host") == self.mine["host"] and not job and born(int(owner.get("pid", 0))) != owner.get("born"):
            return "its process is gone"
        if job and job_alive(str(job)) is False:
            return f"Slurm job {job} has ended"
        silent = self._file_server_time() - self._touched()
        return f"no sign of life for {silent:.0f} s" if silent > STALE else None

    def _touched(self) -> float:
        try:
            return self.path.stat().st_mtime
        except OSError:
            return self._file_server_time()

    def _file_server_time(self) -> float:
        probe = self.path.with_name(f".now.{self.mine['token']}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def beat(self) -> None:
        """Show that the owner lives."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def held(self) -> bool:
        """Whether it is still ours: a process that was stopped for long may have lost it. True when it can't be read."""
        try:
            return bool(json.loads(self.path.read_text()).get("token") == self.mine["token"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True

    def release(self) -> None:
        """Give it back, if it is ours."""
        if self.held():
            self.path.unlink(missing_ok=True)


def job_alive(job: str) -> bool | None:
    """Whether a Slurm job may still run; None where nobody can say."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return False if "Invalid job id" in done.stderr else None
    return any(word in {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING"} for word in done.stdout.split())


def _in_words(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"


def born(pid: int) -> str:
    """When a process of this host was started, with the host's boot: a number used again is another process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}:{fields[19]}"
