"""What a run starts from: weights, the order of its samples, the data it began with; and what it says of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from data_prep.errors import UserError
from llama import hf
from llama.checkpoint_format import TrainState
from llama.config import Recipe
from llama.data.batches import Batches
from llama.device import Device
from llama.model.llama import count_parameters
from llama.parallel.apply import ParallelLlama
from llama.parallel.shards import Box
from llama.train.metrics import si


def weights_reader(recipe: Recipe) -> Callable[[str, Box], torch.Tensor] | None:
    """Reads train.init_from's weights; None where the run starts from random ones."""
    directory = recipe.train.init_from
    if directory is None:
        return None
    return hf.checkpoint_reader(Path(directory), recipe.model)


def adapter_reader(recipe: Recipe) -> Callable[[str, Box], torch.Tensor] | None:
    """Reads lora.init_from's adapter; None where adapters start from random values or there are none."""
    return None if recipe.lora.init_from is None else hf.adapter_reader(recipe.lora.init_from, recipe)


def settle_order(recipe: Recipe, state: TrainState) -> Recipe:
    """Fix for how many samples the order is laid out: what the first start chose, so that a longer run goes on in it."""
    default = recipe.train.steps * recipe.train.global_batch_size
    state.order_samples = state.order_samples or recipe.data.order_samples or default
    if recipe.data.order_samples not in (None, state.order_samples):
        raise UserError(
            f"data.order_samples={recipe.data.order_samples}, but this run began with {state.order_samples}; leave it out, "
            "or start in another run_dir",
            2,
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"order_samples": state.order_samples})})


def settle_steps(recipe: Recipe, data: Batches) -> Recipe:
    """Fix how many steps train.epochs are."""
    if recipe.train.epochs is None:
        return recipe
    from llama.chat.dataset import PackedSamples

    assert isinstance(data.samples, PackedSamples)
    steps = recipe.train.steps_for(len(data.samples))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def check_same_data(recipe: Recipe, state: TrainState, data: Batches) -> None:
    """Refuse to go on with other token files than the run began with."""
    if state.data_fingerprint and state.data_fingerprint != data.fingerprint and not recipe.data.allow_change:
        raise UserError(
            f"the token files, their weights or data.seq_length are not those that {recipe.folder} was trained on so far; "
            "restore them, start in another run_dir, or set data.allow_change=true to go on with the new ones",
            2,
        )
    state.data_fingerprint = data.fingerprint


def describe(recipe: Recipe, device: Device, model: ParallelLlama, resumed: TrainState | None) -> str:
    """What is about to run, for the first line of the log."""
    layout = model.mesh.layout
    total, _ = count_parameters(recipe.model)
    start = f"resuming after step {resumed.step}" if resumed else (recipe.train.init_from or "random weights")
    return (
        f"{recipe.name}: {si(total)} parameters, {layout.world} x {device.name} as {layout.name}, "
        f"{recipe.train.precision}, {recipe.train.global_batch_size} x {recipe.data.seq_length} tokens a step "
        f"in {layout.accumulation} micro-batches, {recipe.train.steps} steps; {start}; in {recipe.folder}"
    )
