"""`herd lab`: a real Slurm of a few virtual nodes on this machine, to try sbatch at home. Tests start theirs by it too.

tests/slurm/lab.sh is the lab. One at a time lives in /var/tmp/herd-lab, or where HERD_LAB says. All its processes inherit
a lock on that folder: who can take it knows that nothing of the lab runs any more, however it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import click

from data_prep.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests/slurm/lab.sh"
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux")
START, END = 40.0, 20.0
"""Seconds that a lab may take to start and to end; it takes one."""


def missing() -> list[str]:
    """Programs that the lab needs and this machine lacks."""
    paths = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [tool for tool in TOOLS if not shutil.which(tool, path=paths)]


def trouble() -> str | None:
    """Why there can be no lab here; installs Slurm where it is missing and this is root on a Debian."""
    if os.geteuid() != 0:
        return f"the lab of virtual nodes needs root: sudo {shlex.quote(str(Path(sys.prefix) / 'bin/herd'))} lab up"
    if not SCRIPT.exists():
        return f"the lab is part of a checkout, and {SCRIPT} is not there: git clone, then pip install -e ."
    lacking = missing()
    if not lacking:
        return None
    if not shutil.which("apt-get"):
        return (
            f"no {', '.join(lacking)} and no apt-get to install them: install Slurm and munge with your package manager"
        )
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


def shared_folders(*more: Path) -> list[Path]:
    """What all nodes must see: this checkout, the virtual environment and the Python under it."""
    return list(dict.fromkeys(path.resolve() for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix), *more)))


def start(
    folder: Path, nodes: int, shared: Iterable[Path], stdin: int, keep: tuple[int, ...] = ()
) -> subprocess.Popen[str]:
    """Run lab.sh until its standard input ends; returns when the nodes are idle. RuntimeError says why they are not."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    with (folder / "log/serve").open("w") as said:
        process = subprocess.Popen(
            ["bash", SCRIPT, "serve", folder, str(nodes)], stdin=stdin, stdout=said, stderr=said, pass_fds=keep,
            env=os.environ | {"LAB_SHARED": ":".join(map(str, shared))}, start_new_session=True, text=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START
        while not (folder / "ready").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Slurm could be started: {logs(folder)}")
            time.sleep(0.05)
    except BaseException:
        end(process)
        raise
    return process


def end(process: subprocess.Popen[str]) -> None:
    """End a lab at once, with all that runs on it: `unshare` is in its group, and takes the nodes along."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def logs(folder: Path) -> str:
    """The last lines of the daemons' logs."""
    files = sorted((folder / "log").glob("*"))
    return "\n".join(f"{path.name}: {line}" for path in files for line in path.read_text().splitlines()[-5:])


def place() -> Path:
    """Where the lab of this machine lives."""
    return Path(os.environ.get("HERD_LAB", "/var/tmp/herd-lab"))


def _lock(folder: Path) -> int | None:
    """Take the lab's folder; None while a lab is there."""
    hold = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(hold).st_ino == folder.stat().st_ino:
            return hold
    except (BlockingIOError, FileNotFoundError):  # taken; or removed meanwhile by who held it
        pass
    os.close(hold)
    return None


def _is_up(folder: Path) -> bool:
    if not folder.exists():
        return False
    if (hold := _lock(folder)) is None:
        return True
    os.close(hold)
    return False


def _need_lab() -> Path:
    if os.geteuid() != 0:
        raise UserError(f"the lab's nodes are root's: {_by_root()}", 2)
    folder = place()
    if os.environ.get("SLURM_CONF") == str(folder / "slurm.conf"):
        raise UserError("this shell is inside the lab: type the command itself, or `exit` first", 2)
    if not _is_up(folder) or not (folder / "ready").exists():
        raise UserError("no lab is up; herd lab up starts one", 2)
    return folder


def _by_root() -> str:
    return shlex.join(["sudo", str(Path(sys.prefix) / "bin/herd"), *sys.argv[1:]])


def _enter(folder: Path, node: str, command: Iterable[str]) -> NoReturn:
    """Become a command on a node, in this folder, where the README's commands work as they stand."""
    nodes = int((folder / "nodes").read_text())
    if node not in ("head", *(f"node{i + 1}" for i in range(nodes))):
        raise UserError(f"no node {node!r} in the lab: head, node1 to node{nodes}", 2)
    here = Path.cwd()
    shared = [Path(line) for line in (folder / "shared").read_text().splitlines()]
    if here.is_relative_to("/tmp") and not any(here.is_relative_to(path) for path in shared):
        raise UserError(
            f"nodes have a /tmp of their own and do not see {here}: go to a folder elsewhere, or call "
            "herd lab down, then herd lab up, in this one",
            2,
        )
    own = {
        "HERD_NODE_TYPE": "cpu",  # the devices that Slurm gives out here are not real
        "HERD_PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nodes)),
    }
    path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    sys.stdout.flush()
    os.execvpe("bash", ["bash", str(SCRIPT), "exec", str(folder), node, *command], own | os.environ | {"PATH": path})


@contextlib.contextmanager
def _cleared(folder: Path) -> Iterator[int]:
    """The lab's folder, empty and ours; removed when what follows fails."""
    folder.mkdir(mode=0o755, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise UserError(f"{folder} is not root's own folder: remove it, or name another place in HERD_LAB", 2)
    if (hold := _lock(folder)) is None:
        raise UserError(f"a lab is up or starting in {folder}: herd lab shell, herd lab status, herd lab down", 1)
    for left in folder.iterdir():  # by a lab that a power failure ended
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    try:
        yield hold
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(hold)


@click.group()
def command() -> None:
    """A real Slurm of a few virtual nodes on this machine, to try sbatch at home. Needs root.

    Nodes have this machine's cores, and its files but for /tmp; their GPUs are names that Slurm gives out.
    """


@command.command()
@click.option("--nodes", default=5, show_default=True, type=click.IntRange(1, 64), help="node1, node2, ...")
def up(nodes: int) -> None:
    """Start the lab; installs Slurm by apt-get where it is missing. It stays until `herd lab down` or a reboot."""
    folder = place()
    if os.geteuid() == 0 and _is_up(folder):
        click.echo(f"herd: the lab is up already, in {folder}; herd lab shell, herd lab status, herd lab down")
        return
    if os.geteuid() == 0 and SCRIPT.exists() and missing() and shutil.which("apt-get"):
        click.echo(f"herd: installing {' '.join(PACKAGES)} by apt-get", err=True)
    if reason := trouble():
        raise UserError(reason)
    began = time.monotonic()
    shared = [path for path in shared_folders(Path.cwd(), Path.home()) if path != Path("/tmp")]
    with _cleared(folder) as hold:
        (folder / "nodes").write_text(str(nodes))
        (folder / "shared").write_text("".join(f"{path}\n" for path in shared))
        # The lab itself holds the other end of its standard input, which therefore never ends.
        reading, writing = os.pipe()
        try:
            start(folder, nodes, shared, stdin=reading, keep=(hold, writing))
        except RuntimeError as error:
            raise UserError(f"{error}\nIn a container it needs --privileged.", 1) from None
        finally:
            os.close(reading)
            os.close(writing)
    script = ROOT / "slurm/run.slurm"
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    click.echo(
        f"""Slurm is up with {nodes} nodes ({time.monotonic() - began:.0f} s). Next:

  herd lab shell                                # a shell on its head node, in this folder; `exit` leaves it
  herd prep demo-text data/demo && herd prep tokenize data/demo/text.jsonl \\
    --tokenizer data/demo/tokenizer.model --output data/demo/text
  sbatch --nodes {min(4, nodes)} {script} tiny_cpu    # trains; writes run.slurm-1.log and runs/ here
  squeue
  exit
  herd lab down                                 # ends it and all that runs on it; nothing is left"""
    )


@command.command()
def down() -> None:
    """End the lab and all that runs on it; what jobs wrote stays."""
    folder = place()
    if not folder.exists():
        click.echo("herd: no lab is up")
        return
    if os.geteuid() != 0:
        raise UserError(f"the lab is root's: {_by_root()}", 2)
    if not _end(folder):
        click.echo("herd: no lab is up; what one had left is removed")


def _end(folder: Path) -> bool:
    """End the lab of a folder and remove it; whether one lived."""
    hold, lived, deadline = _lock(folder), False, time.monotonic() + END
    while hold is None:
        lived = True
        if not folder.exists():
            return lived
        if time.monotonic() > deadline:
            raise UserError(
                f"the lab in {folder} did not end in {END:.0f} s; fuser -v {folder} shows what is left of it", 1
            )
        # The kernel ends every process, mount and interface of the lab with the head's process 1.
        with contextlib.suppress(OSError, ValueError):
            head = int((folder / "head.pid").read_text())
            line = Path(f"/proc/{head}/cmdline").read_bytes().split(b"\0")
            if b"_head" in line and os.fsencode(folder) in line:
                os.kill(head, signal.SIGKILL)
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            hold = _lock(folder)
    shutil.rmtree(folder)
    os.close(hold)
    return lived


@command.command()
def shell() -> None:
    """A shell on the head node, in this folder, where sbatch and squeue work."""
    _enter(_need_lab(), "head", ["bash"])


@command.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--node", default="head", show_default=True, help="head, node1, node2, ...")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="CMD...")
def exec_(node: str, words: tuple[str, ...]) -> None:
    """Run one command on a node, in this folder: herd lab exec sbatch --nodes 4 run.slurm tiny_cpu"""
    _enter(_need_lab(), node, words)


@command.command()
def status() -> None:
    """Nodes and jobs, as Slurm tells them."""
    _enter(_need_lab(), "head", ["bash", "-c", "sinfo && echo && squeue"])
