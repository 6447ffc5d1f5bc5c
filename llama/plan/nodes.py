"""Kinds of nodes as their makers publish them: what a plan reckons with where nobody measured.

NVIDIA data sheets of A100, H100, H200, B200; AWS pages of the EC2 instance types and of Trainium2/3 (Neuron 2.33).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class NodeType:
    """A node of a cluster. Rates are published peaks in bytes/s and FLOP/s, in one direction."""

    name: str
    device: str
    """cpu, cuda or neuron."""
    ranks: int
    """Processes: one a GPU, one a logical NeuronCore."""
    memory: int
    """Bytes of a rank's own memory."""
    flops: float
    """Dense bf16 of one rank."""
    flops_fp32: float
    """Of one rank's fp32 products as PyTorch does them by default."""
    bandwidth: float
    """Of a rank's memory."""
    link: float
    """From one rank to its peers in the node."""
    network: float
    """From the whole node to others."""
    host_memory: int
    close: int
    """Ranks that share the fastest links, where tensor parallelism belongs."""
    mfu: float
    """Share of `flops` that a plan assumes for matrix products where it is not told another; see docs/plan.md."""
    latency: float = 20e-6
    """Seconds of one hop of a collective."""


def _node(name: str, device: str, ranks: int, gib: float, tera: float, tera32: float, hbm: float, link: float,
          gbit: float, host: int, close: int, mfu: float) -> NodeType:  # fmt: skip
    return NodeType(
        name, device, ranks, int(gib * GIB), tera * 1e12, tera32 * 1e12, hbm * 1e9, link * 1e9, gbit / 8 * 1e9, host * GIB,
        close, mfu,
    )  # fmt: skip


# name, device, ranks, GiB a rank (as the driver tells it), bf16 and fp32 TFLOP/s a rank, GB/s of memory, GB/s in the node a
# rank, Gbit/s of the node, GiB of host memory, ranks close together, share of the peak.
_NODES = (
    # A chip: 667 TFLOP/s bf16, 181 fp32, 96 GiB, 2.9 TB/s, NeuronLink 1.28 TB/s both ways. Four ranks a chip at LNC 2.
    _node("trn2.48xlarge", "neuron", 64, 24, 667 / 4, 181 / 4, 2900 / 4, 640 / 4, 3200, 2048, 4, 0.35),
    # A chip: 671 TFLOP/s bf16 (as published for the 16-chip server's share), 144 GiB, 4.9 TB/s.
    _node("trn3", "neuron", 64, 36, 671 / 4, 183 / 4, 4900 / 4, 1280 / 4, 3200, 2048, 4, 0.35),
    _node("8xa100-40", "cuda", 8, 39.4, 312, 19.5, 1555, 300, 400, 1152, 8, 0.55),  # p4d.24xlarge
    _node("8xa100", "cuda", 8, 79.1, 312, 19.5, 2039, 300, 400, 1152, 8, 0.55),  # p4de.24xlarge
    _node("8xh100", "cuda", 8, 79.1, 989, 67, 3350, 450, 3200, 2048, 8, 0.5),  # p5.48xlarge
    _node("8xh200", "cuda", 8, 139.8, 989, 67, 4800, 450, 3200, 2048, 8, 0.5),  # p5e, p5en.48xlarge
    _node("8xb200", "cuda", 8, 178.3, 2250, 75, 8000, 900, 3200, 2048, 8, 0.45),  # p6-b200.48xlarge
)
_ALIASES = {
    "trn2": "trn2.48xlarge", "trn2u.48xlarge": "trn2.48xlarge", "p4d.24xlarge": "8xa100-40", "p4de.24xlarge": "8xa100",
    "p5.48xlarge": "8xh100", "p5e.48xlarge": "8xh200", "p5en.48xlarge": "8xh200", "p6-b200.48xlarge": "8xb200",
}  # fmt: skip


def node_type(name: str) -> NodeType:
    """The node called `name`, an instance type or another of its names. Raises ValueError with the known ones."""
    wanted = name.lower()
    wanted = _ALIASES.get(wanted, wanted)
    for node in _NODES:
        if node.name == wanted:
            return node
    known = ", ".join([node.name for node in _NODES] + list(_ALIASES))
    raise ValueError(f"node type {name!r} is not known; give one of {known}, or cpu after herd plan --calibrate")
