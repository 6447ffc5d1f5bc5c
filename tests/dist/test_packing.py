"""Packed conversations: loss and gradients of the same examples unpacked, on every kind of layout; resumed elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.chat.dataset import PackedSamples, build_chat, chat_samples
from llama.config import Recipe
from llama.device import find_device
from llama.layout import layout
from llama.parallel.apply import parallelize
from llama.parallel.mesh import build_mesh
from llama.parallel.shards import local_part
from llama.recipe import load
from llama.train.optim import settle_gradients, total_over_ranks
from tests.dist import harness
from tests.dist.layouts import reference_model
from tests.dist.runs import samples_of, spied_train
from tests.unit.llama.chat.chats import chat_recipe, write_talks, write_tokenizer

# name -> (ranks, what changes in the recipe)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"train__micro_batch_size": 4}),
    "single_remat_selective": (1, {"train__activation_checkpointing": "selective"}),
    "dp2": (2, {"parallel__replicate": 2, "parallel__shard": 1}),
    "fsdp2": (2, {"train__micro_batch_size": 2, "train__activation_checkpointing": "full"}),
    "tp2": (2, {"parallel__tensor_parallel": 2, "parallel__sequence_parallel": False}),
    "sp2": (2, {"parallel__tensor_parallel": 2}),
    "pp2": (2, {"parallel__pipeline_parallel": 2}),
    "pp2_fsdp2": (4, {"parallel__pipeline_parallel": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    write_tokenizer(folder / "tokenizer")
    write_talks(folder / "talks.jsonl")
    return folder


def _unpacked(config: Recipe, samples: PackedSamples) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Summed loss, trained tokens and gradients of one step's examples, each alone, by torch's own cross-entropy."""
    model, total, count = reference_model(config, torch.float32), 0.0, 0
    for i in range(config.train.global_batch_size):
        for example in samples.members(i).tolist():
            ids = torch.from_numpy(samples.encoded.tokens.get(example).astype("int64"))
            trained = torch.from_numpy(samples.encoded.trained.get(example).astype(bool))
            labels = ids.masked_fill(~trained, -100)
            logits = model(ids[None, :-1])
            loss = torch.nn.functional.cross_entropy(logits[0], labels[1:], ignore_index=-100, reduction="sum")
            loss.backward()
            total, count = total + loss.item(), count + int((labels[1:] != -100).sum())
    return total, count, {name: p.grad for name, p in model.named_parameters()}


def _packed(rank: int, config: Recipe) -> dict[str, Any]:
    """The first step's loss and gradients on this rank."""
    mesh = build_mesh(layout(config, torch.distributed.get_world_size()), "cpu")
    model = parallelize(config, mesh, find_device("cpu"))
    batches = build_chat(config, mesh.data_rank, mesh.layout.data)[0].step(0)
    loss = model.forward_backward(batches)
    named = model.optimized_parameters()
    settle_gradients(named)
    share = 1.0 if mesh.speaks_for_data else 0.0
    tokens = sum(int((b.labels != -100).sum()) for b in batches) * share / mesh.layout.pipeline
    total = total_over_ranks(torch.tensor([float(loss) * share, tokens], dtype=torch.float64))
    held = {n: (local_part(p.grad)[1], local_part(p.grad)[0].clone()) for n, p in named if p.grad is not None}
    return {"loss": total[0], "tokens": total[1], "gradients": held}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_examples_are_learnt_as_if_alone(folder: Path, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    config = chat_recipe(folder, folder / "talks.jsonl", **changes)
    samples, _ = chat_samples(config)
    assert max(len(samples.members(i)) for i in range(config.train.global_batch_size)) > 2
    loss, tokens, gradients = _unpacked(config, samples)
    seen = harness.run(ranks, _packed, config)
    for rank in seen:
        assert rank["tokens"] == tokens
        assert rank["loss"] == pytest.approx(loss, rel=1e-5)
        for key, (box, value) in rank["gradients"].items():
            wanted = gradients[key]
            torch.testing.assert_close(value, wanted[box], rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert {key for rank in seen for key in rank["gradients"]} >= set(gradients)


def _train(rank: int, config: Recipe) -> Any:
    return spied_train(rank, config)


def test_a_run_goes_on_elsewhere_with_the_same_examples_and_loss(folder: Path, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch on two ranks, resumed on one; against one that was left alone."""
    keys: dict[str, Any] = dict(
        train__steps=6, checkpoint__interval=3, log__tensorboard=False, optimizer__eps=1e-6, train__global_batch_size=4,
        schedule__kind="constant",
    )  # fmt: skip

    def config(name: str, **more: Any) -> Recipe:
        made = chat_recipe(folder, folder / "talks.jsonl", **(keys | more))
        return made.model_copy(update={"run_dir": str(tmp_path / name)})

    alone = harness.run(1, _train, config("alone"))
    first = harness.run(2, _train, config("moved", train__steps=3))
    then = harness.run(1, _train, config("moved"))
    assert not any(record.error for record in (*alone, *first, *then))
    assert samples_of([*first, *then]) == samples_of(alone)
    assert [*first[0].losses, *then[0].losses] == pytest.approx(alone[0].losses, rel=1e-4)


def test_epochs_read_every_example_so_often_and_go_on_when_there_are_more(folder: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = dict(
        train__global_batch_size=4, checkpoint__interval=100, log__tensorboard=False, schedule__kind="constant"
    )

    def config(epochs: float) -> Recipe:
        made = chat_recipe(folder, folder / "talks.jsonl", train__epochs=epochs, **keys)
        return made.model_copy(update={"run_dir": str(tmp_path / "run")})

    sequences = len(chat_samples(config(1))[0])
    first = harness.run(2, _train, config(1))
    assert not first[0].error and first[0].state is not None and first[0].state.step == -(-sequences // 4)
    assert load(str(tmp_path / "run" / "recipe.yaml")).train.steps == -(-sequences // 4)
    then = harness.run(1, _train, config(2.5))
    assert not then[0].error and then[0].state is not None and then[0].state.step == math.ceil(2.5 * sequences / 4)
    assert min(then[0].samples) == max(first[0].samples | first[1].samples) + 1, "it goes on where the first ended"


def _refused(rank: int, config: Recipe) -> Any:
    return spied_train(rank, config).error


def test_what_the_first_rank_refuses_ends_all_ranks_with_one_cause(folder: Path, tmp_path: Path) -> None:
    made = chat_recipe(folder, folder / "talks.jsonl", chat__truncation="error", data__seq_length=32)
    errors = harness.run(2, _refused, made.model_copy(update={"run_dir": str(tmp_path / "run")}))
    assert errors[0] == errors[1] and "than data.seq_length=32 takes" in errors[0]
