"""Frozen weights in 4 bits (NF4, QLoRA: Dettmers et al. 2023) or 8 (LLM.int8's storage, Dettmers et al. 2022), plain torch.

The bytes are bitsandbytes': blocks of 64 weights along a row share an fp32 scale, two levels a byte, the first in the
high half; double quantisation holds the scales in 8 bits, blocks of 256 of them in the order of the whole matrix. Rows
and whole blocks can be cut over ranks, so every layout holds parts of the same bytes. int8 has one scale a row.

Of the 8-bit scales the nearest value is taken, as bitsandbytes does on CUDA; its CPU kernel reads a table that is off by
one in a few of a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from llama.config import Lora
from llama.model.lora import FrozenLinear

BLOCK = 64
"""Weights that share a scale."""
NESTED = 256
"""Scales that share a scale of theirs."""
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, zero among them (QLoRA, appendix E)."""


@cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS, device=device)


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """(256,): the two fp32 weights of a byte, before scaling, as 64 bits: one look-up gives both. (256, 2) as they are
    elsewhere: Trainium makes 64 bits 32."""
    levels = _levels(device)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
    return pairs.view(torch.int64).flatten() if device.type in ("cpu", "cuda") else pairs


@cache
def _dynamic(device: torch.device) -> torch.Tensor:
    """(256,) ascending: a signed 8-bit type whose first bits set the power of ten (Dettmers 2015).

    Each of seven decades, the largest ending at 1, has 1, 2, 4 … 64 values: the middles of equal parts of 0.1 to 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        middles = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) of any float type to bytes (out, in / 2) and scales (out, in / 64), fp32."""
    out, width = weight.shape
    blocks = weight.float().reshape(out, width // BLOCK, BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp_min(1e-38))[..., None]).clamp_(-1, 1)
    levels = _levels(weight.device)
    nearest = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8).view(out, width)
    return (nearest[:, ::2] << 4) | nearest[:, 1::2], absmax


def dequantize_nf4(packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights (out, in) that bytes and fp32 scales stand for."""
    out, half = packed.shape
    weight = _pairs(packed.device).index_select(0, packed.flatten().int()).view(torch.float32)
    return _scaled(weight.view(out, 2 * half // BLOCK, BLOCK), absmax[..., None], dtype).view(out, 2 * half)


def _scaled(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` · `scale` in fp32, rounded to `dtype` on the way out: no fp32 matrix is written."""
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def compress_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A whole matrix' scales to a byte each, their scales (n / 256,) and their mean (), which is taken off first."""
    offset = absmax.mean()
    flat = (absmax - offset).flatten()
    rest = -len(flat) % NESTED
    blocks = nn.functional.pad(flat, (0, rest)).view(-1, NESTED)
    nested = blocks.abs().amax(-1)
    scaled = blocks * (1.0 / nested.clamp_min(1e-38))[:, None]
    values = _dynamic(absmax.device)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.flatten()[: len(flat)].view(absmax.shape), nested, offset


def expand_scales(
    codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor, origin: tuple[int, int], blocks: int
) -> torch.Tensor:
    """fp32 scales of a part of a matrix whose rows have `blocks` of them; the part begins at `origin` (row, block)."""
    rows = torch.arange(codes.shape[0], device=codes.device)[:, None] + origin[0]
    columns = torch.arange(codes.shape[1], device=codes.device) + origin[1]
    group = (rows * blocks + columns) // NESTED
    return _dynamic(codes.device)[codes.int()] * nested[group] + offset


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole rows (out, in) of any float type to int8 and scales (out,), fp32: the row's greatest, which is ±127."""
    absmax = weight.abs().amax(1).float()
    return torch.round(weight * (127.0 / absmax.clamp_min(1e-38))[:, None]).to(torch.int8), absmax


def dequantize_int8(packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights (out, in) that int8 and scales (out,) stand for."""
    return _scaled(packed, (absmax * (1 / 127))[:, None], dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ where W is made anew in forward and in backward, and only its packed form is kept between them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, unpack: Callable[..., torch.Tensor], *parts: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(*parts)
        ctx.unpack = unpack
        return nn.functional.linear(x, unpack(x.dtype, *parts))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = ctx.saved_tensors  # asked for once: a block that is computed again gives them once
        return (gradient @ ctx.unpack(gradient.dtype, *parts), None, *(None for _ in parts))


class QuantizedLinear(FrozenLinear):
    """A FrozenLinear held as bytes and scales: `packed` and `absmax`, and with double quantisation `nested`, `offset`."""

    nested: torch.Tensor
    offset: torch.Tensor

    def __init__(self, linear: nn.Linear, lora: Lora, rank: int, dtype: torch.dtype):
        super().__init__(linear, lora, rank, dtype)
        del self.weight
        out, width = self.out_features, self.in_features
        self.kind, self.doubled = lora.quantize, lora.quantize == "nf4" and lora.double_quantization
        self.origin, self.blocks = (0, 0), width // BLOCK
        """Where this rank's part begins (row, block), and how many blocks a whole row has."""
        device = linear.weight.device
        if lora.quantize == "nf4":
            packed = torch.empty(out, width // 2, dtype=torch.uint8, device=device)
            absmax = torch.empty(out, self.blocks, dtype=torch.uint8 if self.doubled else torch.float32, device=device)
        else:
            packed = torch.empty(out, width, dtype=torch.int8, device=device)
            absmax = torch.empty(out, dtype=torch.float32, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        if self.doubled:
            groups = -(-out * self.blocks // NESTED)
            self.register_buffer("nested", torch.empty(groups, device=device), persistent=False)
            self.register_buffer("offset", torch.empty((), device=device), persistent=False)

    def _unpack(
        self,
        dtype: torch.dtype,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.kind == "int8":
            return dequantize_int8(packed, absmax, dtype)
        if nested is not None and offset is not None:
            absmax = expand_scales(absmax, nested, offset, self.origin, self.blocks)
        return dequantize_nf4(packed, absmax, dtype)

    def _parts(self) -> tuple[torch.Tensor, ...]:
        held = self.own("packed"), self.own("absmax")
        return (*held, self.nested, self.offset) if self.doubled else held

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return self._unpack(dtype, *self._parts())

    def base(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(x, self._unpack, *self._parts())
        return product
