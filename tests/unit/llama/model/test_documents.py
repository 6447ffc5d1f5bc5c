"""Attention in each document alone: one by one, in one kernel, and by a mask are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen as torchs

from llama.model import varlen
from llama.model.attention import Documents, document_mask

LENGTHS = ((3, 1, 7, 5), (16,), (1, 15))


@pytest.fixture
def documents() -> Documents:
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    return Documents(torch.stack(rows).int())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    varlen.kernel.cache_clear()
    yield
    varlen.kernel.cache_clear()


def heads(grouped: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    counts = (4, 2, 2) if grouped else (4, 4, 4)
    made = [torch.randn(len(LENGTHS), count, 16, 8).to(device, dtype) for count in counts]
    return [x.requires_grad_() for x in made]


def masked(documents: Documents, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = document_mask(documents.numbers)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def by_ends(q: Any, k: Any, v: Any, ends: Any, other: Any, longest: int, also: int, causal: bool) -> torch.Tensor:
    """What the kernel's documentation says it computes, in plain steps."""
    assert ends.dtype == torch.int32 and torch.equal(ends, other) and longest == also >= int(torch.diff(ends).max())
    assert causal
    out = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        a, b, c = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def of_2_10(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False
) -> Any:
    assert query.shape == key.shape
    return by_ends(query, key, value, cu_q, cu_k, max_q, max_k, is_causal)


def of_2_11(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, window_size: Any = (-1, -1)
) -> Any:
    assert query.shape == key.shape
    return by_ends(query, key, value, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))


def of_2_12(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *,
    window_size: Any = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    assert query.shape == key.shape or enable_gqa
    return by_ends(query, key, value, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("release", [None, of_2_10, of_2_11, of_2_12])
def test_every_way_is_the_masked_one(
    documents: Documents, release: Any, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = heads(grouped)
    wanted = masked(documents, q, k, v)
    weights = torch.randn_like(wanted)
    if release is None:
        found = documents.attend(q, k, v)
    else:
        monkeypatch.setattr(torchs, "varlen_attn", release)
        kernel = varlen.kernel()
        assert kernel is not None
        found = documents._together(q, k, v, kernel)
    assert found is not None
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_documents_end_with_their_rows(documents: Documents) -> None:
    assert documents.sizes == [3, 1, 7, 5, 16, 1, 15]
    assert documents.ends.tolist() == [0, 3, 4, 11, 16, 32, 33, 48]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grouped", [False, True])
def test_on_cuda_too(documents: Documents, grouped: bool, dtype: torch.dtype) -> None:
    q, k, v = heads(grouped, "cuda", dtype)
    there = Documents(documents.numbers.cuda())
    wanted, found = masked(there, q, k, v), there.attend(q, k, v)
    if dtype == torch.float32:
        assert found is None  # left to the mask
        return
    assert found is not None
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    gradients = [torch.autograd.grad(out.float().sum(), (q, k, v)) for out in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-2, rtol=5e-2)
