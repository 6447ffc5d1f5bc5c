"""Collectives of a rank's step, by formulas: which, over which axis, how many bytes."""

from __future__ import annotations

from collections import Counter
from functools import cache

from llama.config import Parallel
from llama.plan.analytic_parts import Held, Stage, Unit
from llama.plan.analytic_pipeline import step_order
from llama.plan.analytic_products import chunks
from llama.plan.counts import Collective, Kind
from llama.targets import HEAD, ROW_PARALLEL

Calls = Counter[tuple[Kind, str, int, int]]
"""(kind, axis, ranks, bytes of one call) to calls."""


def step_collectives(held: Held) -> tuple[Collective, ...]:
    """All collectives of a step."""
    calls: Calls = Counter()
    for stage in held.stages:
        if held.layout.tensor > 1:
            calls.update(_tensor(held, stage))
        if held.sharded:
            calls.update(_data(held, stage))
        if held.layout.pipeline > 1:
            calls.update(_pipeline(held, stage))
    if held.layout.world > 1:
        # Loss, tokens, squared norm and who was asked to stop, in float64 (Trainer.total).
        calls["all_reduce", "world", held.layout.world, 4 * 8] += 1
    return tuple(Collective(*key, times) for key, times in sorted(calls.items(), key=_heaviest) if times)


def _heaviest(call: tuple[tuple[Kind, str, int, int], int]) -> tuple[int, Kind, str, int]:
    (kind, axis, _, size), times = call
    return -size * times, kind, axis, size


def _tensor(held: Held, stage: Stage) -> Calls:
    """Tensor and sequence parallelism (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2)."""
    calls: Calls = Counter()
    ranks, micro_batches = held.layout.tensor, held.layout.accumulation
    sequence = held.recipe.parallel.sequence_parallel
    joined: Kind = "reduce_scatter" if sequence else "all_reduce"
    mode = held.recipe.train.activation_checkpointing
    whole = held.tokens * held.recipe.model.hidden_size * held.compute

    def join(times: int, size: int = whole) -> None:
        """Partial sums of all ranks to the stream's layout, or gradients of what was whole."""
        calls[joined, "tp", ranks, size] += times * micro_batches

    def spread(times: int, size: int = whole) -> None:
        """The stream's tokens to all ranks; where it is not cut they are there."""
        if sequence:
            calls["all_gather", "tp", ranks, size] += times * micro_batches

    for unit, times in Counter(stage.blocks).items():
        spread(2 * times)  # into attention and MLP
        join(2 * times)  # out of o and down
        again = 2 if mode != "none" else 1
        for linear in unit.linears:  # DoRA's lengths of rows that lie over all ranks, fp32 (Adapter.ratio)
            if held.recipe.lora.dora and linear.adapter and linear.name in ROW_PARALLEL:
                calls["all_reduce", "tp", ranks, 4 * linear.out] += again * times * micro_batches
        backward = unit.trains or any(linear.input_gradient for linear in unit.linears)
        if backward:
            into = sum(linear.input_gradient for linear in unit.linears if linear.name in ("attention.q", "mlp.gate"))
            out = sum(
                linear.input_gradient or linear.trained for linear in unit.linears
                if linear.name in ("attention.o", "mlp.down")
            )  # fmt: skip
            join(into * times)
            spread(out * times)
            if mode != "none":
                spread(2 * times)
            if mode == "full":
                join(times)  # o's; down's comes after all that backward needs
    if stage.first:
        join(1)
        if stage.units[0].trains:
            spread(1)
    if stage.last:
        head = next(linear for unit in stage.units for linear in unit.linears if linear.name == HEAD)
        spread(1)
        if head.input_gradient:
            join(1)
        for size, times in chunks(held).items():
            # The greatest logit; then the sum of exponentials beside the label's own logit. fp32.
            calls["all_reduce", "tp", ranks, 4 * size] += times * micro_batches
            calls["all_reduce", "tp", ranks, 8 * size] += times * micro_batches
    # Gradients of what all ranks hold whole: FSDP wants them summed before it scatters them, else once a step.
    for unit in stage.units:
        for weight in unit.weights:
            if weight.whole and weight.trained and (sequence or unit.kind == "block"):
                # A pipeline has added the step's up in fp32 by then.
                item = weight.item if not held.sharded else 4 if held.layout.pipeline > 1 else weight.gathered
                times = micro_batches if held.sharded and held.layout.pipeline == 1 else 1
                calls["all_reduce", "tp", ranks, weight.size * item] += times
    return calls


def gathers(held: Held, stage: Stage, unit: Unit) -> int:
    """How often FSDP gathers a unit in a step."""
    micro_batches, first, reshard = held.layout.accumulation, stage.units[0], held.recipe.parallel.reshard
    if held.layout.pipeline > 1:
        # Whole until the step's end; else freed after each forward and gathered by the next, or by the backward that
        # comes before it, which frees nothing.
        if reshard and unit.kind in ("embed", "block"):
            return micro_batches + 1
        return rounds(held.recipe.parallel, micro_batches, held.stage_rank)[stage.index]
    if unit.kind == "root":
        return micro_batches
    if unit.kind == "head":
        # Freed in backward. When the embedding's backward begins, FSDP gathers ahead what ran before it: in a second
        # micro-batch that is the first one's head, which the next forward takes as it is.
        ahead = first.kind == "embed" and first.trains and micro_batches > 1
        return micro_batches + (1 if ahead else 0)
    return micro_batches * (2 if reshard else 1)


ACTIVE = 3
"""Stages of a rank that torch's looped schedules keep gathered: those that work next (_add_unshard_reshard)."""


@cache
def rounds(parallel: Parallel, micro_batches: int, rank: int) -> Counter[int]:
    """How often each stage on a pipeline rank is gathered in a step."""
    found: Counter[int] = Counter()
    order = [action.stage for action in step_order(parallel, micro_batches)[rank]]
    active: list[int] = []
    for i in range(len(order)):
        following = list(dict.fromkeys(order[i:]))[:ACTIVE]
        found.update(stage for stage in following if stage not in active)
        active = following
    return found


def _data(held: Held, stage: Stage) -> Calls:
    """FSDP2 over the shards (Zhao et al. 2023) and, with copies, one more sum over them."""
    calls: Calls = Counter()
    shard, replicate, micro_batches = held.layout.shard, held.layout.replicate, held.layout.accumulation
    for unit, times in Counter(stage.units).items():
        if shard > 1:
            calls["all_gather", "dp_shard", shard, unit.total("gathered", shard)] += times * gathers(held, stage, unit)
        if not unit.trains:
            continue
        summed = unit.total("", shard, trained=True)  # in fp32, whatever is computed in
        if shard > 1:
            calls["reduce_scatter", "dp_shard", shard, summed] += times * (
                1 if held.layout.pipeline > 1 else micro_batches
            )
        if replicate > 1:
            calls["all_reduce", "dp_replicate", replicate, summed // shard] += times
    return calls


def _pipeline(held: Held, stage: Stage) -> Calls:
    """Hidden states to the next stage, their gradients back, unless it is on this rank; and a tied embedding's gradients,
    which the first and the last stage each have a part of."""
    calls: Calls = Counter()
    parallel, model, ranks, here = held.recipe.parallel, held.recipe.model, held.layout.pipeline, held.stages
    size, micro_batches = held.compute * held.stream * model.hidden_size, held.layout.accumulation
    for other in (stage.index - 1, stage.index + 1):
        if 0 <= other < parallel.stages and other not in [stage.index for stage in here]:
            calls["send", "pp", ranks, size] += micro_batches
            calls["recv", "pp", ranks, size] += micro_batches
    ends = model.tie_embeddings and not held.recipe.lora.rank and parallel.pipeline_schedule != "zbv_zero_bubble"
    for unit in stage.units if ends else ():
        if unit.kind in ("embed", "head"):
            table = next(weight for weight in unit.weights if weight.columns > 1)
            own = table.shard(held.layout.shard, held.shard_rank) if held.sharded else table.size
            calls["all_reduce", "pp", 2, own * table.item] += table.trained
    return calls
