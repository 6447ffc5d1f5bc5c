"""Before a long run: do all nodes run the same software, share the run folder, and compute and talk alike? Bad ones are named.

Runs inside the training processes, before the model is built, so that it costs no second start of Python. Facts of all
ranks are gathered on all ranks, which judge them alike. A node is bad against the others, never against a table. As
NVIDIA's resiliency extension, dlrover's node check and Megatron-LM's sniff test do, it times a matrix product on each
rank; the slow end of a slow link is found by timing each node with two others, since a collective is slow everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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
from llama.run_folder import RunFolder, complete

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch-neuronx", "neuronx-cc")

DEADLINE = 60.0
"""Seconds for a node to look at its own disks and devices: a healthy one takes 0.1, a dead file server for ever."""
SEEN_WITHIN = 5.0
"""Seconds for the first node's file to show on the others: NFS shows a new name at once, object stores take a while."""
SLOW, BAD = 0.8, 0.5
"""Speeds, against the median, that are worth a line and that make a node bad. GPUs of one kind lie within 5 %; one that
is throttled by heat or lost a part of its link loses a third or more. Training goes at the pace of the slowest."""
SHARED = 0.4
"""The same for a line about CPUs, whose cores others may use: twenty measurements of four processes on two busy cores
went down to 0.53. A CPU node is never bad for it."""
LEFT = 0.8
"""Free device memory, against the median, below which somebody else must be on the device."""
CLOCK = 2.0
"""Seconds between clocks that are worth a line; NTP keeps them within milliseconds."""
SHM = 1 << 30
"""Bytes of /dev/shm that NCCL asks for among the ranks of a node (its documentation)."""
PRODUCT_SECONDS = 0.15
TURNS = 3
"""Measurements that a slow rank gets before it is called so."""
MESSAGE = {"cpu": 4 << 20}
"""Bytes of the timed all-reduce and exchange; elsewhere 32 MiB, enough to fill a link of 400 Gbit/s for a millisecond."""


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


@dataclass(frozen=True)
class Speed:
    """What a rank measured."""

    node: str
    rank: int
    flops: float
    link: float = 0.0
    """Bytes a second with the better of two other nodes; 0: not measured."""


@dataclass
class Findings:
    """What the facts say: why nodes are bad, and what is only worth a line."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def blame(self, name: str, why: str) -> None:
        self.faults.setdefault(name, []).append(why)


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
    if findings.faults or (len(nodes) == 1 and wish != "1"):
        return settle(findings)

    speeds, reduce_seconds = measure(device, attempt, names, findings)
    if not speeds:
        return settle(findings)
    settle(findings, all_reduce_seconds=reduce_seconds, flops=_by_node(speeds, "flops"), links=_by_node(speeds, "link"))
    speaks(
        f"preflight: {_count(len(nodes), 'node')} in {time.perf_counter() - started:.1f} s: all-reduce of "
        f"{_message_bytes(device) >> 20} MiB over {_count(layout.world, 'rank')} {reduce_seconds * 1e3:.1f} ms, "
        + _in_words("products", speeds, "flops", 1e9, "GFLOP/s")
        + (", " + _in_words("links", speeds, "link", 1e9, "GB/s") if speeds[0].link else "")
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
        shm_free=node.free_bytes(Path("/dev/shm")), open_files=node.open_files(),
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
    """About what one checkpoint takes: weights and both moments."""
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
    more = max(1, keep + 1 - len(complete(folder)))  # the newest is written before the oldest goes
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


def products(device: Device) -> tuple[float, str]:
    """FLOP/s of this rank at its best, and what is wrong with its device."""
    side = 512 if device.type == "cpu" else 4096
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        a = torch.ones(side, side, dtype=dtype, device=device.torch())
        out = torch.mm(a, a)  # chooses a kernel, or compiles it
        device.synchronize()
        best, started = float("inf"), time.perf_counter()
        while (now := time.perf_counter()) - started < PRODUCT_SECONDS:
            out = _product(a, out)
            device.synchronize()
            best = min(best, time.perf_counter() - now)
        # Sums of ones are exact in every type, whatever the order.
        wrong = int((out != side).sum())
        return 2 * side**3 / best, f"{wrong} of {side * side} sums are wrong" if wrong else ""
    except RuntimeError as error:
        return 0.0, f"a matrix product failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _product(a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, a, out=out)


def _message_bytes(device: Device) -> int:
    return MESSAGE.get(device.type, 32 << 20)


def all_reduce(device: Device) -> float:
    """Seconds of a sum over all ranks, at best."""
    values, best = torch.ones(_message_bytes(device) // 4, device=device.torch()), float("inf")
    for _ in range(4):  # the first connects the ranks
        started = time.perf_counter()
        dist.all_reduce(values.fill_(1.0))
        device.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def exchange(device: Device, names: Sequence[str]) -> float:
    """Bytes a second that this rank sends and receives at once, with the better of the two nodes it is paired with.

    Nodes stand in a ring. All pairs talk at the same time in two rounds, or three when their number is odd, so that it
    takes no longer on many nodes. A slow node is slow with both neighbours, its neighbours only with it.
    """
    nodes = {name: [r for r, n in enumerate(names) if n == name] for name in names}
    mine, rank = list(nodes).index(names[dist.get_rank()]), dist.get_rank()
    place, ranks = nodes[names[rank]].index(rank), list(nodes.values())
    send = torch.ones(_message_bytes(device) // 4, device=device.torch())
    receive, fastest = torch.empty_like(send), 0.0
    for pairs in rounds(len(nodes)):
        peers = [b if a == mine else a for a, b in pairs if mine in (a, b)]
        if not peers or place >= len(ranks[peers[0]]):
            continue
        peer, best = ranks[peers[0]][place], float("inf")
        for _ in range(4):  # the first waits for the other
            started = time.perf_counter()
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, send, peer), dist.P2POp(dist.irecv, receive, peer)]
            ):
                work.wait()
            device.synchronize()
            best = min(best, time.perf_counter() - started)
        fastest = max(fastest, send.nbytes / best)
    return fastest


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours in a ring of nodes, in rounds in which no node has two partners."""
    edges = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else nodes - 1)]
    even = len(edges) - len(edges) % 2
    return [part for part in (edges[0:even:2], edges[1:even:2], edges[even:]) if part]


def judge_speed(speeds: Sequence[Speed], shared: bool) -> Findings:
    """Nodes that are slow against the median of all ranks; on `shared` cores that is never a fault."""
    findings = Findings()
    for kind, what in (("flops", "matrix products"), ("link", "exchanges with two other nodes")):
        slowest: dict[str, Speed] = {}
        for speed in speeds:
            if getattr(speed, kind) > 0:
                slowest[speed.node] = min(slowest.get(speed.node, speed), speed, key=lambda s: float(getattr(s, kind)))
        usual = _median(speeds, kind)
        for name, speed in slowest.items():
            share = getattr(speed, kind) / usual
            text = f"{what} of rank {speed.rank} run at {share:.2f} of the median"
            if share < BAD and not shared:
                findings.blame(name, text)
            elif share < (SHARED if shared else SLOW):
                findings.warnings.append(f"{name} is slow: {text}")
    return findings


def _median(speeds: Sequence[Speed], kind: str) -> float:
    """The upper one, so that of two the slow one is told."""
    return statistics.median_high([getattr(s, kind) for s in speeds if getattr(s, kind) > 0] or [1.0])


def _by_node(speeds: Sequence[Speed], kind: str) -> dict[str, float]:
    """The slowest rank of each node."""
    found: dict[str, float] = {}
    for speed in speeds:
        found[speed.node] = min(found.get(speed.node, float("inf")), round(getattr(speed, kind)))
    return found


def _in_words(what: str, speeds: Sequence[Speed], kind: str, unit: float, name: str) -> str:
    usual, by_node = _median(speeds, kind), _by_node(speeds, kind)
    slowest = min(by_node, key=lambda n: by_node[n])
    where = f" (slowest {slowest}, {by_node[slowest] / usual:.2f} of the median)" if len(by_node) > 1 else ""
    return f"{what} {usual / unit:.3g} {name}{where}"


def _refuse(findings: Findings, nodes: Sequence[str]) -> None:
    """Raise what the faults amount to: what most nodes have is no fault of a node."""
    bad = [name for name in nodes if name in findings.faults]
    if not bad:
        return
    reasons = "; ".join(f"{name}: {', '.join(findings.faults[name])}" for name in bad)
    if len(bad) > len(nodes) / 2:
        raise UserError(f"preflight: {len(bad)} of {_count(len(nodes), 'node')} cannot train: {reasons}")
    raise NodeFault(f"preflight: {reasons}", bad)


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
