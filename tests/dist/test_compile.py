"""Blocks compiled one by one compute what one process computes, in every layout, and share one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama.config import Recipe
from llama.parallel import apply
from llama.parallel.compile import compile_blocks
from tests.dist import harness
from tests.dist.layouts import recipe
from tests.dist.test_parity import _expect, _reference, _train

SP = {"parallel__tensor_parallel": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"data__document_mask": True}),
    "single_selective": (1, {"train__activation_checkpointing": "selective"}),
    "single_full": (1, {"train__activation_checkpointing": "full"}),
    "fsdp2": (2, {}),
    "fsdp2_selective": (2, {"train__activation_checkpointing": "selective"}),
    "fsdp2_full_masked": (2, {"train__activation_checkpointing": "full", "data__document_mask": True}),
    "tp2": (2, {"parallel__sequence_parallel": False, **SP}),
    "sp2": (2, SP),
    "sp2_tied_selective": (2, {"train__activation_checkpointing": "selective", "model__tie_embeddings": True, **SP}),
    "sp2_full": (2, {"train__activation_checkpointing": "full", **SP}),
    "pp2": (2, {"parallel__pipeline_parallel": 2}),
    "pp2_full": (2, {"parallel__pipeline_parallel": 2, "train__activation_checkpointing": "full"}),
    "fsdp2_sp2_selective": (4, {"train__activation_checkpointing": "selective", **SP}),
}


def _train_compiled(rank: int, config: Recipe, backend: str) -> tuple[dict[str, Any], int, int]:
    """test_parity's steps with compiled blocks; graphs made, and blocks on this rank."""
    from torch._dynamo.utils import counters

    blocks = []

    def chosen(model: Any, _: str) -> None:
        blocks.extend(model.layers)
        compile_blocks(model, backend)

    apply.compile_blocks = chosen
    seen = _train(rank, config, torch.float32)
    return seen, counters["stats"]["unique_graphs"], len(blocks)


def _check(name: str, backend: str) -> None:
    world, changes = LAYOUTS[name]
    config = recipe(train__compile=True, **changes)
    results = harness.run(world, _train_compiled, config, backend)
    ranks = [seen for seen, _, _ in results]
    plain = config.model_copy(update={"parallel": recipe().parallel})
    reference = _reference(plain.model_dump_json(), torch.float32)
    _expect(ranks, reference, "gradients", 1e-5)
    for seen in ranks:
        assert seen["loss"][0] == pytest.approx(reference["loss"][0], rel=1e-5)
        assert seen["norm"][0] == pytest.approx(reference["norm"][0], rel=1e-5)
    for _, graphs, blocks in results:
        # One for training and one for evaluation without gradients, however many blocks and steps there are.
        assert blocks >= 2 and 1 <= graphs <= 2, f"{graphs} graphs for {blocks} blocks"


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_blocks_give_the_gradients_of_one_process_from_one_graph(name: str) -> None:
    _check(name, "aot_eager")


@pytest.mark.slow
def test_inductor_agrees_too() -> None:
    _check("fsdp2_sp2_selective", "inductor")
