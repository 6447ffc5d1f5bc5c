"""What this node is: read from the system and measured in some seconds. `python -m launch.doctor.facts` prints it as JSON.

Nothing here judges; that is for rules.py. What cannot be asked (no nvidia-smi, no fi_info) is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from llama import node

PACKAGES = ("herd", "torch", "torch-neuronx", "neuronx-cc", "libneuronxla", "numpy", "safetensors", "fastokens")
ASK_SECONDS = 20.0
"""For a tool to answer: a GPU that fell off its bus makes nvidia-smi wait."""
WRITTEN, FILES = 64 << 20, 100
"""Bytes of the file, and number of small files, that a disk's speed is measured on."""
GPU = (
    "index", "name", "memory.total", "memory.used", "driver_version", "clocks.sm", "clocks.max.sm", "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total", "pcie.link.gen.current", "pcie.link.gen.max",
)  # fmt: skip


@dataclass
class Disk:
    """A folder's file system as this node sees it."""

    what: str
    path: str
    type: str = ""
    free: int | None = None
    error: str = ""
    write: float = 0.0
    """Bytes a second of one file, flushed to the disk; 0: not measured."""
    files: float = 0.0
    """Small files made, flushed and removed a second."""


@dataclass
class NodeFacts:
    """One node. Everything in `same` has to be equal on all nodes of a job; what is in `own` may differ."""

    node: str
    clock: float = 0.0
    same: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    """Bytes, files, counts."""
    gpus: list[dict[str, str]] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    speeds: dict[str, float] = field(default_factory=dict)
    """FLOP/s of matrix products, bytes a second of memory."""
    faults: list[str] = field(default_factory=list)
    """What failed while it was tried."""

    @classmethod
    def of_json(cls, text: str) -> NodeFacts:
        value = json.loads(text)
        return cls(**{**value, "disks": [Disk(**disk) for disk in value["disks"]]})


def gather(folders: Sequence[tuple[str, Path]], quick: bool = False) -> NodeFacts:
    """This node's facts. folders: (what it is for, path). quick: nothing is measured, torch is not loaded."""
    facts = NodeFacts(node.node_name(), time.time())
    _machine(facts)
    _software(facts)
    _devices(facts)
    _network(facts)
    _slurm(facts)
    facts.disks = [_disk(what, path, quick) for what, path in folders]
    if not quick:
        _torch(facts)
    return facts


def _machine(facts: NodeFacts) -> None:
    memory, free = node.memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts.same |= {"system": f"{platform.system()} {platform.machine()}", "kernel": platform.release()}
    facts.same["cores"] = str(cores)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        facts.same |= {"processor": found[1].strip()} if found else {}
    shared = node.free_bytes(Path("/dev/shm"))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    facts.limits |= {
        "memory": memory, "memory free": free, "open files": node.open_files(),
        "locked memory": 1 << 62 if locked == resource.RLIM_INFINITY else locked,
    }  # fmt: skip
    if shared is not None:
        facts.limits["/dev/shm free"] = shared


def _software(facts: NodeFacts) -> None:
    facts.same["Python"] = f"{platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts.same[name] = metadata.version(name)
    facts.same |= node.drivers()


def _devices(facts: NodeFacts) -> None:
    if table := ask("nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader,nounits"):
        facts.gpus = [dict(zip(GPU, re.split(r",\s*", line), strict=False)) for line in table.splitlines() if line]
        facts.same["GPUs"] = f"{len(facts.gpus)} x {facts.gpus[0]['name']}" if facts.gpus else "0"
    if chips := sorted(Path("/dev").glob("neuron[0-9]*")):
        facts.same["Neuron devices"] = str(len(chips))
        with contextlib.suppress(ValueError, KeyError, TypeError):
            listed = json.loads(ask("neuron-ls", "--json-output") or "null")
            facts.same["NeuronCores"] = str(sum(int(chip["nc_count"]) for chip in listed))


def _network(facts: NodeFacts) -> None:
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if adapters:
        facts.same["adapters"] = f"{len(adapters)} ({', '.join(sorted({re.sub(r'[0-9]+', '', a) for a in adapters}))})"
    if providers := ask("fi_info", "-p", "efa", "-t", "FI_EP_RDM"):
        facts.same["EFA interfaces"] = str(len(re.findall(r"^provider: efa", providers, re.M)))
    with contextlib.suppress(OSError):
        installed = Path("/opt/amazon/efa_installed_packages").read_text()
        found = re.search(r"EFA installer version: (\S+)", installed)
        facts.same |= {"EFA installer": found[1]} if found else {}
    facts.own["address"] = (ask("hostname", "-I") or "").split(" ")[0]
    told = ask("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    facts.own |= {"clock set by the network": told.strip()} if told else {}


def _slurm(facts: NodeFacts) -> None:
    if version := ask("sinfo", "-V"):
        facts.same["Slurm"] = version.strip().removeprefix("slurm ")
    for name in ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST"):
        if name in os.environ:
            facts.own[name] = os.environ[name]


def ask(*command: str) -> str | None:
    """What a tool prints; None where there is none, or it fails or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _disk(what: str, path: Path, quick: bool) -> Disk:
    disk = Disk(what, str(path), file_system(path))
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    disk.free = node.free_bytes(there)
    if error := node.unwritable(there):
        disk.error = node.folder_in_words(there, error)
    elif not quick and (disk.free is None or disk.free > 4 * WRITTEN):
        try:
            disk.write, disk.files = _disk_speed(there)
        except OSError as failure:
            disk.error = node.folder_in_words(there, failure)
    return disk


def _disk_speed(folder: Path) -> tuple[float, float]:
    block = os.urandom(1 << 20)  # some file systems pack, or share what is equal
    with tempfile.TemporaryDirectory(prefix=".herd-doctor-", dir=folder) as name:
        start = time.perf_counter()
        with Path(name, "large").open("wb", buffering=0) as file:
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        write = WRITTEN / (time.perf_counter() - start)
        start, done = time.perf_counter(), 0
        while done < FILES and time.perf_counter() - start < 2:
            small = Path(name, f"{done}")
            with small.open("wb") as file:
                file.write(b"herd")
                file.flush()
                os.fsync(file.fileno())
            small.unlink()
            done += 1
        return write, done / (time.perf_counter() - start)


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that a path lies on, such as ext4, nfs4, lustre; "" where that is not known."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    place = path.absolute()
    found = [(words[1], words[2]) for words in lines if len(words) > 2 and place.is_relative_to(words[1])]
    return max(found, key=lambda each: len(each[0]))[1] if found else ""  # the last of equal ones lies on top


def _torch(facts: NodeFacts) -> None:
    """What torch finds, and how fast it computes."""
    try:
        import torch

        from llama.device import find_device
        from llama.train.stragglers import products

        facts.same["torch's CUDA"] = torch.version.cuda or "none"
        if torch.cuda.is_available():
            facts.same["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        device = find_device()
        facts.same["device"] = f"{device.type} ({device.name})"
        flops, wrong = products(device)
        facts.speeds["matrix products"] = flops
        if wrong:
            facts.faults.append(wrong)
        values = torch.ones(1 << 25, device=device.torch())
        other, best = torch.empty_like(values), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            other.copy_(values)
            device.synchronize()
            best = min(best, time.perf_counter() - start)
        facts.speeds["memory"] = 2 * values.nbytes / best
    except Exception as error:  # whatever keeps torch from working here is what is asked for
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        facts.faults.append(f"torch does not work here: {text}")


def as_json(facts: NodeFacts) -> str:
    return json.dumps(asdict(facts))


def main(arguments: Sequence[str]) -> None:
    """Print this node's facts; arguments: --quick, then WHAT=PATH for each folder."""
    quick = "--quick" in arguments
    folders = [tuple(each.split("=", 1)) for each in arguments if "=" in each]
    told: Any = gather([(what, Path(path)) for what, path in folders], quick)
    print(as_json(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
