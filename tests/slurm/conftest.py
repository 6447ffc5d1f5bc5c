"""A real Slurm of four virtual nodes for the tests of this folder: installed where that may be, started once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("lab.sh")
ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


class Lab:
    """The cluster of lab.sh; leaving the context ends it and everything on it."""

    def __init__(self, nodes: int, shared: Sequence[Path]):
        self.nodes, self.shared = nodes, shared
        self.folder = Path(tempfile.mkdtemp(prefix="herd-lab-", dir="/var/tmp"))

    def __enter__(self) -> Lab:
        environment = os.environ | {"LAB_SHARED": ":".join(str(path) for path in self.shared)}
        # The lab lives as long as this pipe: when these tests are killed, it ends too.
        self.process = subprocess.Popen(
            ["bash", SCRIPT, "serve", self.folder, str(self.nodes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 40
        while not (self.folder / "ready").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                why = self.logs()
                self.__exit__()
                raise RuntimeError(f"no Slurm could be started: {why}")
            time.sleep(0.05)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        files = sorted((self.folder / "log").glob("*")) if (self.folder / "log").exists() else []
        return "\n".join(f"{path.name}: {line}" for path in files for line in path.read_text().splitlines()[-5:])

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

    def wait(self, job: int, timeout: float = 120) -> str:
        """The state that a job ends in."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in ENDED:
            if time.monotonic() > deadline:
                reason = self.run("squeue", "-h", "-j", job, "-o", "%T %r")
                pytest.fail(f"job {job} is {reason.strip()} after {timeout} s\n{self.logs()}")
            time.sleep(0.2)
        return state


def _trouble() -> str | None:
    """Why there can be no lab here; installs Slurm where it is missing and this is root on a Debian."""
    if os.geteuid() != 0:
        return "the lab of virtual nodes needs root"
    paths = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if all(shutil.which(tool, path=paths) for tool in TOOLS):
        return None
    if not shutil.which("apt-get"):
        return f"{', '.join(TOOLS)} are needed, and there is no apt-get to install them"
    apt = ["apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2"]
    try:
        for words in (["update"], ["install", "--no-install-recommends", *PACKAGES]):
            subprocess.run(
                [*apt, *words], env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                check=True, capture_output=True, text=True, timeout=240,
            )  # fmt: skip
    except subprocess.CalledProcessError as error:
        return f"Slurm could not be installed: {error.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        return "Slurm could not be installed in 240 s"
    return None


def _unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"a real Slurm is required in CI: {reason}")
    pytest.skip(reason)


def shared_folders(*more: Path) -> list[Path]:
    """What all nodes must see: this checkout, the virtual environment and the Python under it."""
    return [path.resolve() for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix), *more)]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see, as a cluster's home directories."""
    return tmp_path_factory.mktemp("shared").resolve()


@pytest.fixture(scope="session")
def lab(shared: Path) -> Iterator[Lab]:
    """Slurm on node1 to node4, idle."""
    if reason := _trouble():
        _unavailable(reason)
    try:
        cluster = Lab(4, shared_folders(shared)).__enter__()
    except RuntimeError as error:
        _unavailable(str(error))
    try:
        yield cluster
    finally:
        cluster.__exit__()
