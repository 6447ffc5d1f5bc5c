"""Whether a recipe fits on nodes and how long it takes: counts of its ranks against what the nodes have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama.config import Recipe
from llama.layout import Layout, layout
from llama.plan.analytic import foresee, host_memory, representatives
from llama.plan.counts import Counts
from llama.plan.nodes import GIB, NodeType
from llama.plan.speed import Rates, RunCost, StepTime, run_cost, step_time

FRAGMENTS = 0.05
"""Of the peak, what an allocator loses between its blocks. Assumed; torch's expandable segments keep it about there."""


@dataclass(frozen=True)
class Place:
    """Where a recipe would run."""

    node: NodeType
    nodes: int

    @property
    def world(self) -> int:
        return self.node.ranks * self.nodes

    @property
    def words(self) -> str:
        return f"{self.nodes} × {self.node.name}"


@dataclass(frozen=True)
class Estimate:
    """A recipe on a place."""

    recipe: Recipe
    layout: Layout
    place: Place
    counts: tuple[Counts, ...]
    """Of the ranks that differ from each other, one a pipeline stage."""
    base: int
    """Bytes that a rank takes before it has a model."""
    step: StepTime

    @property
    def worst(self) -> Counts:
        """The rank that holds most."""
        return max(self.counts, key=lambda counts: counts.memory.peak)

    @property
    def fragments(self) -> int:
        """Bytes between an allocator's blocks."""
        return round(FRAGMENTS * self.worst.memory.peak) if self.place.node.device != "cpu" else 0

    @property
    def memory(self) -> int:
        """Bytes of the rank that needs most, all told."""
        return self.worst.memory.peak + self.fragments + self.base

    @property
    def share(self) -> float:
        """Of a rank's memory."""
        return self.memory / self.place.node.memory

    @property
    def fits(self) -> bool:
        return self.share <= 1 and sum(self.host.values()) <= self.place.node.host_memory

    @property
    def host(self) -> dict[str, int]:
        """Bytes of a node's main memory by what they are for."""
        node = self.place.node
        return host_memory(self.recipe, self.place.world, node.ranks, node.device == "cpu")

    @property
    def cost(self) -> RunCost:
        return run_cost(self.step.total, self.recipe, self.place.nodes, self.place.world, self.place.node.flops)


def estimate(recipe: Recipe, place: Place, rates: Rates, counts: Sequence[Counts] = ()) -> Estimate:
    """What `recipe` takes on `place`, from `counts` or else from formulas. Raises ValueError when it does not lay out."""
    laid = layout(recipe, place.world)
    counts = tuple(counts) or tuple(foresee(recipe, place.world, rank) for rank in representatives(recipe, place.world))
    steps = [step_time(one, recipe, laid, rates, place.nodes, place.node.ranks) for one in counts]
    return Estimate(recipe, laid, place, tuple(counts), rates.base, max(steps, key=lambda step: step.total))


def gib(count: float) -> str:
    """Bytes for a person."""
    return f"{count / GIB:.1f} GiB" if count >= 0.95 * GIB else f"{count / (1 << 20):.0f} MiB"
