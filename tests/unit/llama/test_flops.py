"""FLOPs of runs with frozen weights, against what torch counts while a real network runs forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama.config import Recipe
from llama.flops import Product, products, trained_flops_per_token
from llama.freeze import frozen
from llama.model.llama import Llama, count_parameters, flops_per_token
from llama.model.lora import adapt
from llama.parallel.apply import freeze
from llama.recipe import load
from tests.dist.layouts import SEQ, recipe, samples

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "all_tied": {"model__tie_embeddings": True},
    "low": {"train__freeze": "embed_tokens,layers.0-1"},
    "head_alone": {"train__freeze": "embed_tokens,layers.0-3,norm"},
    "mixed": {"train__freeze": "embed_tokens,norms,layers.0.attention,layers.0.mlp.gate,layers.2"},
    "lora_qv": {"lora__rank": 4},
    "lora_high": {"lora__rank": 4, "lora__targets": "model.layers.[23].mlp.up_proj"},
    "lora_all_head": {"lora__rank": 4, "lora__targets": "all-linear,lm_head"},
}


def _addmm_(_: torch.Size, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> int:
    """What torch's counter leaves out."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("name", CASES)
def test_matrix_products_are_those_that_torch_counts(name: str) -> None:
    config = recipe(**CASES[name])
    model = Llama(config.model)
    if config.lora.rank:
        adapt(model, config.lora, torch.float32)
    freeze(model, frozen(config.train.freeze, config.model))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    batch, tokens = samples(False), 8 * SEQ
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_}) as counter:
        model(batch.tokens, batch.positions, None, batch.labels).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(flops for operator, flops in counts.items() if "mm" in str(operator))
    # The head multiplies by the rows that pad the vocabulary too.
    rows = config.model.padded_vocab_size / config.model.vocab_size
    expected = sum(
        p.flops * (rows if p.name.startswith("head") and not p.name.endswith("lora_a") else 1)
        for p in products(config)
        if isinstance(p, Product) and not p.name.endswith("norm")
    )
    assert counted == pytest.approx(expected * tokens, rel=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_with_nothing_frozen_it_is_six_n_and_attention(causal: bool) -> None:
    config = load("llama3.1_8b")
    assert trained_flops_per_token(config, causal) == flops_per_token(config.model, config.data.seq_length, causal)


def test_under_adapters_the_base_counts_four_n_and_adapters_six() -> None:
    config = load("llama3.1_8b", ["lora.rank=16", "lora.targets=all-linear"])
    model = config.model
    matrices = count_parameters(model)[1] + model.vocab_size * model.hidden_size
    adapters = 41_943_040
    first = model.hidden_size * (model.hidden_size + 2 * 1024 + 16 * 3) + model.hidden_size  # nothing trained below
    attention = 12 * model.num_layers * model.hidden_size * config.data.seq_length
    expected = 4 * matrices + 6 * adapters - 2 * first + attention
    assert trained_flops_per_token(config, causal=False) == pytest.approx(expected, rel=1e-12)


def test_what_lies_below_everything_trained_counts_forward_alone() -> None:
    def of(config: Recipe) -> float:
        return trained_flops_per_token(config, causal=True)

    half = of(recipe(train__freeze="embed_tokens,layers.0-1"))
    assert of(recipe(train__freeze="layers.0-1")) > half > of(recipe()) / 3
