"""Before a long run: do all nodes run the same software, share the run folder, and compute and talk alike? Bad ones are named.

Runs inside the training processes, before the model is built, so that it costs no second start of Python. Facts of all
ranks are gathered on all ranks, which judge them alike. A node is bad against the others, never against a table of what
hardware should do. Speed is measured in stragglers.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from llama import node
from llama.config import Recipe
from llama.device import Device
from llama.layout import Layout
from llama.model.llama import count_parameters
from llama.parallel.adapters import adapter_shapes
from llama.run_folder import RunFolder, complete
from llama.train.stragglers import (
    Findings,
    Speed,
    all_reduce,
    by_node,
    exchange,
    in_words,
    judge_speed,
    message_bytes,
    products,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch-neuronx", "neuronx-cc")

DEADLINE = 60.0
"""Seconds for a node to look at its own disks and devices: a healthy one takes 0.1, a dead file server for ever."""
FAREWELL = 5.0
"""Seconds that ranks wait for one another before they end with an error."""
SEEN_WITHIN = 5.0
"""Seconds for the first node's file to show on the others: NFS shows a new name at once, object stores take a while."""
LEFT = 0.8
"""Free device memory, against the median, below which somebody else must be on the device."""
CLOCK = 2.0
"""Seconds between clocks that are worth a line; NTP keeps them within milliseconds."""
SHM = 1 << 30
"""Bytes of /dev/shm that NCCL asks for among the ranks of a node (its documentation)."""
TURNS = 3
"""Measurements that a slow rank gets before it is called so."""


class NodeFault(UserError):  # noqa: N818
    """Nodes that must not train; the job can run on others."""

    def __init__(self, message: str, nodes: Sequence[str]):
        super().__init__(message, 1)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Facts:
    """What a rank knows of itself; of its node, only the first rank there."""

    node: str
    rank: int
    clock: float = 0.0
    same: dict[str, str] = field(default_factory=dict)
    """What must be equal everywhere."""
    unwritable: str = ""
    """Why the run folder cannot be written."""
    unseen: str = ""
    """What to say when the first node's file does not show there."""
    devices: int = 0
    device_free: int = 0
    """Bytes of device memory, 0: no device, or it does not say."""
    first: bool = False
    """Whether this is the first rank on its node, so that what follows is known."""
    disk_free: int | None = None
    memory: int = 0
    memory_free: int = 0
    shm_free: int | None = None
    open_files: int = 0
    checkpoints: int = 0
    """Finished ones in the run folder."""


def preflight(
    recipe: Recipe, device: Device, layout: Layout, run: RunFolder, attempt: int, say: Callable[[str], None]
) -> None:
    """Compare the nodes of this run, and on several also their speed. Collective over all ranks.

    HERD_PREFLIGHT=0 leaves it out, 1 measures speed on one node too. Raises NodeFault on all ranks when nodes are bad,
    UserError when the run folder cannot take the run or when more nodes than not disagree.
    """
    wish = os.environ.get("HERD_PREFLIGHT", "")
    if wish == "0":
        return
    try:
        _preflight(recipe, device, layout, run, attempt, say, alone=wish == "1")
    except UserError:
        _leave_together(attempt)
        raise


def _preflight(
    recipe: Recipe,
    device: Device,
    layout: Layout,
    run: RunFolder,
    attempt: int,
    say: Callable[[str], None],
    alone: bool,
) -> None:
    """`alone`: measure speed on one node too."""
    started = time.perf_counter()
    rank, name = dist.get_rank(), node.node_name()
    met = _gather((name, uuid.uuid4().hex))
    clock = time.time()  # all ranks come out of a gathering within milliseconds
    names, marker = [n for n, _ in met], run.path / f".preflight.{met[0][1]}"
    nodes = list(dict.fromkeys(names))
    speaks = say if rank == 0 else lambda text: None

    def settle(findings: Findings, **measured: Any) -> None:
        record = {"nodes": nodes, "seconds": round(time.perf_counter() - started, 2), **measured}
        if rank == 0:
            with contextlib.suppress(OSError):  # a folder that cannot be written is among the faults
                run.record("preflight", attempt, **record, faults=findings.faults, warnings=findings.warnings)
        for text in findings.warnings:
            speaks(f"preflight: warning: {text}")
        _refuse(findings, nodes)

    try:
        own = collect(recipe, device, run.path, names, clock, marker)
        _all_arrive("their disks and devices", attempt, names)
        facts = _gather(own)
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)
    findings = judge(facts)
    if not findings.faults:
        findings.warnings += space(recipe, run.path, facts)
    if findings.faults or (len(nodes) == 1 and not alone):
        return settle(findings)

    speeds, reduce_seconds = measure(device, attempt, names, findings)
    if not speeds:
        return settle(findings)
    settle(findings, all_reduce_seconds=reduce_seconds, flops=by_node(speeds, "flops"), links=by_node(speeds, "link"))
    speaks(
        f"preflight: {_count(len(nodes), 'node')} in {time.perf_counter() - started:.1f} s: all-reduce of "
        f"{message_bytes(device) >> 20} MiB over {_count(layout.world, 'rank')} {reduce_seconds * 1e3:.1f} ms, "
        + in_words("products", speeds, "flops", 1e9, "GFLOP/s")
        + (", " + in_words("links", speeds, "link", 1e9, "GB/s") if speeds[0].link else "")
    )


def collect(recipe: Recipe, device: Device, folder: Path, names: Sequence[str], clock: float, marker: Path) -> Facts:
    """This rank's facts, and its node's on the first rank there. `marker` is the first rank's file that all must see."""
    rank = dist.get_rank()
    name = names[rank]
    same = {"the resolved recipe": fingerprint(recipe.model_dump_json().encode())}
    devices = free = 0
    if device.type != "cpu":
        devices = torch.accelerator.device_count()
        with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):  # not every backend says
            free = int(torch.accelerator.get_memory_info()[0])
    if names.index(name) != rank:
        return Facts(name, rank, clock, same, devices=devices, device_free=free)
    unwritable = unseen = ""
    if rank == 0:
        with contextlib.suppress(OSError):
            marker.write_text(name)
    if error := node.unwritable(folder):
        unwritable = f"run folder {node.folder_in_words(folder, error)}"
    elif not _shows(marker):
        unseen = f"run folder {folder} does not show what {names[0]} writes there; it must be shared by all nodes"
    memory, memory_free = node.memory()
    return Facts(
        name, rank, clock, same | software(device), unwritable, unseen, devices, free,
        first=True, disk_free=node.free_bytes(folder), memory=memory, memory_free=memory_free,
        shm_free=node.free_bytes(Path("/dev/shm")), open_files=node.open_files(), checkpoints=len(complete(folder)),
    )  # fmt: skip


def software(device: Device) -> dict[str, str]:
    """Versions of all that computes here."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "herd's code": code_hash()}
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | node.drivers()


def code_hash(root: Path = ROOT) -> str:
    """Of every source file that training imports: a node may see another checkout, or an old copy."""
    whole = hashlib.sha256()
    for path in sorted(path for part in ("data_prep", "launch", "llama") for path in (root / part).rglob("*.py")):
        whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def fingerprint(data: bytes) -> str:
    """A short name for these bytes."""
    return hashlib.sha256(data).hexdigest()[:12]


def judge(facts: Sequence[Facts]) -> Findings:
    """What is wrong with which node. Raises UserError when nobody can say which of two software versions is right."""
    findings = Findings()
    firsts = [fact for fact in facts if fact.first]
    for fact in firsts:
        # When the first node cannot write, its file shows nowhere.
        if why := fact.unwritable or ("" if firsts[0].unwritable else fact.unseen):
            findings.blame(fact.node, why)
    _compare_software(facts, findings)
    _compare_devices(facts, findings)

    middle = statistics.median(fact.clock for fact in firsts)
    memory, free = (statistics.median_high(values) for values in zip(*((f.memory, f.memory_free) for f in firsts)))  # noqa: B905
    for fact in firsts:
        warn, off = [], fact.clock - middle
        if abs(off) > CLOCK:
            warn.append(f"its clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the others'")
        if fact.memory < 0.9 * memory:
            warn.append(f"{node.gigabytes(fact.memory)} of memory, others have {node.gigabytes(memory)}")
        elif fact.memory_free < 0.5 * free:
            warn.append(f"{node.gigabytes(fact.memory_free)} of memory free, others have {node.gigabytes(free)}")
        if fact.devices and fact.shm_free is not None and fact.shm_free < SHM:
            warn.append(f"/dev/shm has {fact.shm_free >> 20} MiB free; NCCL wants {SHM >> 20} (docker: --shm-size)")
        # Gloo and NCCL hold sockets to the other ranks, in a few groups; checkpoints hold files.
        if fact.open_files < (wanted := 512 + 4 * len(facts)):
            warn.append(f"a process may open {fact.open_files} files, {len(facts)} ranks want {wanted} (ulimit -n)")
        findings.warnings += [f"{fact.node}: {text}" for text in warn]
    return findings


def _compare_software(facts: Sequence[Facts], findings: Findings) -> None:
    """Nodes whose software is not that of most."""
    nodes = dict.fromkeys(fact.node for fact in facts)
    for what in dict.fromkeys(what for fact in facts for what in fact.same):
        told: dict[str, set[str]] = {name: set() for name in nodes}
        for fact in facts:
            if what in fact.same:
                told[fact.node].add(fact.same[what])
        values = {name: " and ".join(sorted(found)) or "none" for name, found in told.items()}
        counted = Counter(values.values()).most_common()
        if len(counted) == 1:
            continue
        if counted[0][1] == counted[1][1]:
            groups = "; ".join(
                f"{value} on {', '.join(n for n in nodes if values[n] == value)}" for value, _ in counted
            )
            raise UserError(f"preflight: {what} is not the same on all nodes: {groups}; give all nodes the same")
        for name in nodes:
            if values[name] != counted[0][0]:
                findings.blame(name, f"{what} is {values[name]}, on {counted[0][1]} others {counted[0][0]}")


def _compare_devices(facts: Sequence[Facts], findings: Findings) -> None:
    """Nodes that lack a device, or whose devices are in use."""
    usual = statistics.mode(fact.devices for fact in facts)
    middle = statistics.median_high(fact.device_free for fact in facts)
    for fact in facts:
        if fact.first and fact.devices < usual:
            findings.blame(fact.node, f"{_count(fact.devices, 'device')}, others have {usual}")
        if 0 < fact.device_free < LEFT * middle:
            findings.blame(
                fact.node,
                f"rank {fact.rank}'s device has {node.gigabytes(fact.device_free)} free, others "
                f"{node.gigabytes(middle)}: another process uses it",
            )


def checkpoint_bytes(recipe: Recipe) -> int:
    """About what one checkpoint takes: what is trained, and both moments of it."""
    if recipe.lora.rank:
        return 12 * sum(math.prod(shape) for shape in adapter_shapes(recipe).values())
    weight = moment = 4
    if recipe.train.precision == "bf16_sr":
        weight, moment = 2, 4 if recipe.optimizer.state_dtype == "float32" else 2
    return count_parameters(recipe.model)[0] * (weight + 2 * moment)


def space(recipe: Recipe, folder: Path, facts: Sequence[Facts]) -> list[str]:
    """A line when the run folder's disk will not hold the checkpoints; UserError when not one fits."""
    known = [fact.disk_free for fact in facts if fact.disk_free is not None]
    if not known or not (recipe.checkpoint.interval or recipe.checkpoint.at_end):
        return []
    free, one, keep = min(known), checkpoint_bytes(recipe), recipe.checkpoint.keep_last
    if free < one:
        raise UserError(
            f"preflight: run folder {folder} has {node.gigabytes(free)} free, and one checkpoint takes about "
            f"{node.gigabytes(one)}; free some, or choose another run_dir=..."
        )
    more = max(1, keep + 1 - facts[0].checkpoints)  # the newest is written before the oldest goes
    if free >= more * one:
        return []
    return [
        f"run folder {folder} has {node.gigabytes(free)} free, and {more} more checkpoints will take about "
        f"{node.gigabytes(more * one)}; checkpoint.keep_last={keep} keeps fewer when lowered"
    ]


def measure(device: Device, attempt: int, names: Sequence[str], findings: Findings) -> tuple[list[Speed], float]:
    """Each rank's speed and the seconds of an all-reduce, with what is slow added to `findings`.

    No speeds when a device fails: its rank could not take part in a collective. A slow rank gets more turns and its best
    counts, since anything may interrupt a measurement of so short a time.
    """
    rank, seconds, slow = dist.get_rank(), float("inf"), Findings()
    speeds: list[Speed] = []
    for turn in range(TURNS):
        flops, trouble = products(device)
        _all_arrive(f"matrix products ({turn + 1})", attempt, names)
        for i, why in enumerate(_gather(trouble)):
            if why:
                findings.blame(names[i], f"rank {i}: {why}")
        if findings.faults:
            return [], seconds
        seconds = min(seconds, all_reduce(device))
        link = exchange(device, names) if device.pipeline and len(set(names)) > 1 else 0.0
        found = _gather(Speed(names[rank], rank, flops, link))
        speeds = [Speed(new.node, new.rank, max(old.flops, new.flops), max(old.link, new.link))
                  for old, new in zip(speeds or found, found, strict=True)]  # fmt: skip
        slow = judge_speed(speeds, shared=device.type == "cpu")
        if not (slow.faults or slow.warnings):
            break
    findings.faults |= slow.faults
    findings.warnings += slow.warnings
    return speeds, seconds


def _refuse(findings: Findings, nodes: Sequence[str]) -> None:
    """Raise what the faults amount to: what most nodes have is no fault of a node."""
    bad = [name for name in nodes if name in findings.faults]
    if not bad:
        return
    reasons = "; ".join(f"{name}: {', '.join(findings.faults[name])}" for name in bad)
    if len(bad) > len(nodes) / 2:
        raise UserError(f"preflight: {len(bad)} of {_count(len(nodes), 'node')} cannot train: {reasons}")
    raise NodeFault(f"preflight: {reasons}; run on other nodes (sbatch --exclude={','.join(bad)})", bad)


def _all_arrive(stage: str, attempt: int, names: Sequence[str]) -> None:
    """Wait until all ranks have come here: a collective would wait half an hour and name nobody.

    Raises NodeFault naming the nodes that have not after DEADLINE.
    """
    if len(names) == 1:
        return
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    keys = [f"herd/preflight/{attempt}/{stage}/{i}" for i in range(len(names))]
    verdict = f"herd/preflight/{attempt}/{stage}/late"
    store.set(keys[rank], "here")
    late = [names[0]]
    try:
        if rank == 0:
            store.wait(keys, timedelta(seconds=DEADLINE))
            store.set(verdict, "[]")
        else:
            store.wait([verdict], timedelta(seconds=DEADLINE + 10))
        late = json.loads(store.get(verdict))
    except RuntimeError:
        if rank == 0:
            late = list(dict.fromkeys(names[i] for i, key in enumerate(keys) if not store.check([key])))
            store.set(verdict, json.dumps(late))
    if late:
        raise NodeFault(f"preflight: {', '.join(late)}: no answer within {DEADLINE:.0f} s from {stage}", late)


def _leave_together(attempt: int) -> None:
    """Wait until all ranks know the verdict: one that ended before would break the gathering that others are still in."""
    store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    keys = [f"herd/preflight/{attempt}/told/{i}" for i in range(world)]
    with contextlib.suppress(RuntimeError):  # a rank hangs, or the first has ended already and its store with it
        store.set(keys[rank], "told")
        store.wait(keys, timedelta(seconds=FAREWELL))


def _gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank; over gloo, whatever the device."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _shows(path: Path) -> bool:
    """Whether a file that another node writes appears in time."""
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
