"""The end of a run: what was planned beside what was measured."""

from __future__ import annotations

from data_prep.errors import UserError
from llama.config import Recipe
from llama.layout import layout
from llama.plan.speed import Rates, step_time


def known_rates(node_type: str | None, processes: int) -> Rates | None:
    """Rates of a node type, or without one those measured on this machine with so many processes; None: neither is known."""
    from llama.plan.calibrate import load_rates
    from llama.plan.nodes import node_type as find
    from llama.plan.speed import rates_of

    try:
        return rates_of(find(node_type)) if node_type else load_rates(processes)
    except (UserError, ValueError):
        return None


def plan_against_measured(
    recipe: Recipe,
    world: int,
    rates: Rates | None,
    peak_bytes: int | None,
    step_seconds: float | None,
    ranks_per_node: int | None = None,
) -> str:
    """One line: memory and seconds of a step as planned, of what was measured, and how far off the plan was.

    Args:
        rates: None leaves the speed out.
        peak_bytes: on the rank that held most, of the model and its step alone: without the bytes of a process before it
            has a model. None leaves memory out.
        step_seconds: without validations and checkpoints; None leaves it out.
    Empty where nothing is left.
    """
    from llama.plan.analytic import foresee, representatives

    laid = layout(recipe, world)
    counts = [foresee(recipe, world, rank) for rank in representatives(recipe, world)]
    parts = []
    if peak_bytes:
        planned = max(one.memory.peak for one in counts)
        parts.append(f"memory {planned / 1e9:.2f} of {peak_bytes / 1e9:.2f} GB ({_off(planned, peak_bytes)})")
    if rates is not None and step_seconds:
        per_node = ranks_per_node or world
        times = [step_time(one, recipe, laid, rates, -(-world // per_node), per_node).total for one in counts]
        parts.append(f"step {max(times):.3g} of {step_seconds:.3g} s ({_off(max(times), step_seconds)})")
    return f"plan against measured: {', '.join(parts)}" if parts else ""


def _off(planned: float, measured: float) -> str:
    return f"{planned / measured - 1:+.0%}".replace("%", " %")
