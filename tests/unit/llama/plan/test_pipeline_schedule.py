"""Pipelines played through in time: the bubbles of the papers, and what each rank holds meanwhile."""

from __future__ import annotations

import pytest

from llama.config import Parallel
from llama.plan.schedule import orders, play, stage_rank

KINDS = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"]


def _even(kind: str, ranks: int, micro_batches: int) -> tuple[Parallel, list[float], list[float]]:
    parallel = Parallel(pipeline_parallel=ranks, pipeline_schedule=kind, reshard_after_forward=False)  # type: ignore[arg-type]
    share = 1.0 / parallel.rank_stages  # a rank's forward of a micro-batch takes 1 second in all, its backward 2
    return parallel, [share] * parallel.stages, [2 * share] * parallel.stages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 8)])
def test_every_stage_does_every_micro_batch_once_and_work_adds_up(kind: str, ranks: int, micro_batches: int) -> None:
    parallel, forward, backward = _even(kind, ranks, micro_batches)
    found = play(parallel, micro_batches, forward, backward)
    done = [span.action for span in found.spans]
    assert len(set(done)) == len(done)
    assert {(a.stage, a.micro_batch) for a in done if a.work == "F"} == {
        (stage, m) for stage in range(parallel.stages) for m in range(micro_batches)
    }
    assert all(span.rank == stage_rank(span.action.stage, parallel) for span in found.spans)
    for rank in range(ranks):
        assert found.seconds - found.idle(rank) == pytest.approx(3 * micro_batches)


@pytest.mark.parametrize(("kind", "loops"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_the_bubble_is_that_of_the_papers(kind: str, loops: int, ranks: int, micro_batches: int) -> None:
    """(p - 1) / v forwards and backwards of waiting (Narayanan et al. 2021, section 2.2)."""
    parallel, forward, backward = _even(kind, ranks, micro_batches)
    found = play(parallel, micro_batches, forward, backward)
    assert found.seconds == pytest.approx(3 * micro_batches + 3 * (ranks - 1) / loops)


def test_splitting_the_backward_fills_the_bubble() -> None:
    bubble = {kind: play(*_with(kind)).bubble for kind in KINDS}
    assert bubble["zbv_zero_bubble"] <= bubble["interleaved_zero_bubble"] < bubble["interleaved_1f1b"] < bubble["1f1b"]
    assert bubble["1f1b"] == pytest.approx(bubble["gpipe"])


def _with(kind: str) -> tuple[Parallel, int, list[float], list[float]]:
    parallel, forward, backward = _even(kind, 4, 8)
    return parallel, 8, forward, backward


def test_what_is_in_flight_is_what_the_schedule_promises() -> None:
    """1F1B holds p - rank micro-batches, GPipe all of them."""
    for kind, held in (("1f1b", [4, 3, 2, 1]), ("gpipe", [16] * 4)):
        parallel, forward, backward = _even(kind, 4, 16)
        found = play(parallel, 16, forward, backward)
        assert [found.in_flight(rank) for rank in range(4)] == held


def test_a_slow_stage_sets_the_pace_and_hops_cost_time() -> None:
    parallel, forward, backward = _even("1f1b", 4, 16)
    even = play(parallel, 16, forward, backward).seconds
    assert play(parallel, 16, [1, 2, 1, 1], [2, 4, 2, 2]).seconds >= 16 * 6
    assert play(parallel, 16, forward, backward, hop=0.1).seconds > even
    assert [len(order) for order in orders(parallel, 16)] == [32] * 4
