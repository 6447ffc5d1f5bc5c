"""Frozen weights on every layout: they stay, get no gradient and no moments, and the rest trains as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llama.checkpoint_format import SafeReader
from llama.config import Recipe
from llama.device import find_device
from llama.freeze import frozen, hf_name
from llama.layout import layout
from llama.parallel.apply import initial_weights, parallelize
from llama.parallel.mesh import build_mesh
from llama.parallel.shards import Box, local_part
from llama.train.optim import build_optimizer, scale_gradients, settle_gradients
from tests.dist import harness
from tests.dist.layouts import micro_batches, recipe, samples, skip_unless_trainable
from tests.dist.runs import run_recipe, spied_train, whole_weights, write_tokens

TP = {"parallel__tensor_parallel": 2}
PP = {"parallel__pipeline_parallel": 2}
LOW = {"train__freeze": "embed_tokens,layers.0-1"}
"""The lower half, which is the whole first stage of two."""
MIXED = {"train__freeze": "norms,attention,layers.3.mlp.down,lm_head"}
TIED = {"train__freeze": "embed_tokens,model.layers.[02]..*", "model__tie_embeddings": True}
# name -> (ranks, what changes in the recipe)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single_tied_remat": (1, {**TIED, "train__activation_checkpointing": "full"}),
    "fsdp2_mixed": (2, MIXED),
    "tp2": (2, {**MIXED, **TP, "parallel__sequence_parallel": False}),
    "sp2_tied": (2, {**TIED, **TP}),
    "sp2_fsdp2_low": (4, {**LOW, **TP}),
    "pp2_low": (2, {**LOW, **PP}),
    "pp2_fsdp2_mixed": (4, {**MIXED, **PP}),
    "pp2_fsdp2_interleaved_low": (4, {**LOW, **PP, "parallel__pipeline_schedule": "interleaved_1f1b"}),
    "pp2_zero_bubble_mixed": (2, {**MIXED, **PP, "parallel__pipeline_schedule": "interleaved_zero_bubble"}),
    "pp2_zbv_tied": (2, {**TIED, **PP, "parallel__pipeline_schedule": "zbv_zero_bubble"}),
}
LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-3
TOLERANCE = 1e-6
"""In float64 too transformers computes norms and rotations in fp32; eps keeps AdamW from blowing that up."""


def three_steps(rank: int, config: Recipe) -> dict[str, tuple[Box, torch.Tensor]]:
    """This rank's parts of all weights after three steps without clipping, in float64."""
    mesh = build_mesh(layout(config, torch.distributed.get_world_size()), "cpu")
    model = parallelize(config, mesh, find_device("cpu"), dtype=torch.float64)
    optimizer, named = build_optimizer(model, config, find_device("cpu")), model.optimized_parameters()
    for step in range(3):
        batch = samples(False, step)
        model.forward_backward(micro_batches(batch, config.train.micro_batch_size, mesh.data_rank, mesh.layout.data))
        settle_gradients(named)
        scale_gradients(named, 1 / int((batch.labels != -100).sum()))
        optimizer.step()
        optimizer.zero_grad()
    still = frozen(config.train.freeze, config.model)
    held = dict(model.named_parameters())
    assert all(parameter.requires_grad == (name not in still) for name, parameter in held.items())
    assert set(optimizer.state) == {parameter for _, parameter in named}
    assert not any(name in still for name, _ in named)
    return {name: (box, part.detach().clone()) for name, p in held.items() for part, box in [local_part(p)]}


def by_transformers(config: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after three steps of transformers' Llama with requires_grad=False and torch's AdamW."""
    shape = config.model
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.padded_vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.kv_heads,
            rms_norm_eps=shape.norm_eps, tie_word_embeddings=shape.tie_embeddings, attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        )
    ).double()  # fmt: skip
    read, named = initial_weights(config), dict(theirs.named_parameters())
    still = {hf_name(name) for name in frozen(config.train.freeze, shape)}
    from llama.freeze import parameter_shapes

    with torch.no_grad():
        for name in parameter_shapes(shape):
            p = named[hf_name(name)]
            p.copy_(read(name, tuple(slice(0, size) for size in p.shape)))
    for name, p in named.items():
        p.requires_grad_(name not in still)
    before = {name: p.detach().clone() for name, p in named.items()}
    groups = [
        {"params": [p for p in named.values() if p.requires_grad and p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.requires_grad and p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=BETAS, eps=EPS)
    for step in range(3):
        batch = samples(False, step)
        logits = theirs(batch.tokens).logits[..., : shape.vocab_size]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_are_those_of_transformers_with_the_same_weights_frozen(name: str) -> None:
    world, changes = LAYOUTS[name]
    pairs = {"model__num_layers": 4, "optimizer__lr": LR, "optimizer__betas": BETAS, "optimizer__eps": EPS}
    config = recipe(**(pairs | changes))
    skip_unless_trainable(config)
    before, after = by_transformers(config)
    still = {hf_name(n) for n in frozen(config.train.freeze, config.model)}
    seen = set()
    for rank in harness.run(world, three_steps, config):
        for ours, (box, value) in rank.items():
            theirs = hf_name(ours)
            seen.add(theirs)
            assert torch.equal(before[theirs], after[theirs]) == (theirs in still)
            torch.testing.assert_close(value, after[theirs][box], rtol=0, atol=0 if theirs in still else TOLERANCE)
    assert seen == set(after)


def test_a_run_goes_on_elsewhere_and_its_checkpoint_has_no_moments_of_what_is_frozen(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path)

    def config(folder: str, **changes: Any) -> Recipe:
        keys = {"schedule__kind": "constant", "data__order_samples": 56} | LOW | changes
        return run_recipe(tmp_path / folder, prefix, **keys)

    whole = harness.run(1, spied_train, config("whole"))
    first = harness.run(2, spied_train, config("parts", train__steps=3))
    second = harness.run(2, spied_train, config("parts", **PP))
    assert not any(r.error for r in (*whole, *first, *second))
    assert [*first[0].losses, *second[0].losses] == pytest.approx(whole[0].losses, rel=1e-5)
    weights, expected = whole_weights(second), whole_weights(whole)
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)
    saved = set(SafeReader(tmp_path / "parts/checkpoints/step-00000006").read_metadata().state_dict_metadata)
    still = set(frozen(config("whole").train.freeze, config("whole").model))
    assert {f"model.{name}" for name in (*still, *expected)} <= saved and not still & set(expected)
    assert {key.removeprefix("optimizer.").rpartition(".")[0] for key in saved if key.startswith("optimizer")} == set(
        expected
    )
    other = harness.run(1, spied_train, config("parts", train__freeze="norms", train__steps=7))
    assert "other weights frozen than train.freeze=norms" in str(other[0].error)
