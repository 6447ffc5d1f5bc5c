"""A rank's step by formulas, in a millisecond and without torch: what llama/plan/dry.py counts by running the code.

Products and collectives are exact. Memory takes the worst of a step's moments (analytic_memory.py). Bytes moved by other
operators, and how many there are, are near: within 15 % of what is counted.
"""

from __future__ import annotations

from llama.config import Recipe
from llama.layout import layout
from llama.plan.analytic_memory import local, step_memory
from llama.plan.analytic_moved import step_moved
from llama.plan.analytic_parts import BATCH_BYTES, held
from llama.plan.analytic_products import step_products
from llama.plan.analytic_traffic import step_collectives
from llama.plan.counts import Counts


def foresee(recipe: Recipe, world: int, rank: int = 0) -> Counts:
    """The step of `rank` among `world`. Raises ValueError, naming a remedy, where the recipe does not lay out on them."""
    part = held(recipe, world, rank)
    moved, operators = step_moved(part)
    return Counts(
        rank=rank,
        stage=part.stage_rank,
        products=step_products(part),
        moved=moved,
        operators=operators,
        collectives=step_collectives(part),
        memory=step_memory(part),
    )


def representatives(recipe: Recipe, world: int) -> list[int]:
    """Ranks that stand for all: one of each pipeline rank, and of those the one with the largest shards.

    Rows are dealt in equal pieces until they are used up, so that no shard is larger than the first. Raises ValueError
    as `foresee` does.
    """
    pipeline = layout(recipe, world).pipeline
    return [stage * (world // pipeline) for stage in range(pipeline)]


def host_memory(
    recipe: Recipe, world: int, ranks_per_node: int, device_is_cpu: bool, process: int = 600 << 20
) -> dict[str, int]:
    """Bytes of a node's main memory, by what they are for; the sum is what must fit. Of the node with the largest ranks.

    Args:
        process: what a process takes before it has a model: Python, torch, its libraries.
    """
    ranks = min(ranks_per_node, world)
    parts = [held(recipe, world, rank) for rank in representatives(recipe, world)]
    saved = max(local(part, "item") + 2 * local(part, part.moments, trained=True) for part in parts)
    if recipe.lora.rank:
        saved = max((part.weights + 2 * part.moments) * local(part, 1, trained=True) for part in parts)
    batch = BATCH_BYTES * recipe.train.micro_batch_size * recipe.data.seq_length * parts[0].layout.accumulation
    found = {
        "processes": process * ranks,
        # Steps read ahead, and the one that is trained.
        "batches": batch * (recipe.data.prefetch + 1) * ranks,
        # A checkpoint's copy, from which it is written while training goes on.
        "checkpoint": saved * ranks,
    }
    if device_is_cpu:
        found["training"] = max(step_memory(part).peak for part in parts) * ranks
    return found
