"""Adapters on every layout train as on one process: loss and each adapter's gradient; resume on another layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint_format import SafeReader
from llama.config import Recipe
from llama.device import find_device
from llama.layout import layout
from llama.parallel.apply import ParallelLlama, parallelize
from llama.parallel.mesh import build_mesh
from llama.parallel.shards import local_part
from llama.train.optim import build_optimizer, settle_gradients, total_over_ranks
from tests.dist import harness
from tests.dist.layouts import micro_batches, recipe, samples, skip_unless_trainable
from tests.dist.runs import run_recipe, spied_train, whole_weights, write_tokens

ALL = {"lora__targets": "all-linear"}
DORA = {"lora__targets": "all-linear,lm_head", "lora__dora": True}
TP = {"parallel__tensor_parallel": 2}
PP = {"parallel__pipeline_parallel": 2}
# Rows of two blocks, so that tensor parallelism can cut between them.
NF4 = {"lora__quantize": "nf4", "model__hidden_size": 128, "model__intermediate_size": 384, "model__head_dim": 32}
# name -> (ranks, what changes in the recipe)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single_dropout_remat": (1, {**ALL, "lora__dropout": 0.3, "train__activation_checkpointing": "full"}),
    "fsdp2_dora_head": (2, DORA),
    "fsdp2_remat_tied": (2, {**ALL, "train__activation_checkpointing": "full", "model__tie_embeddings": True}),
    "fsdp2_compiled": (2, {**ALL, "train__compile": True}),
    "hsdp2x2": (4, {"parallel__replicate": 2}),
    "tp2_dora_head": (2, {**DORA, **TP, "parallel__sequence_parallel": False}),
    "sp2": (2, {**ALL, **TP}),
    "sp2_fsdp2_dora_head": (4, {**DORA, **TP}),
    "fsdp2_nf4": (2, {**NF4, "lora__targets": "all-linear,lm_head"}),
    "fsdp2_nf4_dora_bf16": (2, {**NF4, **DORA, "train__precision": "bf16_mixed"}),
    "fsdp2_nf4_dora_remat": (2, {**NF4, **DORA, "train__activation_checkpointing": "selective"}),
    "sp2_fsdp2_nf4_dora": (4, {**NF4, **DORA, **TP}),
    "sp2_int8": (2, {**NF4, **TP, "lora__quantize": "int8"}),
    "pp2_fsdp2_nf4": (4, {**NF4, **PP, **ALL, "lora__double_quantization": False}),
    "pp2": (2, {**PP, "lora__targets": "q,down,lm_head"}),
    "pp2_tied_zero_bubble": (2, {**ALL, **PP, "model__tie_embeddings": True, "model__num_layers": 8,
                                 "parallel__pipeline_schedule": "interleaved_zero_bubble"}),
    "pp2_sp2_interleaved": (4, {**ALL, **PP, **TP, "parallel__pipeline_schedule": "interleaved_1f1b"}),
    "pp2_fsdp2_zbv": (4, {**ALL, **PP, "parallel__pipeline_schedule": "zbv_zero_bubble"}),
}  # fmt: skip


def lora_recipe(**changes: Any) -> Recipe:
    """The tests' tiny Llama with adapters of rank 4 on q and v."""
    return recipe(**({"lora__rank": 4, "lora__alpha": 8} | changes))


def _stir(model: ParallelLlama) -> None:
    """B not zero, the same on every layout: at zero A has no gradient."""
    for name, parameter in model.optimized_parameters():
        if name.endswith("lora_b"):
            local, box = local_part(parameter.data)
            rows, columns = (torch.arange(part.start, part.stop)[:, None] for part in box)
            local.copy_((torch.sin(1.7 * rows + 3.1 * columns.t()) * 0.1).to(local.dtype))


def gradients(rank: int, config: Recipe) -> dict[str, Any]:
    """Loss per token and the parts of each trained parameter's gradient that this rank holds."""
    mesh = build_mesh(layout(config, torch.distributed.get_world_size()), "cpu")
    model = parallelize(config, mesh, find_device("cpu"))
    _stir(model)
    named = model.optimized_parameters()
    parts = micro_batches(samples(False), config.train.micro_batch_size, mesh.data_rank, mesh.layout.data)
    loss = model.forward_backward(parts)
    settle_gradients(named)
    share = 1.0 if mesh.speaks_for_data else 0.0
    tokens = sum(int((b.labels != -100).sum()) for b in parts) * share / mesh.layout.pipeline
    loss_sum, count = total_over_ranks(torch.tensor([float(loss) * share, tokens], dtype=torch.float64))
    held = {}
    for name, parameter in named:
        assert parameter.grad is not None
        local, box = local_part(parameter.grad)
        held[name] = (box, local.detach() / count)
    frozen = [p for part in model.parts for p in part.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    optimizer = build_optimizer(model, config, find_device("cpu"))
    optimizer.step()
    assert len(optimizer.state) == len(named)
    return {"loss": loss_sum / count, "gradients": held}


def expect_like_one_process(ranks: list[dict[str, Any]], single: dict[str, Any], tolerance: float) -> None:
    """Every part on every rank is that part of the one process's gradient, and all of them are there."""
    assert {name for seen in ranks for name in seen["gradients"]} == set(single["gradients"])
    for seen in ranks:
        assert seen["loss"] == pytest.approx(single["loss"], rel=tolerance)
        for name, (box, value) in seen["gradients"].items():
            whole = single["gradients"][name][1]
            torch.testing.assert_close(value, whole[box], rtol=tolerance, atol=tolerance * float(whole.abs().max()))


@functools.cache
def _single(key: str) -> dict[str, Any]:
    return harness.run(1, gradients, Recipe.model_validate_json(key))[0]  # type: ignore[no-any-return]


def _plain(config: Recipe) -> str:
    train = config.train.model_copy(update={"activation_checkpointing": "none", "compile": False})
    return config.model_copy(update={"parallel": recipe().parallel, "train": train}).model_dump_json()


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(name: str) -> None:
    world, changes = LAYOUTS[name]
    config = lora_recipe(**changes)
    skip_unless_trainable(config)
    tolerance = 1e-5 if config.train.precision == "fp32" else 3e-2
    expect_like_one_process(harness.run(world, gradients, config), _single(_plain(config)), tolerance)


def test_only_adapters_are_saved_and_another_layout_goes_on(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path)

    def config(folder: str, **changes: Any) -> Recipe:
        keys = {
            "lora__rank": 4,
            "lora__targets": "all-linear",
            "schedule__kind": "constant",
            "data__order_samples": 56,
        } | changes
        return run_recipe(tmp_path / folder, prefix, **keys)

    whole = harness.run(1, spied_train, config("whole"))
    first = harness.run(2, spied_train, config("parts", train__steps=3))
    second = harness.run(2, spied_train, config("parts", **TP))
    losses = first[0].losses + second[0].losses
    assert losses == pytest.approx(whole[0].losses, rel=1e-5) and len(losses) == 6
    weights, expected = whole_weights(second), whole_weights(whole)
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in weights)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)
    saved = SafeReader(tmp_path / "whole/checkpoints/step-00000006").read_metadata().state_dict_metadata
    kinds = ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq")
    assert set(saved) == {kind.format(name) for kind in kinds for name in expected}

    other = harness.run(1, spied_train, config("parts", lora__rank=8, train__steps=7))
    assert "has adapters of rank 4 on 28 linears" in str(other[0].error)
    none = harness.run(1, spied_train, run_recipe(tmp_path / "parts", prefix, train__steps=7))
    assert "the recipe no adapters" in str(none[0].error)
