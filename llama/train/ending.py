"""What a run says at its end: the plan against what was measured (llama/plan/standing.py)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from llama.config import Recipe
from llama.device import Device

FEWEST = 5
"""Steps that a typical one can be told from."""


def plan_against_measured(recipe: Recipe, device: Device, seconds: Sequence[float]) -> str:
    """One line, the same on all ranks; empty where there is nothing to tell. Collective over all ranks.

    On a CPU it is the step's time alone, and that where somebody calibrated it: what a process keeps there beyond what is in
    use is the allocator's affair. `seconds`: of the last steps of this rank.
    """
    typical = statistics.median(seconds) if len(seconds) >= FEWEST else 0.0
    most = torch.tensor([device.peak_memory() / 1e6, typical], device=device.torch())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    peak, step = most.tolist()
    if not step:
        return ""
    from llama.plan import standing

    world, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    try:
        rates = standing.known_rates(_node_type(device), here)
        memory = None if device.type == "cpu" else round(1e6 * peak)
        return standing.plan_against_measured(recipe, world, rates, memory, step, here)
    except Exception as error:  # whatever it is, the run is done and saved
        return f"plan against measured: no plan ({type(error).__name__}: {str(error).splitlines()[:1]})"


def _node_type(device: Device) -> str | None:
    """What llama/plan/nodes.py calls nodes of this device; None for a CPU."""
    if device.type == "cuda":
        return next((f"8x{word.lower()}" for word in device.name.split() if word[1:].isdigit()), device.name)
    return None if device.type == "cpu" else {"trn2": "trn2.48xlarge"}.get(device.name, device.name)
