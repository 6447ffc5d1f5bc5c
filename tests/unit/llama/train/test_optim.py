"""Stochastic rounding and the AdamW built on it: unbiased, exact where it can be, alike on copies, exact on resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llama.device import find_device
from llama.train.optim import StochasticAdamW, clip_factor, squared_norm, stochastic_round, total_over_ranks


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_values_that_bf16_holds_are_kept_exactly() -> None:
    values = torch.randn(10_000).bfloat16().float()
    values[:6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-130, 3.3e38]).bfloat16().float()
    rounded = stochastic_round(values, _generator())
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.float(), values)
    assert torch.equal(rounded.signbit(), values.signbit())


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159e-5, -2.71828e10, 1e-40])
def test_the_mean_of_many_roundings_is_the_value_and_each_is_a_neighbour(value: float) -> None:
    exact = torch.tensor(value)
    bits = exact.view(torch.int32)
    toward_zero = bits.bitwise_and(-65536).view(torch.float32).item()
    away = (bits.bitwise_and(-65536) + 65536).view(torch.float32).item()
    n = 100_000
    rounded = stochastic_round(exact.expand(n), _generator()).double()
    assert set(rounded.unique().tolist()) == {toward_zero, away}
    deviation = abs(away - toward_zero) / 2 / math.sqrt(n)
    assert abs(rounded.mean().item() - exact.double().item()) < 5 * deviation


def test_infinities_and_nan_stay_what_they_are() -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan]).repeat(5000)
    # A nan whose only set bit is the lowest: noise would carry it away, or cutting make an infinity of it.
    values[-1] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    rounded = stochastic_round(values, _generator())
    assert torch.equal(rounded[0:-1:3], torch.full((5000,), math.inf, dtype=torch.bfloat16))
    assert torch.equal(rounded[1::3], torch.full((5000,), -math.inf, dtype=torch.bfloat16))
    assert rounded[2::3].isnan().all()


def test_a_view_that_is_not_contiguous_is_rounded_in_place_order() -> None:
    values = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(stochastic_round(values, _generator()).float(), values)


def _optimizer(weight: torch.Tensor, name: str = "layers.0.w", seed: int = 0, **options: Any) -> StochasticAdamW:
    settings: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.float32)
    settings.update(options)
    decay = settings.pop("weight_decay", 0.1)
    return StochasticAdamW(
        [{"params": [weight], "weight_decay": decay}], **settings, names={weight: name}, seed=seed
    )  # fmt: skip


def _run(optimizer: torch.optim.Optimizer, weight: torch.Tensor, steps: range) -> None:
    for step in steps:
        weight.grad = torch.randn(weight.shape, generator=_generator(100 + step)).to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_the_mean_over_seeds_follows_torch_adamw(state_dtype: torch.dtype) -> None:
    start = torch.randn(16, generator=_generator(1)).bfloat16()
    exact = torch.nn.Parameter(start.double())
    torch_adamw = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(16, generator=_generator(100 + step)).bfloat16()
        exact.grad = gradient.double()
        torch_adamw.step()
    seeds = 400
    results = torch.empty(seeds, 16, dtype=torch.float64)
    for seed in range(seeds):
        weight = torch.nn.Parameter(start.clone())
        _run(_optimizer(weight, seed=seed, state_dtype=state_dtype), weight, range(5))
        results[seed] = weight.detach().double()
    # bf16 moments are a little biased in the update (a root of something noisy), the weight's rounding is not.
    allowed = 6 * results.std(0) / math.sqrt(seeds) + (1e-7 if state_dtype == torch.float32 else 2e-3)
    assert ((results.mean(0) - exact.detach()).abs() < allowed).all()
    assert results.std(0).max() > 0  # it did round stochastically


def test_tiny_updates_move_the_weight_in_expectation_where_rounding_to_nearest_stalls() -> None:
    lr, steps = 1e-5, 200  # near 1 a bf16 step is 2⁻⁷ or 2⁻⁸: each update is a hundred times too small to be seen
    stochastic = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    nearest = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    ours = _optimizer(stochastic, lr=lr, weight_decay=0.0)
    theirs = torch.optim.AdamW([nearest], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        for weight in (stochastic, nearest):
            weight.grad = torch.ones_like(weight)
        ours.step()
        theirs.step()
    assert torch.equal(nearest.detach(), torch.ones_like(nearest))
    moved = stochastic.detach().double()
    assert moved.mean().item() == pytest.approx(1 - lr * steps, abs=5 * moved.std().item() / math.sqrt(20_000))


def test_copies_of_a_weight_round_alike_and_other_names_seeds_and_steps_do_not() -> None:
    def after(steps: int = 3, **options: Any) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
        _run(_optimizer(weight, **options), weight, range(steps))
        return weight.detach()

    assert torch.equal(after(), after())
    assert not torch.equal(after(), after(name="layers.1.w"))
    assert not torch.equal(after(), after(seed=1))
    noise = []
    for step in (1, 2):
        weight = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
        optimizer = _optimizer(weight, lr=1e-3)
        _run(optimizer, weight, range(1))
        weight.data.fill_(1)
        optimizer.state[weight]["step"].fill_(step - 1)
        optimizer.state[weight]["exp_avg"].zero_()
        optimizer.state[weight]["exp_avg_sq"].zero_()
        _run(optimizer, weight, range(1))
        noise.append(weight.detach().clone())
    assert not torch.equal(*noise)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_rounds_as_the_uninterrupted_one(state_dtype: torch.dtype) -> None:
    start = torch.randn(300, generator=_generator(2)).bfloat16()
    whole = torch.nn.Parameter(start.clone())
    _run(_optimizer(whole, state_dtype=state_dtype), whole, range(8))
    first = torch.nn.Parameter(start.clone())
    before = _optimizer(first, state_dtype=state_dtype)
    _run(before, first, range(4))
    second = torch.nn.Parameter(first.detach().clone())
    after = _optimizer(second, state_dtype=state_dtype)
    after.state[second] = {key: value.clone() for key, value in before.state[first].items()}
    _run(after, second, range(4, 8))
    assert torch.equal(whole, second)


def test_tied_copies_on_two_pipeline_ends_go_by_one_name() -> None:
    """Otherwise first and last stage would round the shared embedding differently and it would not stay shared."""
    from types import SimpleNamespace

    from llama.train.optim import build_optimizer
    from tests.dist.layouts import recipe

    for tied, name in ((True, "embed.weight"), (False, "head.weight")):
        weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        last_stage: Any = SimpleNamespace(optimized_parameters=lambda weight=weight: [("head.weight", weight)])
        config = recipe(train__precision="bf16_sr", model__tie_embeddings=tied)
        optimizer = build_optimizer(last_stage, config, find_device("cpu"))
        assert isinstance(optimizer, StochasticAdamW)
        assert optimizer.names[weight] == name


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_where_the_device_rounds_moments_are_of_the_type_that_the_recipe_says(kept: str) -> None:
    """Trainium's runtime rounds what becomes bf16; AdamW of torch would hold moments in bf16, whatever the recipe says."""
    from dataclasses import replace
    from types import SimpleNamespace

    from llama.train.optim import build_optimizer
    from tests.dist.layouts import recipe

    start, gradient = (torch.randn(64, 64, generator=_generator(i)).bfloat16() for i in range(2))
    weight = torch.nn.Parameter(start.clone())
    model: Any = SimpleNamespace(optimized_parameters=lambda: [("layers.0.w", weight)])
    config = recipe(train__precision="bf16_sr", optimizer__state_dtype=kept)
    optimizer = build_optimizer(model, config, replace(find_device("cpu"), type="neuron"))
    weight.grad = gradient
    optimizer.step()
    assert {optimizer.state[weight][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {getattr(torch, kept)}
    exact = start.float().requires_grad_()
    exact.grad = gradient.float()
    torch.optim.AdamW([exact], config.optimizer.lr, config.optimizer.betas, config.optimizer.eps, 0.1).step()
    torch.testing.assert_close(weight.detach(), exact.detach().bfloat16(), rtol=2**-7, atol=0)


def test_the_norm_of_bf16_tensors_is_not_rounded_to_bf16() -> None:
    tensors = [torch.randn(1000, generator=_generator(i)).bfloat16() for i in range(3)]
    exact = sum(float(t.double().square().sum()) for t in tensors)
    assert squared_norm(tensors, 1).item() == pytest.approx(exact, rel=1e-6)
    assert squared_norm([], 4).item() == 0


def test_sums_in_float32_keep_whole_numbers_exact() -> None:
    numbers = [0.0, 1.0, 4095.0, 4096.0, 2.0**24 - 1, 0.25, 1e-12, 3e18]
    assert total_over_ranks(torch.tensor(numbers)) == pytest.approx(numbers, rel=1e-7, abs=0)
    assert total_over_ranks(torch.tensor(numbers))[:6] == numbers[:6]
    assert total_over_ranks(torch.tensor(numbers, dtype=torch.float64)) == numbers
    for bad in (torch.inf, torch.nan):
        assert not math.isfinite(total_over_ranks(torch.tensor([bad]))[0])


def test_clipping_scales_down_to_the_limit_and_never_up() -> None:
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, None) == 1.0
