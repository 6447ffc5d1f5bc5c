"""Low-rank adapters on frozen linears: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024).

y = x Wᵀ + s · (x Aᵀ) Bᵀ with A (r, in) and B (out, r); DoRA gives each output row the length m. The numbers are PEFT's.
A frozen linear may be held in 4 or 8 bits (llama/model/nf4.py) whether it has an adapter or not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llama.config import Lora
from llama.model.llama import Head, Llama
from llama.model.loss import LowRank, linear_cross_entropy
from llama.targets import HEAD, HF_MODULES, adapted


class Whole:
    """How a linear's matrices are held: all of them here. llama/parallel/tensor.py cuts them over ranks."""

    def own(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, as a plain tensor whose gradient finds its way back."""
        return parameter

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The input that this rank's part of the weight takes."""
        return x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The output as the rest of the network wants it."""
        return y

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks that hold different columns."""
        return x


class Adapter(nn.Module):
    """The part that linears and the output projection share: A, B, DoRA's lengths, dropout.

    `weight` is the frozen matrix (out, in), of the type that is computed with; the adapter has its own.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None
    key: torch.Tensor

    def add_adapter(self, out: int, width: int, lora: Lora, dtype: torch.dtype) -> None:
        """Make room for A, B and, with DoRA, the lengths of the rows."""
        self.scale, self.rate = lora.scale, lora.dropout
        self.lora_a = nn.Parameter(torch.empty(lora.rank, width, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(out, lora.rank, dtype=dtype))
        self.magnitude = nn.Parameter(torch.empty(out, dtype=dtype)) if lora.dora else None
        if lora.dropout:
            self.register_buffer("key", torch.zeros((), dtype=torch.int32), persistent=False)

    cut: Whole = Whole()

    def own(self, name: str) -> torch.Tensor:
        """This rank's part of the parameter `name`."""
        return self.cut.own(name, getattr(self, name))

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """This rank's part of the frozen weight."""
        return self.own("weight").to(dtype)

    def ratio(self, dtype: torch.dtype) -> torch.Tensor:
        """DoRA: each row's trained length over the length that W + sBA has, which counts as a constant (section 4.3).

        ‖w + s·bA‖² = ‖w‖² + 2s·b·(Awᵀ) + s²·b(AAᵀ)bᵀ, so that W + sBA never exists.
        """
        with torch.no_grad():
            wide = torch.promote_types(dtype, torch.float32)
            weight, a, b = self.matrix(dtype), self.own("lora_a"), self.own("lora_b").to(wide)
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
            crossed = (weight @ a.to(dtype).t()).to(wide)
            gram = a.to(wide) @ a.to(wide).t()
            squares = squares + 2 * self.scale * (crossed * b).sum(1) + self.scale**2 * ((b @ gram) * b).sum(1)
            # Padded rows of a vocabulary are zero.
            length = self.cut.total(squares).clamp_min(torch.finfo(wide).tiny).sqrt()
        return (self.own("magnitude") / length).to(dtype)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout of an adapter's input, the same again when backward recomputes it and on ranks that share it.

        The mask is a hash of `key` (seed, step and adapter; set by set_dropout_key), the token's own values and the
        column; no random state is kept.
        """
        if not self.rate or not self.training:
            return x
        with torch.no_grad():
            token = x.detach().float().view(torch.int32).sum(-1, keepdim=True, dtype=torch.int32)
            column = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
            bits = _mix(_mix(token ^ self.key) + column)
            keep = bits >= int(self.rate * 2**32) - 2**31
        return x * keep.to(x.dtype) / (1 - self.rate)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers whose output looks random (Wellons' lowbias32)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


class FrozenLinear(Adapter):
    """A frozen linear, (..., in) to (..., out), with an adapter where `rank` is above 0."""

    def __init__(self, linear: nn.Linear, lora: Lora, rank: int, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if rank:
            self.add_adapter(self.out_features, self.in_features, lora, dtype)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ."""
        return F.linear(x, self.own("weight"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cut.enter(x)
        y = self.base(x)
        return self.cut.leave(self.adapt(x, y) if self.rank else y)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y` = x Wᵀ with what the adapter adds."""
        dropped = self.drop(x)
        low = F.linear(dropped, self.own("lora_a").to(x.dtype)) * self.scale
        last = self.own("lora_b").to(x.dtype)
        if self.magnitude is None:  # summed as it is multiplied: what is added never stands alone
            return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), last.t()).unflatten(0, y.shape[:-1])
        added = F.linear(low, last)
        ratio = self.ratio(x.dtype)
        if dropped is x:
            return ratio * (y + added)
        # As in PEFT, only what the adapter changes sees the dropped input.
        return y + (ratio - 1) * self.base(dropped) + ratio * added


class AdaptedHead(Head, Adapter):
    """The output projection with an adapter; the loss takes both, and forms no gradient of the frozen matrix."""

    def __init__(self, head: Head, lora: Lora, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
        self.vocabulary, self.vocab_size, self.loss_chunk = head.vocabulary, head.vocab_size, head.loss_chunk
        self.skip_untrained = head.skip_untrained
        self.add_adapter(head.weight.shape[0], head.weight.shape[1], lora, dtype)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden, weight = self.vocabulary.enter(hidden, self.weight)
        dtype = hidden.dtype
        narrow = F.linear(self.drop(hidden), self.own("lora_a").to(dtype)) * self.scale
        last, ratio = self.own("lora_b").to(dtype), None if self.magnitude is None else self.ratio(dtype)
        if labels is None:
            logits = F.linear(hidden, weight) + F.linear(narrow, last)
            return self.vocabulary.gather(logits if ratio is None else ratio * logits)[..., : self.vocab_size]
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), self.vocab_size, self.loss_chunk, self.vocabulary,
            LowRank(narrow.flatten(0, 1), last, ratio), self.skip_untrained,
        )  # fmt: skip


def adapt(model: Llama, lora: Lora, dtype: torch.dtype) -> None:
    """Freeze `model` (a stage or the whole) and put adapters of type `dtype` on its targets, in place, unfilled."""
    model.requires_grad_(False)
    model.tie()
    targets = set(adapted(lora.targets, model.config.num_layers))
    kind: type[FrozenLinear] = FrozenLinear
    if lora.quantize:
        from llama.model.nf4 import QuantizedLinear  # here: it builds on this file

        kind = QuantizedLinear
    for layer, block in model.layers.items():
        for inner in HF_MODULES:
            parent, leaf = block.get_submodule(inner.split(".")[0]), inner.split(".")[1]
            rank = lora.rank if f"layers.{layer}.{inner}" in targets else 0
            if rank or lora.quantize:
                setattr(parent, leaf, kind(getattr(parent, leaf), lora, rank, dtype))
    if HEAD in targets and model.head is not None:
        model.head = AdaptedHead(model.head, lora, dtype)


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The modules of `model` that have an adapter."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Adapter) and hasattr(m, "lora_a"))


def set_dropout_key(model: nn.Module, seed: int, cursor: int) -> None:
    """Begin a step at the sample `cursor`: its dropout is another one than any other step's."""
    for name, module in adapters(model):
        if module.rate:
            digest = hashlib.blake2b(f"{seed}/{cursor}/{name}".encode(), digest_size=4).digest()
            module.key.fill_(int.from_bytes(digest, "little", signed=True))


def initial_a(name: str, seed: int, rank: int, width: int) -> torch.Tensor:
    """A's initial values, (rank, width) fp32: Kaiming-uniform with a = √5, which is U(-1/√width, 1/√width).

    A pure function of (seed, name), so that every layout starts alike. B starts at zero.
    """
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(
        (rank, width), dtype=np.float32
    )
    return torch.from_numpy(draw).mul_(2).sub_(1).div_(math.sqrt(width))
