"""Which node is slow: a matrix product on each rank, a sum over all, and each node with two others. Collective.

A collective is as slow as its slowest rank on all of them, so it names nobody. NVIDIA's resiliency extension times
kernels of each rank against the median, dlrover pairs nodes in two rounds, Megatron-LM's sniff test does both; so does this.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from llama.device import Device

SLOW, BAD = 0.8, 0.5
"""Speeds, against the median, that are worth a line and that make a node bad: all train at the pace of the slowest, so at
half the pace it is better to wait for another node. Chosen, not measured: no accelerator has run this yet."""
SHARED = 0.4
"""The same for a line about CPUs, whose cores others may use: twenty measurements of four processes on two busy cores
went down to 0.53. A CPU node is never bad for it."""
PRODUCT_SECONDS = 0.15
MESSAGE = {"cpu": 4 << 20}
"""Bytes of the timed all-reduce and exchange; elsewhere 32 MiB, enough to fill a link of 400 Gbit/s for a millisecond."""


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


def message_bytes(device: Device) -> int:
    return MESSAGE.get(device.type, 32 << 20)


def all_reduce(device: Device) -> float:
    """Seconds of a sum over all ranks, at best."""
    values, best = torch.ones(message_bytes(device) // 4, device=device.torch()), float("inf")
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
    send = torch.ones(message_bytes(device) // 4, device=device.torch())
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


def by_node(speeds: Sequence[Speed], kind: str) -> dict[str, float]:
    """The slowest rank of each node."""
    found: dict[str, float] = {}
    for speed in speeds:
        found[speed.node] = min(found.get(speed.node, float("inf")), round(getattr(speed, kind)))
    return found


def in_words(what: str, speeds: Sequence[Speed], kind: str, unit: float, name: str) -> str:
    usual, nodes = _median(speeds, kind), by_node(speeds, kind)
    slowest = min(nodes, key=lambda n: nodes[n])
    where = f" (slowest {slowest}, {nodes[slowest] / usual:.2f} of the median)" if len(nodes) > 1 else ""
    return f"{what} {usual / unit:.3g} {name}{where}"
