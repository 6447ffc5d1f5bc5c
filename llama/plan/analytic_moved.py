"""Bytes that a rank's operators move beside its products, and how many operators it calls: near, within 15 %.

Counted operator by operator as analytic_block.py has them, in multiples of the tensors they read and write.
"""

from __future__ import annotations

from collections import Counter

from llama.plan.analytic_memory import local
from llama.plan.analytic_operators import Sizes, sizes
from llama.plan.analytic_parts import Held, Unit
from llama.plan.analytic_products import chunks
from llama.plan.analytic_traffic import gathers
from llama.targets import HEAD


def step_moved(held: Held) -> tuple[int, int]:
    """(bytes moved, operators called) in a step."""
    s, moved, operators = sizes(held), 0, 0
    micro_batches = held.layout.accumulation
    for stage in held.stages:
        moved += micro_batches * 3 * held.tokens * held.recipe.model.head_size * 4  # cosines and sines
        operators += 12 * micro_batches
        for unit, times in Counter(stage.units).items():
            if unit.kind == "block":
                a, b = _block(held, unit, s)
            else:
                a, b = _ends(held, unit, s)
            moved, operators = moved + a * times * micro_batches, operators + b * times * micro_batches
            if held.sharded:
                a, b = _data(held, unit)
                count = gathers(held, stage, unit)
                moved, operators = moved + a * times * count, operators + b * times * count
                if unit.trains:  # into what is scattered, in fp32; then cast and added to what is there
                    rounds = micro_batches if held.layout.pipeline == 1 else 1
                    size = unit.total("", 1, trained=True)
                    moved += times * rounds * (size + 3 * size // held.layout.shard)
                    operators += times * rounds * (2 + sum(w.trained for w in unit.weights))
    a, b = _update(held)
    return moved + a, operators + b


def _block(held: Held, unit: Unit, s: Sizes) -> tuple[int, int]:
    """One micro-batch through a block."""
    low = s.item == 2
    wide, h, m = s.wide, s.hidden, s.middle
    turned = (s.query + s.key) * 4 // s.item
    given = s.query + s.key
    # Norms: square, mean, root, two products, and the casts round them. Rotation: four products, a sum and a difference
    # of halves, joined. SwiGLU: silu and a product. Residuals.
    forward = 2 * (7 * wide + (2 * h + wide if low else 0)) + 9 * turned + (2 * given + 2 * turned if low else 0)
    forward += 5 * m + 6 * h
    calls = 38 + (8 if low else 0)
    if s.sequence:  # what came over the links is put in order
        forward += 4 * 2 * s.whole
        calls += 4
    moved, operators = forward, calls
    if unit.trains or any(linear.input_gradient for linear in unit.linears):
        back = 2 * (24 * wide + (2 * h + 2 * wide if low else 0)) + 10 * turned + (2 * given + 2 * turned if low else 0)
        back += 9 * m + 3 * 3 * s.whole + 6 * h
        if s.sequence:
            back += 4 * 2 * s.whole
        moved += back
        operators += 69 + (10 if low else 0)
        mode = held.recipe.train.activation_checkpointing
        if mode != "none":
            moved += forward - 3 * h
            operators += calls - (2 if mode == "full" else 9)
        if not held.sharded and held.layout.accumulation > 1:  # added to the gradients that are there
            moved += 3 * sum(w.size * w.item for w in unit.weights if w.trained)
            operators += sum(w.trained for w in unit.weights)
    for linear in unit.linears:
        if linear.adapter:
            moved += 3 * held.tokens * (linear.adapter * 4 + linear.out) * s.item
            operators += 12
            if held.recipe.lora.dropout:  # some fifteen steps of a hash in int32, read and written
                moved += 120 * held.tokens * linear.width
                operators += 24
    return moved, operators


def _ends(held: Held, unit: Unit, s: Sizes) -> tuple[int, int]:
    """Embedding, and norm, logits and loss."""
    moved = operators = 0
    if unit.kind in ("embed", "root"):
        table = unit.weights[0]
        moved, operators = 3 * s.whole, 2
        if table.trained:
            moved += s.whole + table.size * s.item
            if not held.sharded and held.layout.accumulation > 1:
                moved += 3 * table.size * table.item
        if s.tensor > 1:
            moved, operators = moved + 8 * s.whole, operators + 10
    for linear in unit.linears:
        if linear.name != HEAD:
            continue
        moved += 31 * s.wide + 2 * s.hidden + 4 * s.whole
        operators += 26
        size = linear.out * linear.width
        for chunk, times in chunks(held).items():
            logits = 4 * chunk * linear.out
            # Cast, peak, difference, exponential, sum, share, label; and cast again.
            moved += times * (10 * logits + (3 * logits if s.item == 2 else 0))
            operators += times * 37
            if linear.trained and s.item == 2:
                moved += times * 10 * size
        if linear.trained:
            moved += size * (4 + (6 if s.item == 2 else 0) + 2 * s.item)
    return moved, operators


def _data(held: Held, unit: Unit) -> tuple[int, int]:
    """FSDP's copies of a unit's weights: cast, into what is sent, and out of what came."""
    total, shard = unit.total("gathered", held.layout.shard), held.layout.shard
    casts = any(w.item != w.gathered for w in unit.weights)
    if shard == 1:
        return (5 if casts else 2) * total, (2 if casts else 1) * len(unit.weights)
    return 2 * total + (5 if casts else 2) * total // shard, 3 if casts else 2


def _update(held: Held) -> tuple[int, int]:
    """Norm, scaling and AdamW, which reads and writes weights and both moments and reads gradients."""
    own, moment = local(held, held.weights, trained=True), local(held, held.moments, trained=True)
    count = sum(w.trained for unit in held.units for w in unit.weights)
    if held.recipe.train.precision == "bf16_sr":
        return 3 * own + 28 * local(held, 4, trained=True), 30 * count
    return own + 2 * own + 3 * own + 4 * moment, 16
