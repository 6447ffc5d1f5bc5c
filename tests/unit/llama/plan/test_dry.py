"""A step that is counted without hardware and memory is the step that real processes take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from llama import recipe as recipes
from llama.config import Recipe
from llama.flops import products as products_of
from llama.flops import trained_flops_per_token
from llama.layout import layout
from llama.parallel.mesh import build_mesh
from llama.plan.counts import Collective, Counts, Memory
from llama.plan.dry import Rehearsal, count, count_ranks, stand_in
from llama.plan.dry_tally import Tally
from tests.dist import harness
from tests.dist.layouts import recipe

LORA = {"lora__rank": 4, "lora__targets": ("all-linear",)}
WIDE = {"model__hidden_size": 64, "model__intermediate_size": 128}
# name -> (ranks, what changes in the recipe)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp2_bf16_remat_tied": (
        2, {"train__precision": "bf16_mixed", "train__activation_checkpointing": "full", "model__tie_embeddings": True},
    ),
    "sp2_masked": (2, {"parallel__tensor_parallel": 2, "data__document_mask": True, "train__global_batch_size": 4}),
    "pp2": (2, {"parallel__pipeline_parallel": 2}),
    "interleaved2": (
        2, {"parallel__pipeline_parallel": 2, "parallel__pipeline_schedule": "interleaved_1f1b", "model__num_layers": 4},
    ),
    "fsdp2_qlora": (2, {**LORA, "lora__quantize": "nf4", "lora__dropout": 0.1, "train__precision": "bf16_mixed", **WIDE}),
}  # fmt: skip


def _real(rank: int, config: Recipe, micro_batches: int) -> tuple[Tally, Memory]:
    """The second of two steps in processes that are really joined."""
    mesh = build_mesh(layout(config, torch.distributed.get_world_size()), "cpu")
    rehearsal = Rehearsal(config, mesh, stand_in("cpu"), None)
    rehearsal.step(micro_batches)
    return rehearsal.step(micro_batches)


def _messages(found: Iterable[Collective]) -> list[Collective]:
    """All but the vote on shapes in a pipeline's first step: from torch 2.14 on a fake group takes none, a real one does."""
    return [c for c in found if (c.axis, c.bytes) != ("pp", 4)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_are_those_of_real_processes(name: str) -> None:
    world, changes = LAYOUTS[name]
    config = recipe(train__micro_batch_size=2, **{"model__num_layers": 2} | changes)
    ranks = harness.run(world, _real, config, layout(config, world).accumulation)
    for rank in range(world) if "pipeline" in str(changes) else (world - 1,):
        tally, memory = ranks[rank]
        counted = count(config, world, rank)
        assert counted.products == tally.product_list()
        assert _messages(counted.collectives) == _messages(tally.collective_list())
        # gloo copies what it scatters, which a device does not.
        assert counted.moved <= tally.other["moved"] <= 1.1 * counted.moved
        # When the other end takes a real message changes what lives by one of them.
        assert counted.memory.peak == pytest.approx(memory.peak, rel=0.02)
        assert (counted.memory.weights, counted.memory.optimizer) == (memory.weights, memory.optimizer)


@pytest.mark.parametrize("changes", [{}, {"train__freeze": ("layers.0-1",)}], ids=["all", "frozen"])
def test_flops_are_the_formulas(changes: dict[str, Any]) -> None:
    config = recipe(model__vocab_size=248, **changes)
    tokens, model = config.tokens_per_step, config.model
    parts = list(products_of(config))
    norms = sum(part.flops for part in parts if not isinstance(part, str) and "norm" in part.name)
    # Where the formulas have attention's backward twice as dear as forward, it computes the scores again: 2.5 times.
    again = 2 * model.num_heads * model.head_size * config.data.seq_length * parts.count("attention")
    assert count(config, 1).flops == (trained_flops_per_token(config, causal=False) - norms + again) * tokens


def _alike(a: Counts, b: Counts) -> None:
    assert (a.products, a.collectives, a.moved, a.operators) == (b.products, b.collectives, b.moved, b.operators)
    assert a.memory == b.memory


@pytest.mark.parametrize(
    ("world", "changes", "batch"),
    [
        (1, {}, 7),
        (4, {"parallel__replicate": 2, "train__precision": "bf16_mixed"}, 24),
        (2, {"parallel__pipeline_parallel": 2}, 11),
        (2, {"parallel__pipeline_parallel": 2, "parallel__pipeline_schedule": "gpipe"}, 9),
        (2, {"parallel__pipeline_parallel": 2, "parallel__pipeline_schedule": "interleaved_zero_bubble"}, 10),
    ],
    ids=["single", "hsdp2x2", "pp2", "pp2_gpipe", "pp2_zero_bubble"],
)
def test_micro_batches_that_are_not_run_are_known(
    world: int, changes: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(train__global_batch_size=batch, **changes)
    short = count(config, world)
    monkeypatch.setattr("llama.plan.dry.ENOUGH", 100)
    _alike(short, count(config, world))


def test_a_recipe_on_512_ranks() -> None:
    config = recipes.load("llama3.1_405b_trn2", ["model.num_layers=2"])
    counted = count(config, 512, 7, "neuron")
    tensor = [c for c in counted.collectives if c.axis == "tp"]
    assert {c.ranks for c in tensor} == {4} and {c.ranks for c in counted.collectives} == {4, 128, 512}
    assert Collective("all_reduce", "world", 512, 32, 1) in counted.collectives
    # Two fp32 moments of each bf16 weight; the 128 ranks of a share each hold whole rows.
    assert counted.memory.optimizer == pytest.approx(4 * counted.memory.weights, rel=1e-3)
    model = config.model
    matrices = sum(part.weights for part in products_of(config) if not isinstance(part, str))
    whole = 2 * (matrices + model.vocab_size * model.hidden_size)  # the embedding is a look-up and no product
    assert counted.memory.weights == pytest.approx(whole / 512, rel=0.01)
    assert "without train.compile" in counted.notes[0]


def test_ranks_are_counted_in_processes_of_their_own() -> None:
    config = recipe(parallel__pipeline_parallel=2)
    first, last = count_ranks(config, 2, [0, 1])
    assert (first.rank, first.stage, last.rank, last.stage) == (0, 0, 1, 1)
    assert first == count(config, 2, 0)
    with pytest.raises(UserError, match="not a multiple"):
        count_ranks(config, 3, [0])
    with pytest.raises(RuntimeError, match="rank 5 of 2"):
        count_ranks(config, 2, [5])
