"""Initial weights: a pure function of seed and name, whichever rows are asked for, of the right distribution."""

from __future__ import annotations

import math

import pytest
import torch

from llama.model.init import BLOCK, initial_rows, standard_deviation
from tests.dist.layouts import recipe

CONFIG = recipe(model__vocab_size=6000, model__hidden_size=512, model__num_heads=4, model__init_std=0.02).model
WIDTH = 512  # rows of one block: 2^18 / 512 = 512
NAME = "layers.1.attention.q.weight"


def test_any_range_of_rows_is_the_slice_of_the_whole() -> None:
    assert BLOCK // WIDTH == 512
    whole = initial_rows("embed.weight", CONFIG, 1, 0, 6016, WIDTH)
    for start, stop in ((0, 1), (511, 513), (512, 1024), (700, 700), (5, 3000), (5990, 6016), (6010, 6016)):
        assert torch.equal(initial_rows("embed.weight", CONFIG, 1, start, stop, WIDTH), whole[start:stop])


def test_a_width_that_does_not_divide_a_block_is_sliced_as_well() -> None:
    whole = initial_rows(NAME, CONFIG, 1, 0, 4000, 100)
    assert torch.equal(initial_rows(NAME, CONFIG, 1, 2620, 2623, 100), whole[2620:2623])
    wide = initial_rows(NAME, CONFIG, 1, 0, 3, BLOCK + 7)  # rows longer than a block
    assert torch.equal(initial_rows(NAME, CONFIG, 1, 1, 2, BLOCK + 7), wide[1:2])


def test_seed_and_name_decide_and_nothing_else() -> None:
    def draw(name: str = NAME, seed: int = 1) -> torch.Tensor:
        return initial_rows(name, CONFIG, seed, 0, 64, WIDTH)

    before = draw()
    torch.manual_seed(99)
    assert torch.equal(draw(), before)
    assert not torch.equal(draw(seed=2), before)
    assert not torch.equal(draw(name="layers.2.attention.q.weight"), before)
    assert before[0, :3].tolist() == draw()[0, :3].tolist()


def test_values_are_normal_with_the_stated_deviation() -> None:
    values = initial_rows(NAME, CONFIG, 1, 0, 2048, WIDTH).flatten().double()
    n = values.numel()
    assert abs(values.mean()) < 5 * 0.02 / math.sqrt(n)
    assert values.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
    assert ((values / 0.02) ** 4).mean().item() == pytest.approx(3.0, abs=0.03)
    assert torch.corrcoef(values.view(2, -1))[0, 1].abs() < 5 / math.sqrt(n / 2)


def test_residual_outputs_start_smaller_with_depth_unless_told_otherwise() -> None:
    for name in ("layers.0.attention.o.weight", "layers.3.mlp.down.weight"):
        assert standard_deviation(name, CONFIG) == pytest.approx(0.02 / math.sqrt(8))
        plain = CONFIG.model_copy(update={"scaled_residual_init": False})
        assert standard_deviation(name, plain) == 0.02
    for name in ("layers.0.mlp.up.weight", "embed.weight", "head.weight"):
        assert standard_deviation(name, CONFIG) == 0.02


def test_norms_are_ones_and_padding_rows_zero() -> None:
    assert torch.equal(initial_rows("layers.0.mlp_norm.weight", CONFIG, 1, 3, 9, 1), torch.ones(6, 1))
    head = initial_rows("head.weight", CONFIG, 1, 5900, 6016, WIDTH)
    assert head[100:].abs().max() == 0 and (head[:100].abs().amax(1) > 0).all()


def test_a_tied_output_is_the_embedding() -> None:
    tied = CONFIG.model_copy(update={"tie_embeddings": True})
    embed = initial_rows("embed.weight", CONFIG, 1, 0, 10, WIDTH)
    assert torch.equal(initial_rows("head.weight", tied, 1, 0, 10, WIDTH), embed)
    assert not torch.equal(initial_rows("head.weight", CONFIG, 1, 0, 10, WIDTH), embed)
