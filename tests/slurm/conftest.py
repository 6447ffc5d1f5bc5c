"""A real Slurm of five virtual nodes for the tests of this folder: installed where that may be, started once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launch.lab import END, ROOT, SCRIPT, end, logs, shared_folders, start, trouble

__all__ = ["ROOT", "Lab", "shared_folders"]

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


class Lab:
    """The cluster of lab.sh; leaving the context ends it and everything on it."""

    def __init__(self, nodes: int, shared: Sequence[Path]):
        self.nodes, self.shared = nodes, shared
        self.folder = Path(tempfile.mkdtemp(prefix="herd-lab-", dir="/var/tmp"))

    def __enter__(self) -> Lab:
        # The lab lives as long as this pipe: when these tests are killed, it ends too.
        reading, writing = os.pipe()
        try:
            self.process = start(self.folder, self.nodes, self.shared, stdin=reading)
        except BaseException:
            os.close(writing)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            os.close(reading)
        self.pipe = writing
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.pipe)
        try:
            self.process.wait(END)
        except subprocess.TimeoutExpired:
            end(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        return logs(self.folder)

    def run(
        self, *command: object, node: str = "head", cwd: Path | None = None, timeout: float = 60, **environment: str
    ) -> str:
        """Standard output of a command on a node; AssertionError with what it said when it fails."""
        done = subprocess.run(
            ["bash", SCRIPT, "exec", self.folder, node, *map(str, command)],
            cwd=cwd, env=os.environ | environment, timeout=timeout, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *command: object, cwd: Path, **environment: str) -> int:
        """Run an sbatch command; the job's number."""
        return int(self.run(*command, cwd=cwd, **environment).split()[-1])

    def state(self, job: int) -> str:
        """Slurm's word for a job, such as RUNNING."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def restarts(self, job: int | str) -> int:
        """How often a job was requeued."""
        return int(self.run("squeue", "-h", "-t", "all", "-j", job, "-O", "RestartCnt"))

    def wait(self, job: int, timeout: float = 120) -> str:
        """The state that a job ends in."""
        self._until(lambda: self.state(job) in ENDED, timeout, job)
        return self.state(job)

    def wait_running(self, job: int, restarts: int = 0, timeout: float = 60) -> list[str]:
        """Wait until a job runs that was requeued so often, or more; its nodes."""
        names = ""

        def running() -> bool:
            nonlocal names  # with state and count at one moment: a job may end between two questions
            said = self.run("squeue", "-h", "-t", "all", "-j", job, "-O", "State:20,RestartCnt:10,NodeList:200").split()
            names = said[2] if len(said) > 2 else ""
            return said[0] == "RUNNING" and int(said[1]) >= restarts

        self._until(running, timeout, job)
        return self.run("scontrol", "show", "hostnames", names).split()

    def kill(self, node: str, silent: bool = False) -> None:
        """Power failure: nothing of the node is left on return. Silent: what it talked to is not told, not even by TCP."""
        self._script("kill", node, *(["silent"] if silent else []))

    def start(self, node: str) -> None:
        """Power on; Slurm takes the node back within a second or two."""
        self._script("start", node)

    def alive(self, node: str) -> bool:
        """Whether the node has power."""
        return bool(self._processes(node))

    def down(self, node: str, reason: str = "a test") -> None:
        """As an administrator: the node goes down at once, and its jobs back to the queue."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", f"reason={reason}")

    def resume(self, node: str) -> None:
        """As an administrator: a node that is down or drained may work again."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def pids(self, node: str, pattern: str) -> list[int]:
        """Processes on a node whose command line matches, oldest first, by the numbers that this machine knows them by."""
        lines = {pid: _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip() for pid in self._processes(node)}
        return sorted((pid for pid, line in lines.items() if re.search(pattern, line)), key=_born)

    def signal(self, node: str, pid: int, number: int = signal.SIGKILL) -> None:
        """Signal a process that `pids` named."""
        assert pid in self._processes(node), f"process {pid} is not on {node} any more"
        os.kill(pid, number)

    @contextlib.contextmanager
    def disk(self, name: str, size: str = "3m") -> Iterator[Path]:
        """A file system of this size that all nodes see, gone on exit; `outside` shows it to the tests."""
        path = self.folder / "disks" / name
        self.run("mkdir", "-p", path)
        self.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)
        try:
            yield path
        finally:
            self.run("umount", "-l", path)

    def remount(self, disk: Path, options: str) -> None:
        """Change a disk under the feet of its users: `ro`, `rw`, `size=20m`."""
        self.run("mount", "-o", f"remount,{options}", disk)

    def outside(self, path: Path) -> Path:
        """Where this process finds what the nodes see at this path."""
        return Path("/proc", (self.folder / "head.pid").read_text().strip(), "root", *path.parts[1:])

    def idle(self) -> set[str]:
        """Nodes that Slurm may give to a job now."""
        return {node for node, state in self._states().items() if state == "idle"}

    def settle(self, timeout: float = 90) -> None:
        """The lab as it was in the beginning: no jobs, all nodes powered and idle."""
        names = [f"node{i + 1}" for i in range(self.nodes)]
        for node in names:
            if not self.alive(node):
                self.start(node)

        def settled() -> bool:
            if jobs := self.run("squeue", "-h", "-t", "PD,R,S,CF", "-o", "%A").split():
                # A batch script may take its time over SIGTERM, or requeue itself.
                self.run("scancel", "--full", "--signal=KILL", *jobs)
                self.run("scancel", *jobs)
            for node, state in self._states().items():
                if state.startswith(("down", "drain")) and not state.endswith("*"):  # with * it has yet to answer
                    self.resume(node)
            return self.idle() == set(names) and not self.run("squeue", "-h").strip()

        self._until(settled, timeout)

    def _states(self) -> dict[str, str]:
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines())

    def _until(self, true: Callable[[], bool], timeout: float, job: int | None = None) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                said = self.run("squeue", "-o", "%A %T %r %N") + self.run("sinfo", "-N", "-p", "main", "-o", "%N %T %E")
                pytest.fail(f"{f'job {job}' if job else 'the lab'} after {timeout} s:\n{said}{self.logs()}")
            time.sleep(0.1)

    def _script(self, verb: str, *words: str) -> None:
        done = subprocess.run(
            ["bash", SCRIPT, verb, self.folder, *words], timeout=60, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"lab.sh {verb} {words}: {done.stdout}{done.stderr}"

    def _processes(self, node: str) -> set[int]:
        space = _read(self.folder / f"{node}.space").strip()
        return {int(path.name) for path in Path("/proc").glob("[0-9]*") if space and _link(path / "ns/pid") == space}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # ended meanwhile
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _born(pid: int) -> int:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return int(fields[19]) if fields else 0


def _unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"a real Slurm is required in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see, as a cluster's home directories."""
    return tmp_path_factory.mktemp("shared").resolve()


@pytest.fixture(scope="session")
def lab(shared: Path) -> Iterator[Lab]:
    """Slurm on node1 to node5, idle."""
    if reason := trouble():
        _unavailable(reason)
    try:
        cluster = Lab(5, shared_folders(shared)).__enter__()
    except RuntimeError as error:
        _unavailable(str(error))
    try:
        yield cluster
    finally:
        cluster.__exit__()
