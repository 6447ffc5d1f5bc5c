"""Attention from document to document gives what the dense mask gives, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama.model.attention import Documents, document_mask

PACKS = {
    "uneven": [[0] * 5 + [1] * 1 + [2] * 10, [0] * 16],
    "alone": [list(range(16)), [0] * 8 + [1] * 8],
    "same_number_in_both_rows": [[3] * 16, [3] * 16],
}


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("name", PACKS)
def test_it_equals_the_mask(name: str, heads: tuple[int, int]) -> None:
    documents = torch.tensor(PACKS[name], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 16, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    )
    wanted = F.scaled_dot_product_attention(q, k, v, document_mask(documents), enable_gqa=heads[0] != heads[1])
    found = Documents(documents).attend(q, k, v)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
