"""Small recipes, batches and one-process references that the layout tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama.config import ZERO_BUBBLE, Recipe
from llama.data.batches import Batch
from llama.device import find_device
from llama.model.llama import Llama
from llama.parallel.apply import initial_weights
from llama.parallel.shards import fill_parameters

VOCAB, SEQ, GLOBAL_BATCH = 250, 32, 8


def recipe(**changes: Any) -> Recipe:
    """A Llama of 4 layers that every layout in the tests divides; `section__key=value` changes it."""
    keys: dict[str, Any] = {
        "name": "tiny",
        "model": dict(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=80, num_layers=4, num_heads=4, num_kv_heads=2,
            max_position=64, vocab_multiple=8, init_std=0.1,
        ),
        "data": {"seq_length": SEQ},
        "train": dict(steps=3, global_batch_size=GLOBAL_BATCH, micro_batch_size=1, precision="fp32", loss_chunk=24),
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "clip_norm": 1.0},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        keys.setdefault(section, {})[key] = value
    return Recipe.model_validate(keys)


def skip_unless_trainable(config: Recipe) -> None:
    """Skip a test that takes steps of a schedule which this torch does not have."""
    if config.parallel.pipeline_schedule in ZERO_BUBBLE and not find_device("cpu").zero_bubble:
        pytest.skip("zero-bubble pipelines need torch 2.13 or newer")


def samples(masked: bool, step: int = 0) -> Batch:
    """A global batch: tokens with uneven counts of trained ones, packed documents when `masked`."""
    generator = torch.Generator().manual_seed(7 + step)
    tokens = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQ + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for i in range(GLOBAL_BATCH):  # sample i trains on fewer and fewer tokens, the last data rank on far fewer
        labels[i, : i * 3] = -100
    documents = torch.zeros(GLOBAL_BATCH, SEQ, dtype=torch.int32)
    positions = torch.arange(SEQ, dtype=torch.int32).repeat(GLOBAL_BATCH, 1)
    if masked:
        documents = (torch.arange(SEQ) // 11).int().repeat(GLOBAL_BATCH, 1)
        positions = positions % 11
    return Batch(tokens[:, :-1].contiguous(), labels, positions, documents, step * GLOBAL_BATCH)


def micro_batches(batch: Batch, size: int, data_rank: int, data_size: int) -> list[Batch]:
    """The part of a global batch that one data rank computes, in Megatron's order."""
    order = range(0, GLOBAL_BATCH, size * data_size)
    rows = [slice(start + data_rank * size, start + (data_rank + 1) * size) for start in order]
    return [Batch(batch.tokens[r], batch.labels[r], batch.positions[r], batch.documents[r], batch.cursor) for r in rows]


def reference_model(config: Recipe, dtype: torch.dtype) -> Llama:
    """The whole network on this process, without anything of llama/parallel but the filling of weights."""
    model = Llama(config.model).to(dtype)
    fill_parameters(model, initial_weights(config))
    return model


def mean_loss(model: Llama, batch: Batch, masked: bool) -> torch.Tensor:
    """Cross-entropy per trained token by torch's own function on whole logits."""
    logits = model(batch.tokens, batch.positions, batch.documents if masked else None)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
