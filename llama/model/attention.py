"""Grouped-query attention (Ainslie et al. 2023) on PyTorch's scaled_dot_product_attention, with document masking."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama.config import Model
from llama.model import varlen
from llama.model.rope import rotate


class Documents:
    """Documents (B, S), numbered from row to row, for attention in each of them alone.

    No S × S mask: memory and time are the sum over documents. One after another on CPUs; in one kernel on CUDA, where
    it computes in 16 bits. Their number is read from the batch, which the device waits for once a forward, and which a
    compiled graph cannot depend on: that one makes a mask of `numbers`, and so does CUDA in fp32.
    """

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    @cached_property
    def ends(self) -> torch.Tensor:
        """(documents + 1) int32: 0, then where each document ends, rows end to end."""
        begins = torch.ones_like(self.numbers, dtype=torch.bool)
        begins[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        return torch.cat((starts, starts.new_tensor([self.numbers.numel()]))).to(torch.int32)

    @cached_property
    def sizes(self) -> list[int]:
        return torch.diff(self.ends).tolist()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        """Causal attention inside each document; q (B, H, S, head_dim), k and v (B, K, S, head_dim).

        None where a mask has to do it.
        """
        if q.device.type == "cpu":
            return self._one_by_one(q, k, v)
        attend = varlen.kernel() if q.dtype in varlen.TAKES else None
        return None if attend is None else self._together(q, k, v, attend)

    def _together(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: varlen.Attend) -> torch.Tensor:
        rows, length = len(q), q.shape[2]
        # A row's length stands for the longest document: to ask for that would make the device wait again.
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = attend(q, k, v, self.ends, length)
        return out.unflatten(0, (rows, length)).transpose(1, 2)

    def _one_by_one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, grouped = len(q), q.shape[1] != k.shape[1]
        # Rows end to end, then split: split's backward is one concatenation, a slice's would be a whole tensor each.
        split = [
            x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2).split(self.sizes, dim=2) for x in (q, k, v)
        ]
        out = [
            F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped)
            for a, b, c in zip(*split, strict=True)
        ]
        return torch.cat(out, dim=2).transpose(1, 2).unflatten(1, (rows, -1)).squeeze(0).transpose(1, 2)


class Context(NamedTuple):
    """What every block of one forward shares."""

    cos: torch.Tensor
    """(B, S, 1, head_dim/2)"""
    sin: torch.Tensor
    mask: torch.Tensor | None
    """(B, 1, S, S) True where a query may look; None: plain causal attention, or inside documents."""
    documents: Documents | None = None
    """Where each document lies, for attention in one document after another."""


class KeyValueCache:
    """Keys and values of the tokens seen so far, for generation; each (B, K, seen, head_dim)."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


def document_context(cos: torch.Tensor, sin: torch.Tensor, documents: torch.Tensor | None) -> Context:
    """What keeps documents (B, S) apart on the device that they are on; None: plain causal attention.

    A document's tokens are next to one another. On CPUs and CUDA attention stays inside documents without a mask
    where it can (`Documents`); elsewhere it takes a mask.
    """
    if documents is None:
        return Context(cos, sin, None)
    if documents.device.type in ("cpu", "cuda"):
        return Context(cos, sin, None, Documents(documents))
    return Context(cos, sin, document_mask(documents))


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each document: (B, S) document numbers to (B, 1, S, S), True where a query may look."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal


class Attention(nn.Module):
    """Causal self-attention, (B, S, D) to (B, S, D)."""

    def __init__(self, config: Model):
        super().__init__()
        width, kv_width = config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.head_size = config.head_size
        self.q = nn.Linear(config.hidden_size, width, bias=False)
        self.k = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, context: Context, cache: KeyValueCache | None = None) -> torch.Tensor:
        # The number of heads is read off the projections: tensor parallelism gives this rank fewer of them.
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)) for p in (self.q, self.k, self.v))
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, S, head_dim)
        if cache is not None:
            k, v = cache.extend(k, v)
        mask = context.mask
        if context.documents is not None:
            apart = None if torch.compiler.is_compiling() else context.documents.attend(q, k, v)
            if apart is not None:
                return self.o(apart.transpose(1, 2).flatten(2))
            mask = document_mask(context.documents.numbers)
        causal = mask is None and q.shape[2] == k.shape[2]  # one token after a cache sees everything
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o(out.transpose(1, 2).flatten(2))
