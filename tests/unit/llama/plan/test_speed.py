"""Seconds from counts and rates: what a step, a collective and a bubble take."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest

from llama.config import Recipe
from llama.layout import layout
from llama.plan import speed
from llama.plan.analytic import foresee
from llama.plan.counts import Collective, Counts, Kind, Memory, Product
from llama.plan.nodes import node_type
from llama.plan.standing import plan_against_measured

H100 = speed.rates_of(node_type("8xh100"), mfu=0.5)


def recipe(micro_batches: int = 8, **parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "plan",
            "model": {
                "vocab_size": 1024,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_layers": 16,
                "num_heads": 8,
            },
            "data": {"seq_length": 128},
            "train": {"steps": 100, "global_batch_size": micro_batches, "micro_batch_size": 1},
            "parallel": parallel,
        }
    )


def counts(collectives: tuple[Collective, ...] = (), products: tuple[Product, ...] = ()) -> Counts:
    return Counts(0, 0, products, 0, 0, collectives, Memory(0, 0, 0, 0, 0))


def product(side: int, calls: int = 1) -> Product:
    return Product("mm", (1, side, side, side), "bfloat16", calls, calls * 2 * side**3)


def seconds(kind: Kind, axis: str, ranks: int, size: int, nodes: int = 1, **parallel: Any) -> float:
    world = 8 * nodes
    whole = layout(recipe(64, **parallel), world)
    return speed.collective_seconds(Collective(kind, axis, ranks, size, 1), whole, H100, 8)


def test_large_products_run_at_the_assumed_share_of_the_peak() -> None:
    step = speed.step_time(counts(products=(product(8192, 10),)), recipe(), layout(recipe(), 1), H100)
    assert step.products == pytest.approx(10 * 2 * 8192**3 / (989e12 * 0.5))
    assert step.total == step.products


def test_thin_products_wait_for_memory() -> None:
    thin = Product("mm", (1, 8192, 8192, 8), "bfloat16", 1, 2 * 8192 * 8192 * 8)
    assert speed.product_seconds(thin, H100) == pytest.approx(2 * (8192 * 8192 + 2 * 8192 * 8) / 3350e9)


def test_attention_is_as_fast_as_a_head_of_its_size_was() -> None:
    rates = dataclasses.replace(H100, attention={"attention float32": ((1e6, 1e9), (4e6, 2e9))})
    for batch, heads in ((1, 8), (4, 16)):  # of 4e6 FLOPs each
        one = Product("attention", (batch, heads, 125, 125, 64), "float32", 3, 3 * batch * heads * 4_000_000)
        assert speed.product_seconds(one, rates) == pytest.approx(3 * batch * heads * 4e6 / 2e9)


def test_what_a_step_takes_beyond_its_parts_does_not_hold_for_the_update() -> None:
    tensor = counts(products=(product(8192),), collectives=(Collective("all_reduce", "tp", 4, 1 << 20, 7),))
    whole = dataclasses.replace(tensor, memory=Memory(0, 0, 1 << 30, 0, 0))
    laid = layout(recipe(tensor_parallel=4), 4)
    plain = speed.step_time(whole, recipe(tensor_parallel=4), laid, H100)
    rates = dataclasses.replace(H100, strain={"plain": 5.0, "sharded": 5.0, "tensor": 1.25})
    strained = speed.step_time(whole, recipe(tensor_parallel=4), laid, rates)
    update = speed.update_seconds(whole, recipe(), H100)
    assert update > 0 and plain.others == pytest.approx(update) == strained.others
    assert strained.total - update == pytest.approx(1.25 * (plain.total - update))


def test_collectives_in_a_node_take_their_rings_share_of_the_bytes() -> None:
    bulk = 8 << 30
    hops = 3 * 20e-6
    gathered = seconds("all_gather", "dp_shard", 8, bulk)
    assert gathered == pytest.approx(7 / 8 * bulk / (0.8 * 450e9) + hops)
    assert seconds("reduce_scatter", "dp_shard", 8, bulk) == gathered
    assert seconds("all_reduce", "dp_shard", 8, bulk) == pytest.approx(2 * gathered)


def test_a_group_over_nodes_is_as_slow_as_its_share_of_the_network() -> None:
    bulk = 8 << 30
    over_four = seconds("all_gather", "dp_shard", 32, bulk, nodes=4)
    # What a ring brings into a node comes over its 400 GB/s of network, which are less than a rank's link.
    assert over_four == pytest.approx(31 / 32 * bulk / (0.8 * 400e9) + 5 * 20e-6)
    # Under tensor parallelism of 8 each rank has a group of its own over the nodes, and an eighth of the network.
    alone = seconds("all_gather", "dp_shard", 4, bulk, nodes=4, tensor_parallel=8)
    assert alone == pytest.approx(3 / 4 * bulk / (0.8 * 50e9) + 2 * 20e-6)
    assert seconds("all_reduce", "tp", 8, bulk, nodes=4, tensor_parallel=8) == pytest.approx(
        2 * (7 / 8 * bulk / (0.8 * 450e9) + 3 * 20e-6)
    )


@pytest.mark.parametrize(
    "schedule, stages, expected",
    [("gpipe", None, 3 / 8), ("1f1b", None, 3 / 8), ("interleaved_1f1b", 2, 3 / 16), ("interleaved_zero_bubble", 2, 1 / 16)],
)  # fmt: skip
def test_bubbles_follow_the_papers(schedule: str, stages: int | None, expected: float) -> None:
    r = recipe(8, pipeline_parallel=4, pipeline_schedule=schedule, stages_per_rank=stages)
    assert speed.bubble(r, layout(r, 4)) == pytest.approx(expected)


def test_ranks_that_share_cores_lose_less_in_a_bubble() -> None:
    r = recipe(8, pipeline_parallel=4)
    # Four ranks on two cores: rounds with 1 and 2 busy take half as long, rounds with 3 three quarters.
    assert speed.bubble(r, layout(r, 4), share=0.5) == pytest.approx((2 * (0.5 + 0.5 + 0.75) + 5 - 8) / 8)


def test_accelerators_gather_weights_while_they_compute() -> None:
    gather = Collective("all_gather", "dp_shard", 8, 1 << 30, 16)
    whole = layout(recipe(8), 8)
    step = speed.step_time(counts((gather,), (product(8192, 1000),)), recipe(8), whole, H100)
    assert step.overlapped == pytest.approx(step.data * 15 / 16)
    assert step.total == pytest.approx(step.products + step.data / 16)
    here = dataclasses.replace(H100, overlaps=False)
    waits = speed.step_time(counts((gather,), (product(8192, 1000),)), recipe(8), whole, here)
    assert waits.total == pytest.approx(step.products + step.data)


def test_what_was_measured_goes_before_what_is_reckoned() -> None:
    measured = dataclasses.replace(H100, network=0.0, collectives={"all_reduce 4": ((1e3, 1e-3), (1e6, 1e-2))})
    whole = layout(recipe(8), 4)

    def reduce(size: int, ranks: int = 4) -> float:
        return speed.collective_seconds(Collective("all_reduce", "dp_shard", ranks, size, 1), whole, measured, 4)

    assert reduce(10) == 1e-3  # latency
    assert reduce(1000000) == pytest.approx(1e-2)
    assert reduce(2000000) == pytest.approx(2e-2)
    assert 1e-3 < reduce(30000) < 1e-2
    assert reduce(1000000, 2) == pytest.approx(1e-2 * (1 / 2) / (3 / 4))


def test_a_days_cost_is_its_nodes_hours() -> None:
    r = recipe(8)
    cost = speed.run_cost(864.0, r, nodes=4, ranks=32, peak=1e12)
    assert cost.days == pytest.approx(1.0)
    assert cost.node_hours == pytest.approx(96.0)
    assert cost.tokens_per_second == pytest.approx(8 * 128 / 864)
    assert cost.mfu_causal < cost.mfu_full < 1


def test_a_checkpoint_holds_weights_and_both_moments() -> None:
    r = recipe()
    weights = 2 * 1024 * 64 + 16 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert speed.checkpoint_bytes(r) == 12 * weights


def test_rates_come_back_from_json_as_they_were() -> None:
    rates = dataclasses.replace(H100, collectives={"send 2": ((1.0, 2.0),)})
    assert speed.Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates
    with pytest.raises(ValueError, match="keys"):
        speed.Rates.from_json({"source": "x"})


def test_a_runs_end_says_how_far_the_plan_was_off() -> None:
    r, planned = recipe(8), foresee(recipe(8), 2).memory.peak
    line = plan_against_measured(r, 2, None, round(planned / 0.95), 0.5)
    assert line.startswith("plan against measured: memory ") and line.endswith(" GB (-5 %)")
    seconds = speed.step_time(foresee(r, 2), r, layout(r, 2), H100).total
    line = plan_against_measured(r, 2, H100, None, seconds / 1.08)
    assert re.fullmatch(r"plan against measured: step \S+ of \S+ s \(\+8 %\)", line)
    assert plan_against_measured(r, 2, None, None, 1.0) == ""


def test_tables_are_interpolated_in_logarithms() -> None:
    table = ((1e2, 10.0), (1e4, 1000.0))
    assert [speed.at(table, size) for size in (1, 1e3, 1e9)] == [10.0, pytest.approx(100.0), 1000.0]
    assert not math.isnan(speed.at(table, 1e4))


def test_no_torch_is_needed() -> None:
    code = "import sys, llama.plan.speed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
