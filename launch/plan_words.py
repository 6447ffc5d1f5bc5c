"""What `herd plan` found, in words for a person and as data for a script."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama.plan.estimate import FRAGMENTS, Estimate, gib
from llama.plan.speed import FUSED, Rates
from llama.plan.suggest import Candidate, Suggestion, parts_of, reasons

if TYPE_CHECKING:
    from llama.plan.counts import Counts


def estimate_in_words(found: Estimate, rates: Rates, dry: bool) -> list[str]:
    """Lines on validity, memory, time, cost and what was assumed."""
    r, memory, step, cost = found.recipe, found.worst.memory, found.step, found.cost
    limit = found.place.node.memory
    lines = [
        f"recipe      {r.name} on {found.place.words}: {found.place.world:,} ranks, {found.layout.name}",
        f"a step      {r.train.global_batch_size:,} sequences of {r.data.seq_length:,}: {r.tokens_per_step:,} tokens, "
        f"{found.layout.accumulation} micro-batches of {r.train.micro_batch_size} a rank",
        f"memory      {gib(found.memory)} of {gib(limit)} a rank ({found.share:.0%}), "
        + ("it fits" if found.fits else "IT DOES NOT FIT"),
        f"            weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, optimizer {gib(memory.optimizer)}, "
        f"gathered {gib(memory.gathered)}, activations {gib(memory.activations)}",
        f"            between blocks {gib(found.fragments)}, before there is a model {gib(found.base)}; "
        f"the worst is rank {found.worst.rank}" + (f" of stage {found.worst.stage}" if len(found.counts) > 1 else ""),
    ]
    if len(found.counts) > 1:
        each = ", ".join(gib(counts.memory.peak) for counts in found.counts)
        lines.append(f"            by stage {each}")
    host = sum(found.host.values())
    lines.append(
        f"host        {gib(host)} of {gib(found.place.node.host_memory)} a node: "
        + ", ".join(f"{name} {gib(size)}" for name, size in found.host.items())
        + ("" if host <= found.place.node.host_memory else "; IT DOES NOT FIT")
    )
    parts = {name: seconds for name, seconds in parts_of(step).items() if seconds > 0.002 * step.total}
    lines.append(
        f"time        {_seconds(step.total)} a step: " + ", ".join(f"{n} {_seconds(s)}" for n, s in parts.items())
    )
    if step.overlapped:
        lines.append(f"            and {_seconds(step.overlapped)} of sending while it computes")
    lines += [
        f"speed       {cost.tokens_per_second:,.0f} tokens/s, {cost.tokens_per_second / found.place.world:,.0f} a rank; "
        f"MFU {cost.mfu_full:.1%} (attention in full), {cost.mfu_causal:.1%} (causal)",
        f"run         {r.train.steps:,} steps, {r.train.steps * r.tokens_per_step / 1e9:,.1f}B tokens: {_days(cost.days)}, "
        f"{cost.node_hours:,.1f} node-hours",
        f"checkpoint  {gib(cost.checkpoint_bytes)}"
        + (f" every {r.checkpoint.interval} steps" if r.checkpoint.interval else " at the end")
        + f", written in {_seconds(cost.checkpoint_seconds)}"
        + (" in the background" if r.checkpoint.save_async else ""),
        "counted     " + ("by running the step's code dry" if dry else "by formulas") + f": {_counts(found.worst)}",
        f"assumed     {rates.source}" + (f"; compiled blocks move {FUSED:.0%} of the bytes of single operators" if r.train.compile else "")
        + (f"; an allocator loses {FRAGMENTS:.0%}" if found.fragments else ""),
    ]  # fmt: skip
    lines += [f"            {note}" for note in found.worst.notes]
    if not found.fits:
        lines.append("herd plan --suggest with the same arguments searches for what fits")
    return lines


def suggestion_in_words(found: Suggestion, told: bool) -> list[str]:
    """The best layouts, why the others lose, and what was ruled out."""
    lines = [""] if told else []
    lines.append(f"{found.tried:,} ways to lay it out were tried by formulas")
    for reason, count in sorted(found.ruled_out.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:>5,} ruled out: {reason}")
    if not found.best:
        return [*lines, "none fits; take more nodes, a smaller train.micro_batch_size or nodes with more memory"]
    winner = found.best[0]
    for place, candidate in enumerate(found.best, 1):
        step, share = candidate.found.step.total, candidate.found.share
        lines.append(f"{place}. {candidate.words}")
        lines.append(
            f"   {_seconds(step)} a step, {candidate.found.cost.tokens_per_second:,.0f} tokens/s, memory {share:.0%}: "
            + (_praise(winner) if candidate is winner else reasons(winner, candidate))
        )
        lines.append(f"   {candidate.overrides or 'the recipe as it is'}")
    if found.too_big is not None:
        big = found.too_big
        lines.append(
            f"faster, but too big: {big.words}: {_seconds(big.found.step.total)} a step, {gib(big.found.memory)} of "
            f"{gib(big.found.place.node.memory)}"
        )
    if found.own is not None:
        own = found.own
        where = "does not fit" if not own.found.fits else reasons(winner, own)
        lines.append(f"the recipe as it is: {own.words}: {_seconds(own.found.step.total)} a step, {where}")
    return lines


def _praise(winner: Candidate) -> str:
    """Where the winner's time goes."""
    parts = sorted(parts_of(winner.found.step).items(), key=lambda item: -item[1])
    total = winner.found.step.total
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts if seconds > 0.03 * total)


def _counts(counts: Counts) -> str:
    sent: dict[str, int] = {}
    for one in counts.collectives:
        sent[one.axis] = sent.get(one.axis, 0) + one.bytes * one.calls
    words = ", ".join(f"{gib(size)} over {axis}" for axis, size in sent.items() if size)
    return f"{counts.flops / 1e12:,.2f} TFLOP, {counts.operators:,} operators" + (f", {words}" if words else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _days(days: float) -> str:
    return (
        f"{days:,.1f} days"
        if days >= 2
        else f"{24 * days:.1f} hours"
        if days >= 1 / 12
        else f"{1440 * days:.1f} minutes"
    )


def as_data(found: Estimate | None, rates: Rates, suggestion: Suggestion | None) -> dict[str, Any]:
    """Everything, for --json."""
    data: dict[str, Any] = {} if found is None else _estimate_data(found) | {"rates": rates.to_json()}
    if suggestion is not None:
        data["suggest"] = {
            "tried": suggestion.tried,
            "ruled_out": suggestion.ruled_out,
            "best": [
                {"changes": c.changes, "reason": "" if i == 0 else reasons(suggestion.best[0], c), **_estimate_data(c.found)}
                for i, c in enumerate(suggestion.best)
            ],
        }  # fmt: skip
    return data


def _estimate_data(found: Estimate) -> dict[str, Any]:
    return {
        "recipe": found.recipe.name,
        "layout": found.layout.model_dump(),
        "nodes": found.place.nodes,
        "node_type": found.place.node.name,
        "fits": found.fits,
        "memory": asdict(found.worst.memory)
        | {"fragments": found.fragments, "base": found.base, "total": found.memory, "limit": found.place.node.memory},
        "host_memory": found.host,
        "memory_by_stage": {str(counts.stage): asdict(counts.memory) for counts in found.counts},
        "step_seconds": parts_of(found.step) | {"total": found.step.total, "overlapped": found.step.overlapped},
        "cost": asdict(found.cost),
        "flops": found.worst.flops,
        "collectives": [asdict(one) for one in found.worst.collectives],
        "notes": list(found.worst.notes),
    }  # fmt: skip
