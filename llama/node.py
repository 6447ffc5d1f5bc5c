"""What a node is by itself: its name, disks, memory, limits, drivers. Needs no torch, so that it is known before torchrun.

llama/train/preflight.py compares these facts over nodes; launch/node_check.py looks at one node alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import uuid
from pathlib import Path

DRIVERS = ("nvidia", "neuron", "efa")
"""Kernel modules that collectives and kernels depend on."""


def node_name() -> str:
    """What Slurm calls this node, which its lists of excluded nodes need; the host's name elsewhere."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def unwritable(folder: Path) -> OSError | None:
    """Why a file cannot be made, synced and removed in `folder`; None: it can."""
    probe = folder / f".probe.{uuid.uuid4().hex}"
    try:
        with probe.open("xb") as file:
            file.write(b"herd")
            file.flush()
            os.fsync(file.fileno())
        return None
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def folder_in_words(folder: Path, error: OSError) -> str:
    """One clause on a folder that cannot be used on this node."""
    if isinstance(error, FileNotFoundError):
        return f"{folder} is not there (is its file system mounted?)"
    return f"{folder} cannot be written: {error.strerror or error}"


def free_bytes(path: Path) -> int | None:
    """Bytes that a plain user may still write where `path` is; None when that cannot be told."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(path)
        return usage.free if usage.total else None  # some network file systems say nothing
    return None


def memory() -> tuple[int, int]:
    """Bytes of this host's memory, and those that are free or can be freed; zeros where the kernel does not say."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)


def open_files() -> int:
    """How many files and sockets a process may hold."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit


def drivers() -> dict[str, str]:
    """Versions of the kernel's drivers that are loaded here."""
    found = {}
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            found[f"{name} driver"] = Path(f"/sys/module/{name}/version").read_text().strip()
    return found


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
