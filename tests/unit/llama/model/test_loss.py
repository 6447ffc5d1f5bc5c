"""The chunked output projection and cross-entropy against torch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama.model.loss import LowRank, linear_cross_entropy

N, D, V = 50, 16, 37


def _case(dtype: torch.dtype = torch.float64, rows: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def _torch_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = (hidden.double() @ weight.double().t())[:, :V]
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 51, 1000])
def test_any_chunk_gives_torchs_loss_and_gradients(chunk: int) -> None:
    hidden, weight, labels = _case()
    expected = _torch_loss(hidden, weight, labels)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, V, chunk)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, exact in zip(torch.autograd.grad(loss.sum(), (hidden, weight)), wanted, strict=True):
        assert torch.allclose(found, exact, rtol=1e-10, atol=1e-12)


def test_rows_past_the_vocabulary_never_compete_and_get_no_gradient() -> None:
    hidden, weight, labels = _case(rows=V + 11)
    with torch.no_grad():
        weight[V:] = 1e3  # would win every softmax
    expected = _torch_loss(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight, labels, V, 16)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.sum().backward()
    assert weight.grad is not None and weight.grad[V:].abs().max() == 0 and weight.grad[:V].abs().max() > 0


def test_with_every_label_ignored_loss_and_gradients_are_zero_not_nan() -> None:
    hidden, weight, labels = _case(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), V, 16)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss.sum(), (hidden, weight)):
        assert gradient.abs().max() == 0


def test_ignored_tokens_get_no_gradient() -> None:
    hidden, weight, labels = _case()
    linear_cross_entropy(hidden, weight, labels, V, 16).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[labels == -100].abs().max() == 0
    assert (hidden.grad[labels != -100].abs().amax(1) > 0).all()


def test_huge_logits_stay_finite() -> None:
    hidden, weight, labels = _case(torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels, V, 16)
    assert loss.item() == pytest.approx(_torch_loss(hidden * 1e4, weight, labels).item(), rel=1e-5)


def test_in_bf16_the_loss_is_fp32_and_gradients_are_within_its_rounding() -> None:
    hidden, weight, labels = _case(torch.bfloat16)
    expected = _torch_loss(hidden, weight, labels)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, V, 16)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for found, exact in zip(torch.autograd.grad(loss.sum(), (hidden, weight)), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact.double()).norm() < 0.01 * exact.double().norm()


def test_the_gradient_scales_with_what_comes_from_above() -> None:
    hidden, weight, labels = _case()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, V, 16).sum(), (hidden, weight))
    scaled = torch.autograd.grad(3.5 * linear_cross_entropy(hidden, weight, labels, V, 16).sum(), (hidden, weight))
    assert all(torch.allclose(3.5 * a, b, rtol=1e-12) for a, b in zip(once, scaled, strict=True))


def test_backward_may_be_asked_twice_for_its_two_gradients_as_zero_bubble_pipelines_do() -> None:
    hidden, weight, labels = _case()
    together = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, V, 16).sum(), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, V, 16).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, together[0]) and torch.equal(second, together[1])


def test_a_second_derivative_is_refused_instead_of_being_wrong() -> None:
    hidden, weight, labels = _case()
    loss = linear_cross_entropy(hidden, weight, labels, V, 16).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    scaled = scale * linear_cross_entropy(hidden, weight, labels, V, 16).sum()
    (gradient,) = torch.autograd.grad(scaled, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_is_unchanged(frozen: int) -> None:
    inputs = _case()
    both = torch.autograd.grad(linear_cross_entropy(*inputs, V, 16).sum(), inputs[:2])
    inputs[frozen].requires_grad_(False)
    linear_cross_entropy(*inputs, V, 16).sum().backward()
    other = inputs[1 - frozen].grad
    assert inputs[frozen].grad is None and other is not None and torch.equal(other, both[1 - frozen])


@pytest.mark.parametrize("rows", [V, V + 11])
@pytest.mark.parametrize("masked", [0.0, 0.4, 0.99, 1.0])
def test_logits_of_trained_tokens_alone_give_the_same_loss_and_gradients(masked: float, rows: int) -> None:
    hidden, weight, labels = _case(torch.float32, rows)
    labels = torch.where(torch.rand(N, generator=torch.Generator().manual_seed(1)) < masked, -100, labels.abs())
    seen = []
    for skip in (False, True):
        loss = linear_cross_entropy(hidden, weight, labels, V, 7, skip_untrained=skip)
        seen.append([loss, *torch.autograd.grad(loss.sum(), (hidden, weight))])
    for plain, skipped in zip(*seen, strict=True):
        assert torch.allclose(skipped, plain, rtol=1e-6, atol=1e-6 * plain.abs().max().item())


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("stretched", [False, True])
def test_an_adapter_gives_the_loss_and_gradients_of_the_logits_it_means(stretched: bool, skip: bool) -> None:
    hidden, weight, labels = _case(rows=V + 3)
    frozen = weight.detach()
    generator = torch.Generator().manual_seed(2)
    narrow, last, ratio = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((N, 4), (V + 3, 4), (V + 3,))
    )
    given = (hidden, narrow, last, *((ratio,) if stretched else ()))
    logits = hidden @ frozen.t() + narrow @ last.t()
    logits = (logits * ratio if stretched else logits)[:, :V]
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    adapter = LowRank(narrow, last, ratio if stretched else None)
    loss = linear_cross_entropy(hidden, frozen, labels, V, 16, adapter=adapter, skip_untrained=skip)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    pairs = zip(torch.autograd.grad(loss.sum(), given), torch.autograd.grad(expected, given), strict=True)
    for found, exact in pairs:
        assert torch.allclose(found, exact, rtol=1e-10, atol=1e-12)
