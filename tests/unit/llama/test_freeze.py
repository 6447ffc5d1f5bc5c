"""What names and patterns of train.freeze mean, and how they are refused."""

from __future__ import annotations

import re

import pytest

from llama.config import Recipe
from llama.freeze import counts, frozen, hf_name, parameter_shapes
from llama.hf.weights import hf_name as stored_name
from llama.hf.weights import parameter_shapes as stored_shapes
from llama.parallel.adapters import adapters_in_words
from llama.recipe import load
from tests.dist.layouts import recipe

MODEL = recipe().model
TIED = recipe(model__tie_embeddings=True).model


def test_names_and_shapes_are_those_of_published_checkpoints() -> None:
    for model in (MODEL, TIED):
        shapes = parameter_shapes(model)
        assert shapes == {k: v for k, v in stored_shapes(model).items() if k in shapes}
        assert [hf_name(name) for name in shapes] == [stored_name(name) for name in shapes]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("embed_tokens", ["embed.weight"]),
        ("embed", ["embed.weight"]),
        ("lm_head", ["head.weight"]),
        ("norm", ["norm.weight"]),
        ("layers.1.mlp", [f"layers.1.mlp.{part}.weight" for part in ("gate", "up", "down")]),
        ("layers.0-1.q_proj", ["layers.0.attention.q.weight", "layers.1.attention.q.weight"]),
        ("layers.3.mlp.down", ["layers.3.mlp.down.weight"]),
        ("layers.2.input_layernorm", ["layers.2.attention_norm.weight"]),
        ("v", [f"layers.{i}.attention.v.weight" for i in range(4)]),
        (r"model\.layers\.[03]\.self_attn\.o_proj", ["layers.0.attention.o.weight", "layers.3.attention.o.weight"]),
    ],
)
def test_a_pattern_means(pattern: str, meant: list[str]) -> None:
    assert frozen([pattern], MODEL) == meant


def test_groups_and_ranges_hold_whole_layers_and_every_norm() -> None:
    assert len(frozen(["layers.0-1"], MODEL)) == len(frozen([r"model\.layers\.[01]\..*"], MODEL)) == 18
    assert len(frozen(["norms"], MODEL)) == 9
    assert frozen(["lm_head"], TIED) == frozen(["embed_tokens"], TIED) == ["embed.weight"]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ("embed_token", "'embed_token' names no weight; did you mean embed_tokens?"),
        ("layers.0.self_attn.q_prj", "names no weight; did you mean model.layers.0.self_attn.q_proj"),
        ("layers.2-7", "'layers.2-7' goes beyond the model's layers, which are 0..3"),
        ("mlp[", "is no regular expression"),
        (".*", "train.freeze=.* freezes every weight"),
    ],
)
def test_what_means_nothing_or_leaves_nothing_is_refused(patterns: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        recipe(train__freeze=patterns)


def test_adapters_are_refused_beside_it() -> None:
    with pytest.raises(ValueError, match="frozen anyway"):
        recipe(train__freeze="norms", lora__rank=4)


def test_the_count_is_printed_as_peft_does() -> None:
    config: Recipe = load("llama3.1_8b", ["train.freeze=embed_tokens,layers.0-15"])
    trained, total = counts(config.train.freeze, config.model)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert total == 8_030_261_248 and trained == total - 128256 * 4096 - 16 * layer
    assert adapters_in_words(config) == [
        f"trainable params: {trained:,} || all params: 8,030,261,248 || trainable%: {100 * trained / total:.4f}"
    ]
