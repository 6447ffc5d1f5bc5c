"""What herd asks of Slurm: the one place that runs squeue, sinfo, sbatch and scancel. Slurm 22.05 and newer, no sacct."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import UserError

LIVE = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
}  # fmt: skip
"""States of jobs that may still do something; in all others they have ended."""
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}

REASONS = {
    "None": "just submitted, not looked at yet",
    "Priority": "jobs of higher priority come first",
    "Resources": "its nodes are in use by others",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Nodes required for job are DOWN": "nodes that it needs are down, drained or reserved",
    "BeginTime": "its begin time is not reached, which after a requeue takes a minute or two",
    "Cleaning": "its last attempt is still being cleaned up",
    "Dependency": "another job has to end first",
    "DependencyNeverSatisfied": "the job it waits for did not succeed, so it never starts; scancel it",
    "JobHeldUser": "held by its owner; scontrol release JOB lets it go on",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "requeued too often and held; scontrol release JOB lets it go on",
    "launch failed requeued held": "its start failed on a node and it is held; scontrol release JOB lets it go on",
    "job requeued in held state": "requeued and held; scontrol release JOB lets it go on",
    "JobArrayTaskLimit": "as many tasks of its array are at work as may be at once",
    "Licenses": "it waits for a licence",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition does not start jobs now",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows or has in service",
    "PartitionTimeLimit": "it asks for more time than its partition allows",
    "PartitionConfig": "it asks for what its partition does not have",
    "Reservation": "its reservation has not begun or is full",
    "BadConstraints": "no node is as it demands",
    "InvalidAccount": "its account may not be used here",
    "InvalidQOS": "its QOS may not be used here",
    "NodeDown": "a node that it needs is down",
}
"""Slurm's reasons for waiting, for people. Unknown ones are shown as Slurm says them."""

_FIELDS = ("%A %i", "%T", "%r", "%j", "%u", "%P", "%D", "%N", "%S", "%e", "%Z", "%o", "%E", "%k")
_SEPARATOR = "\x1f"  # names and commands may hold any character that people type
_COMMENT = re.compile(r"herd (compile|run|export) (.+)")


@dataclass(frozen=True)
class Job:
    """A line of the queue."""

    id: str
    """SLURM_JOB_ID of its script, which for one task of an array is the whole array's number too."""
    state: str
    reason: str = "None"
    name: str = ""
    user: str = ""
    partition: str = ""
    count: int = 0
    """Nodes asked for or held."""
    nodes: str = ""
    """Which ones, in Slurm's short form."""
    start: float | None = None
    """When it started or, while it waits, is expected to."""
    ends: float | None = None
    """When its time is over."""
    folder: str = ""
    """Where sbatch was called."""
    command: str = ""
    waits_for: str = ""
    """Slurm's text of its dependencies."""
    comment: str = ""
    task: str = ""
    """12_3, of a task of an array."""

    @property
    def address(self) -> str:
        """What names it alone to Slurm's commands."""
        return self.task or self.id

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def step(self) -> str:
        """compile, run or export for a job of herd, else nothing; a point of a sweep is a run."""
        if found := _COMMENT.fullmatch(self.comment):
            return found[1]
        found = re.search(r"(?:^|/)(compile|run|export|sweep)\.slurm(?: |$)", self.command)
        return found[1].replace("sweep", "run") if found else ""

    @property
    def run(self) -> str:
        """The run folder that it was submitted for by herd submit, else nothing."""
        found = _COMMENT.fullmatch(self.comment)
        return found[2] if found else ""

    def why(self) -> str:
        """Why it waits, in words."""
        if self.reason == "Dependency" and (others := re.findall(r":(\d+)", self.waits_for)):
            return f"job {' and '.join(others)} has to end first"
        head = re.split(r"[,(]", self.reason)[0].strip()
        nodes = re.search(r"UnavailableNodes:([^ )]+)", self.reason)
        words = REASONS.get(head) or next(
            (REASONS[key] for key in REASONS if " " in key and head.startswith(key)), None
        )
        if words:
            return words.replace("JOB", self.id) + (f" ({nodes[1]})" if nodes else "")
        if head.startswith(("Assoc", "MaxJobs", "MaxSubmit")):
            return f"a limit of its account or user is reached ({self.reason})"
        if head.startswith("QOS"):
            return f"a limit of its QOS is reached ({self.reason})"
        return self.reason


def comment(step: str, folder: Path) -> str:
    """What sbatch writes beside a job so that it is found by its run folder before it has started."""
    return f"herd {step} {folder}"


def _environment(program: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's, without settings that change what squeue and sinfo print."""
    if program not in ("squeue", "sinfo"):
        return os.environ | dict(more or {})  # a job inherits it: nothing of ours may slip in
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SINFO_"))}
    return mine | {"SLURM_TIME_FORMAT": "%s"}


def call(command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Both outputs of a Slurm command. UserError in Slurm's own words when it fails."""
    try:
        done = subprocess.run(
            command, env=_environment(command[0], environment), cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=60, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(
            f"no {command[0]} here: this verb needs Slurm, so call it on a cluster's login node; "
            "herd train runs on this machine alone",
            2,
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not answer in 60 s; is Slurm's controller well? scontrol ping says"
        ) from None
    if done.returncode:
        said = [
            re.sub(rf"^{command[0]}: (error|fatal): ", "", line) for line in done.stderr.split("\n") if line.strip()
        ]
        raise UserError(f"{command[0]}: {'; '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout + done.stderr


def here() -> bool:
    """Whether Slurm's commands are on this machine."""
    return shutil.which("squeue") is not None


def _moment(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def parse(text: str) -> list[Job]:
    """The lines of `squeue` in our format."""
    jobs = []
    for line in text.splitlines():
        values = ["" if value in ("(null)", "N/A") else value for value in line.split(_SEPARATOR)]
        if len(values) != len(_FIELDS):
            continue  # a warning of Slurm between the lines
        number, state, reason, name, user, partition, count, nodes, start, ends, *rest = values
        number, _, address = number.partition(" ")
        times = _moment(start), _moment(ends)
        size = int(count) if count.isdigit() else 0
        task = address if "_" in address else ""
        job = Job(number, state, reason or "None", name, user, partition, size, nodes, *times, *rest)
        jobs.append(replace(job, task=task))
    return jobs


def queue(*options: str) -> list[Job]:
    """Jobs that Slurm knows, those that ended lately among them. UserError when it does not answer."""
    return parse(call(["squeue", "--noheader", "--states=all", f"--format={_SEPARATOR.join(_FIELDS)}", *options]))


def mine() -> list[Job]:
    """This user's jobs."""
    return queue(f"--user={os.geteuid()}")


def jobs(ids: Iterable[str]) -> list[Job]:
    """The jobs of these numbers that Slurm still knows."""
    wanted = ",".join(sorted({number for number in ids if number.isdigit()}))
    try:
        return queue(f"--jobs={wanted}") if wanted else []
    except UserError as error:
        if "Invalid job id" in str(error):
            return []
        raise


@dataclass(frozen=True)
class Node:
    """A node of a partition."""

    name: str
    state: str
    gres: str
    partition: str

    @property
    def usable(self) -> bool:
        """Whether a job may get it, now or when others have ended."""
        bad = ("down", "drain", "fail", "error", "future", "inval", "unk", "maint", "power_down", "powering_down")
        return not (self.state.endswith("*") or self.state.startswith(bad))


def nodes(partition: str | None = None) -> list[Node]:
    """The nodes of a partition, or of the default one; empty when there is no such partition."""
    options = [f"--partition={partition}"] if partition else []
    lines = call(["sinfo", "--noheader", "--Node", "--format=%N|%T|%G|%P", *options]).splitlines()
    found = [Node(*line.split("|")) for line in lines if line.count("|") == 3]
    return [node for node in found if partition or node.partition.endswith("*")]


def partitions() -> list[str]:
    """Names of the partitions, the default one with a star."""
    return sorted(set(call(["sinfo", "--noheader", "--format=%P"]).split()))


def devices(gres: str, kind: str) -> tuple[str, int]:
    """Type and number of the devices of a kind: "gpu:h200:8(S:0-1)", "gpu" -> ("h200", 8); ("", 0) without any."""
    name, total = "", 0
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        if found := re.fullmatch(rf"(?:gres[/:])?{kind}(?::([^:]+?))??(?::(\d+))?", part):
            name, total = found[1] or name, total + int(found[2] or 1)
    return name, total


def shown(command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """A command as a person would type it."""
    words = [*(f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()), shlex.join(command)]
    there = f"cd {shlex.quote(str(folder))} && " if folder and folder.resolve() != Path.cwd() else ""
    return there + " ".join(words)


def submit(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> str:
    """Run `sbatch --parsable ...` in `folder`; the job's number."""
    said = call(command, environment, folder)
    found = re.search(r"^(\d+)(?:;\S+)?$", said, re.MULTILINE)
    if not found:
        raise UserError(f"sbatch gave no job number: {said.strip()!r}")
    return found[1]


def cancel(job: str, signal: str | None = None) -> None:
    """End a job, or send its batch script a signal. A job that has ended meanwhile is no error."""
    try:
        call(["scancel", "--batch", f"--signal={signal}", job] if signal else ["scancel", job])
    except UserError as error:
        if not re.search("Invalid job id|already completing or completed", str(error)):
            raise
