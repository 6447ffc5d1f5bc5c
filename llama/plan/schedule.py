"""When each rank of a pipeline works and when it waits: the schedule's own order of actions, played through in time.

The orders of looped schedules are asked of torch.distributed.pipelining, which runs them; GPipe (Huang et al. 2019) and 1F1B
(Narayanan et al. 2021, section 2.2) are the textbook's, which torch holds in its step functions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Literal, NamedTuple

from llama.config import Parallel
from llama.config.parallel import LOOPED

Work = Literal["F", "B", "I", "W"]
"""Forward; whole backward; backward of the input, of the weights alone (zero bubble)."""


class Action(NamedTuple):
    """A stage's work on one micro-batch."""

    stage: int
    work: Work
    micro_batch: int


@dataclass(frozen=True)
class Span:
    """An action in time, in seconds from the step's begin."""

    rank: int
    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A step of a pipeline."""

    spans: tuple[Span, ...]
    seconds: float

    def idle(self, rank: int) -> float:
        """Seconds that a rank waits."""
        return self.seconds - sum(span.end - span.start for span in self.spans if span.rank == rank)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time that is spent waiting."""
        ranks = 1 + max(span.rank for span in self.spans)
        return sum(self.idle(rank) for rank in range(ranks)) / (ranks * self.seconds) if self.seconds else 0.0

    def in_flight(self, rank: int) -> int:
        """Most forwards of a rank's stages whose backward has not come yet: what it holds activations of."""
        held = most = 0
        for span in sorted((span for span in self.spans if span.rank == rank), key=lambda span: span.start):
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[span.action.work]
            most = max(most, held)
        return most


def stage_rank(stage: int, parallel: Parallel) -> int:
    """The pipeline rank that holds a stage: looped round the ranks, or laid as a V."""
    ranks = parallel.pipeline_parallel
    if parallel.pipeline_schedule == "zbv_zero_bubble":
        return min(stage, 2 * ranks - 1 - stage)
    return stage % ranks


def orders(parallel: Parallel, micro_batches: int) -> list[list[Action]]:
    """What each pipeline rank does, in its order."""
    ranks = parallel.pipeline_parallel
    if parallel.pipeline_schedule in LOOPED:
        return _looped(parallel, micro_batches)
    found = []
    for rank in range(ranks):
        ahead = micro_batches if parallel.pipeline_schedule == "gpipe" else min(ranks - rank, micro_batches)
        order = [Action(rank, "F", i) for i in range(ahead)]
        for i in range(micro_batches):
            order.append(Action(rank, "B", i))
            if ahead + i < micro_batches:
                order.append(Action(rank, "F", ahead + i))
        found.append(order)
    return found


@cache
def _looped(parallel: Parallel, micro_batches: int) -> list[list[Action]]:
    """As torch lays a looped schedule out, asked with stages that have a place and nothing else."""
    from llama.parallel.pipeline import SCHEDULES, rank_stages

    stages = [
        SimpleNamespace(
            stage_index=index, num_stages=parallel.stages, group_size=parallel.pipeline_parallel, group_rank=0,
            is_first=index == 0, is_last=index == parallel.stages - 1, has_backward=True, submod=None,
        )
        for index in rank_stages(0, parallel)
    ]  # fmt: skip
    schedule = SCHEDULES[parallel.pipeline_schedule](stages, n_microbatches=micro_batches, loss_fn=lambda *_: None)
    return [
        [
            Action(action.stage_index, action.computation_type.value, action.microbatch_index)
            for action in schedule.pipeline_order[rank]
            if action is not None and action.computation_type.value in ("F", "B", "I", "W")
        ]
        for rank in range(parallel.pipeline_parallel)
    ]


def play(
    parallel: Parallel, micro_batches: int, forward: Sequence[float], backward: Sequence[float], hop: float = 0.0
) -> Timeline:
    """Run the schedule in time: every action as soon as its rank is free and what it needs has come.

    Args:
        forward, backward: seconds of each stage for one micro-batch; halves of the backward take half of it each.
        hop: seconds from one rank to another.
    """
    waiting = [list(reversed(order)) for order in orders(parallel, micro_batches)]
    last, done, free = parallel.stages - 1, dict[Action, float](), [0.0] * len(waiting)
    spans: list[Span] = []

    def comes(stage: int, works: str, action: Action) -> float | None:
        """When what stage `stage` gives for this micro-batch is here."""
        ends = [end for work in works if (end := done.get(Action(stage, work, action.micro_batch))) is not None]  # type: ignore[arg-type]
        away = stage_rank(stage, parallel) != stage_rank(action.stage, parallel)
        return min(ends) + (hop if away else 0.0) if ends else None

    def ready(action: Action) -> float | None:
        """When an action's inputs are there; None when that is not known yet."""
        if action.work == "F":
            return 0.0 if action.stage == 0 else comes(action.stage - 1, "F", action)
        if action.work == "W":
            return comes(action.stage, "I", action)
        return comes(action.stage, "F", action) if action.stage == last else comes(action.stage + 1, "BI", action)

    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(waiting):
            while order and (at := ready(order[-1])) is not None:
                action, start = order.pop(), max(at, free[rank])
                cost = forward[action.stage] if action.work == "F" else backward[action.stage]
                end = start + (cost / 2 if action.work in "IW" else cost)
                done[action], free[rank], moved = end, end, True
                spans.append(Span(rank, start, end, action))
    assert not any(waiting), f"{parallel.pipeline_schedule} with {micro_batches} micro-batches does not go on"
    return Timeline(tuple(spans), max(free))
