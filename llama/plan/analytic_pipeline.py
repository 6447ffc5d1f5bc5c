"""What a pipeline rank holds at the worst moment of a step: its own order of forwards and backwards, played through."""

from __future__ import annotations

from functools import cache

from llama.config import ZERO_BUBBLE, Parallel
from llama.config.parallel import LOOPED
from llama.plan.analytic_block import input_piece
from llama.plan.analytic_operators import sizes
from llama.plan.analytic_parts import BATCH_BYTES, Held, Stage
from llama.plan.analytic_tape import Bytes, Piece, Tape
from llama.plan.analytic_walk import Walk
from llama.plan.schedule import Action, orders


def piped_step(tape: Tape, held: Held) -> None:
    """The rank's own order of forwards and backwards (Narayanan et al. 2021, section 2.2): what lives between them is what
    forwards have left, for each micro-batch in flight."""
    s, micro_batches = sizes(held), held.layout.accumulation
    # The micro-batches joined, and a buffer for each that comes from another stage, in either direction.
    tape.make(joined=(BATCH_BYTES if held.recipe.data.document_mask else BATCH_BYTES - 4) * held.tokens * micro_batches)
    buffers = sum((not stage.first) + (not stage.last) for stage in held.stages)
    tape.make(received=buffers * micro_batches * s.hidden)
    schedule = held.recipe.parallel.pipeline_schedule
    if schedule == "1f1b":  # torch lets go of a gradient that it sent when it has the next one,
        tape.make(sent_back=s.hidden if held.stage_rank else 0)
        # and of the last output before its rhythm of one forward and one backward when that ends.
        tape.make(sent_on=s.hidden if held.stage_rank < held.layout.pipeline - 1 else 0)
    if held.sharded:
        tape.make("gathered", full=sum(unit.total("gathered", held.layout.shard) for unit in held.units))
    work = {}
    for stage in held.stages:
        forward, first, later = (
            Walk(Tape(), held, False, True),
            Walk(Tape(), held, False, True),
            Walk(Tape(), held, True, True),
        )
        forward.forward(stage)
        work[stage.index, "F"] = forward.tape.piece()
        for walk, name in ((first, "first"), (later, "B")):
            walk.forward(stage)
            before = walk.tape.now
            walk.tape.most, walk.tape.peak, start = tuple(before), walk.tape.total, tuple(before)
            walk.backward(stage)
            piece = walk.tape.piece()
            work[stage.index, name] = Piece(
                tuple(a - b for a, b in zip(piece.most, start, strict=True)),
                tuple(a - b for a, b in zip(piece.left, start, strict=True)),
            )
        if schedule in ZERO_BUBBLE:
            work[stage.index, "I"], given = input_backward(held, stage)
            if given:
                for name in ("first", "B"):
                    piece = work[stage.index, name]
                    work[stage.index, name] = Piece(
                        (0, max(0, piece.left[1]), 0, max(0, piece.left[3]), 0), less(piece.left, given)
                    )
    begun = set()
    looped, here = schedule in LOOPED, {stage.index: stage for stage in held.stages}
    for action in step_order(held.recipe.parallel, micro_batches)[held.stage_rank]:
        kind: str = action.work
        stage = here[action.stage]
        if kind in "BW" and action.stage not in begun:
            begun.add(action.stage)
            kind = "first"
        elif kind == "W":
            kind = "B"
        tape.run(work[action.stage, kind])
        if looped:  # messages to other ranks are held until the step's end, an output beyond its backward
            back = action.work in "BI" and not stage.first and action.stage - 1 not in here
            on = action.work in "BW" and not stage.last and action.stage + 1 not in here
            tape.run(Piece((0,) * 5, (0, 0, 0, 0, s.hidden * (back + on))))
    if held.sharded:  # at the end each unit is scattered, the largest first or last
        largest = max(unit.total("", held.layout.shard, trained=True) for unit in held.units)
        tape.make("gathered", sent=largest, part=largest // held.layout.shard)
        tape.free("sent", "part")


def input_backward(held: Held, stage: Stage) -> tuple[Piece, int]:
    """The first half of a zero-bubble backward, and the bytes of gradients that it leaves for the second. The first stage
    has no use for it: all comes in the second half there."""
    tape, s = Tape(), sizes(held)
    if not stage.first:
        if stage.last:
            tape.make(dhidden=s.whole, wide=5 * s.wide)
            tape.free("wide")
        piece = input_piece(s)
        for _ in stage.blocks:
            tape.run(piece)
    return tape.piece(), tape.total


def less(left: Bytes, activations: int) -> Bytes:
    return (*left[:4], left[4] - activations)


@cache
def step_order(parallel: Parallel, micro_batches: int) -> list[list[Action]]:
    """Of each pipeline rank."""
    return orders(parallel, micro_batches)
