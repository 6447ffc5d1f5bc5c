"""What a rank holds at the worst moment of a step: the step walked through, unit by unit, in the order in which it runs.

The moments that can be worst are the forward and backward of each block, FSDP's gathering and scattering, the output's
logits, and the update. All blocks that are alike are worked out once.
"""

from __future__ import annotations

from llama.plan.analytic_parts import BATCH_BYTES, Held
from llama.plan.analytic_pipeline import piped_step
from llama.plan.analytic_tape import PARTS, Tape
from llama.plan.analytic_walk import Walk
from llama.plan.counts import Memory


def step_memory(held: Held) -> Memory:
    """The worst moment of a step after the first, when the moments of AdamW are there."""
    tape = Tape()
    persistent(tape, held)
    if held.layout.pipeline > 1:
        piped_step(tape, held)
    else:
        # The last micro-batch holds most: of several, the first have left gradients.
        later = held.layout.accumulation > 1
        if later:
            # Between copies of the shards sums wait in fp32 for the last micro-batch; else they are gradients already.
            waits = held.sharded and held.layout.replicate > 1
            size = local(held, 4 if waits else held.weights, trained=True, padded=True)
            tape.make("activations" if waits else "gradients", gradients=size)
        Walk(tape, held, later).step(held.stages[0])
    update(tape, held)
    return Memory(**dict(zip(PARTS, tape.most, strict=True)))


def local(held: Held, item: str | int, trained: bool = False, padded: bool = False) -> int:
    """Bytes of this rank's part of all weights, an element taking `item` bytes or that of the weight's field. `padded`: as
    FSDP holds them, every rank as much as the first."""
    total, shard = 0, held.layout.shard if held.sharded else 1
    for unit in held.units:
        for w in unit.weights:
            if w.trained or not trained:
                size = item if isinstance(item, int) else getattr(w, item)
                total += size * (w.padded(shard) if padded else w.shard(shard, held.shard_rank if shard > 1 else 0))
    return total


def persistent(tape: Tape, held: Held) -> None:
    """What lives through the whole run."""
    tape.make("weights", weights=local(held, "item", padded=True), buffers=sum(unit.buffers for unit in held.units))
    counters = 4 * sum(w.trained for unit in held.units for w in unit.weights)
    tape.make("optimizer", moments=2 * local(held, held.moments, trained=True) + counters)
    tape.make(batches=BATCH_BYTES * held.tokens * held.layout.accumulation)


def update(tape: Tape, held: Held) -> None:
    """AdamW's own tensors. The fused one makes none; ours for bf16 works on a parameter at a time in fp32: gradient, mean,
    root, new weight, noise, noisy, rounded, finite, and the result in bf16 (llama/train/optim.py)."""
    if held.recipe.train.precision == "bf16_sr":
        pieces = (w.shard(held.layout.shard, held.shard_rank) if held.sharded else w.size
                  for unit in held.units for w in unit.weights if w.trained)  # fmt: skip
        element = 8 * 4 - 1 + (4 if held.moments == 2 else 0)
        tape.make(update=element * max(pieces, default=0))
        tape.free("update")
