"""What one rank does and holds in one training step: counted by running the real code dry (llama/plan/dry.py), or foreseen
by formulas (llama/plan/analytic.py). Both give the same types, so that one can be held against the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send", "recv"]


@dataclass(frozen=True)
class Collective:
    """Calls of one kind over one group, in a step."""

    kind: Kind
    axis: str
    """Mesh axis that the group lies along (tp, dp_shard, dp_replicate, pp), or `world`."""
    ranks: int
    """Ranks in the group."""
    bytes: int
    """Of one call: the larger side of it on one rank, so what an all-gather gives and a reduce-scatter takes."""
    calls: int


@dataclass(frozen=True)
class Product:
    """Matrix products of one shape, or attention kernels, in a step. (m, k) x (k, n), `batch` times."""

    kind: Literal["mm", "attention", "attention_backward"]
    shape: tuple[int, ...]
    """mm: (batch, m, k, n). Attention: (batch, heads, queries, keys, head size)."""
    dtype: str
    """Of the operands, as in `bfloat16`."""
    calls: int
    flops: int
    """Of all calls; attention in full, also where half of its matrix is masked."""


@dataclass(frozen=True)
class Memory:
    """Bytes that live at the moment when this rank holds most. They add up to `peak`."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Weights that FSDP has gathered from other ranks, and gradients before they are scattered."""
    activations: int
    """All else: what forward keeps for backward, and what the operators of that moment work on."""

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class Counts:
    """One rank's step: all micro-batches, the step's one reduction, clipping and the update."""

    rank: int
    stage: int
    """Place in the pipeline."""
    products: tuple[Product, ...]
    moved: int
    """Bytes that all other operators read and write."""
    operators: int
    """How many operators are called, of any kind."""
    collectives: tuple[Collective, ...]
    memory: Memory
    notes: tuple[str, ...] = field(default=())
    """What could not be counted as it would be on the device."""

    @property
    def flops(self) -> int:
        """Of products and attention, recomputation included."""
        return sum(product.flops for product in self.products)
