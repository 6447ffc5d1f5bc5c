"""Matrix products and attention kernels of a rank's step, by formulas.

A matrix of n weights takes 2·n operations a token forward, and as many for each of its two gradients (Kaplan et al. 2020,
section 2.1). What is computed again follows Korthikanti et al. 2022, section 5, except that torch stops recomputing a block
where the last tensor that backward needs is there: before the product that ends the block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from llama.plan.analytic_parts import Held, Linear, Unit, attention_widths
from llama.plan.counts import Product
from llama.targets import HEAD

Shape = tuple[int, ...]
"""(m, k, n) of (m, k) x (k, n); a fourth number says that it is computed in fp32 whatever the rest is."""
FP32 = 4


def step_products(held: Held) -> tuple[Product, ...]:
    """All products of a step, those of one shape together."""
    micro_batches = held.layout.accumulation
    shapes, kernels = Counter[Shape](), Counter[str]()
    for stage in held.stages:
        for unit, times in Counter(stage.units).items():
            shapes_of, kernels_of = _of_unit(held, unit)
            for shape, calls in shapes_of.items():
                shapes[shape] += calls * times * micro_batches
            for kind, calls in kernels_of.items():
                kernels[kind] += calls * times * micro_batches
    dtype = "float32" if held.compute == 4 else "bfloat16"
    found = [
        Product("mm", (1, *shape[:3]), "float32" if len(shape) > 3 else dtype, calls, 2 * math.prod(shape[:3]) * calls)
        for shape, calls in shapes.items()
    ]
    model, heads = held.recipe.model, attention_widths(held.recipe.model, held.layout.tensor)[0]
    rows, length = held.recipe.train.micro_batch_size, held.recipe.data.seq_length
    kernel = (rows, heads, length, length, model.head_size)
    product = 2 * rows * heads * length * length * model.head_size
    if forward := kernels["attention"]:
        found.append(Product("attention", kernel, dtype, forward, 2 * product * forward))
    if backward := kernels["attention_backward"]:
        # Scores once more, then a gradient of each of the four operands (Dao et al. 2022, appendix B).
        found.append(Product("attention_backward", kernel, dtype, backward, 5 * product * backward))
    return tuple(sorted(found, key=lambda p: (-p.flops, p.kind, p.shape)))


def _of_unit(held: Held, unit: Unit) -> tuple[Counter[Shape], Counter[str]]:
    """One micro-batch through a unit, forward and backward."""
    shapes, kernels = Counter[Shape](), Counter[str]()
    for linear in unit.linears:
        if linear.name == HEAD:
            shapes.update(_head(held, linear))
            continue
        shapes.update(_forward(held, linear))
        shapes.update(_backward(held, linear))
        shapes.update(_again(held, unit, linear))
    if unit.kind == "block":
        kernels["attention"] = 1
        if unit.attention_backward:
            kernels["attention_backward"] = 1
            if held.recipe.train.activation_checkpointing == "full":
                kernels["attention"] += 1
    return shapes, kernels


def _forward(held: Held, linear: Linear) -> Iterator[Shape]:
    """x Wᵀ, and with an adapter s·(x Aᵀ) Bᵀ."""
    tokens, rank = held.tokens, linear.adapter
    yield tokens, linear.width, linear.out
    if rank:
        yield tokens, linear.width, rank
        yield tokens, rank, linear.out
        yield from _lengths(held, linear)
        if held.recipe.lora.dora and held.recipe.lora.dropout:
            yield tokens, linear.width, linear.out  # of what dropout leaves


def _lengths(held: Held, linear: Linear) -> Iterator[Shape]:
    """DoRA's lengths of the rows of W + sBA, from A wᵀ and A Aᵀ."""
    if held.recipe.lora.dora:
        rank = linear.adapter
        yield linear.out, linear.width, rank
        wide = () if held.compute == FP32 else (FP32,)
        yield rank, linear.width, rank, *wide
        yield linear.out, rank, rank, *wide


def _backward(held: Held, linear: Linear) -> Iterator[Shape]:
    tokens, rank = held.tokens, linear.adapter
    if linear.input_gradient:
        yield tokens, linear.out, linear.width
        if rank and held.recipe.lora.dora and held.recipe.lora.dropout:
            yield tokens, linear.out, linear.width
    if linear.trained:
        yield linear.out, tokens, linear.width
    if rank:
        yield tokens, linear.out, rank
        yield linear.out, tokens, rank
        yield rank, tokens, linear.width
        if linear.input_gradient:
            yield tokens, rank, linear.width


def _again(held: Held, unit: Unit, linear: Linear) -> Iterator[Shape]:
    """What backward computes again."""
    mode = held.recipe.train.activation_checkpointing
    if mode == "none" or not (unit.trains or linear.input_gradient):
        return
    if mode == "full":
        again = list(_forward(held, linear))
    else:  # results of mm are kept; an adapter's last product is an addmm
        again = [(held.tokens, linear.adapter, linear.out)] if linear.adapter and not held.recipe.lora.dora else []
    if linear.name == "mlp.down":  # the block ends here
        last = (held.tokens, linear.adapter or linear.width, linear.out)
        if last in again:
            again.remove(last)
    yield from again


def chunks(held: Held) -> Counter[int]:
    """Tokens of each part of a micro-batch whose logits exist at once."""
    size, tokens = held.recipe.train.loss_chunk, held.tokens
    found = Counter({size: tokens // size}) if tokens >= size else Counter[int]()
    if tokens % size:
        found[tokens % size] += 1
    return found


def _head(held: Held, linear: Linear) -> Iterator[Shape]:
    """Logits, and in the same pass (llama/model/loss.py) both gradients of them."""
    rank = linear.adapter
    for size, times in chunks(held).items():
        for _ in range(times):
            yield size, linear.width, linear.out
            if linear.input_gradient:
                yield size, linear.out, linear.width
            if linear.trained:
                yield linear.out, size, linear.width
            if rank:
                yield size, rank, linear.out
                yield size, linear.out, rank
                yield linear.out, size, rank
    if rank:
        yield held.tokens, linear.width, rank
        yield rank, held.tokens, linear.width
        yield from _lengths(held, linear)
        if linear.input_gradient:
            yield held.tokens, rank, linear.width
