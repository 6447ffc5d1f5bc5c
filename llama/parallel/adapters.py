"""Values of adapters: from a file or as they start, and what a run with adapters trains and holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llama.config import Recipe
from llama.freeze import counts
from llama.model.llama import count_parameters
from llama.model.lora import initial_a
from llama.model.nf4 import (
    BLOCK,
    NESTED,
    QuantizedLinear,
    compress_scales,
    dequantize_int8,
    dequantize_nf4,
    expand_scales,
    quantize_int8,
    quantize_nf4,
)
from llama.parallel.shards import Box
from llama.targets import HEAD, adapted, all_linears, linear_shape

Read = Callable[[str, Box], torch.Tensor]
ADAPTER = ("lora_a", "lora_b", "magnitude")
PACKED = ("packed", "absmax", "nested", "offset")
READ = 1 << 24
"""Weights read at a time where only their scales are wanted."""


def with_adapters(recipe: Recipe, base: Read, held: torch.dtype, adapter: Read | None = None) -> Read:
    """`read(name, box)` of base and adapters: these from `adapter`, or A drawn from train.seed, B zero, DoRA's lengths
    those of the base's rows as they are `held`. A quantised base is packed as it is read."""
    packer = Packer(recipe, base)

    def read(name: str, box: Box) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        if leaf in PACKED:
            return packer.read(module, leaf, box)
        if leaf not in ADAPTER:
            return base(name, box)
        if adapter is not None:
            return adapter(name, box)
        width = linear_shape(module, recipe.model)[1]
        if leaf == "lora_a":
            return initial_a(name, recipe.train.seed, recipe.lora.rank, width)[box]
        if leaf == "lora_b":
            return torch.zeros([part.stop - part.start for part in box])
        rows = packer.rows(module, box[0], held)
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(held, torch.float32))

    return read


class Packer:
    """Packs boxes of weights as they are read.

    Double quantisation needs the mean of a matrix' scales, so every rank reads the whole matrix for it, some rows at a
    time; the scales of the matrix that was asked for last are kept.
    """

    def __init__(self, recipe: Recipe, base: Read):
        self.model, self.lora, self.base = recipe.model, recipe.lora, base
        self.module, self.scales = "", (torch.empty(0),) * 3

    def _weight(self, module: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        return self.base(f"{module}.weight", (rows, columns or slice(0, linear_shape(module, self.model)[1])))

    def _double(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole matrix' scales in 8 bits, theirs, and their mean."""
        if module != self.module:
            out, width = linear_shape(module, self.model)
            step = max(1, READ // width)
            parts = (self._weight(module, slice(i, min(i + step, out))) for i in range(0, out, step))
            absmax = torch.cat([p.float().view(len(p), -1, BLOCK).abs().amax(-1) for p in parts])
            self.module, self.scales = module, compress_scales(absmax)
        return self.scales

    def read(self, module: str, leaf: str, box: Box) -> torch.Tensor:
        """The box of `leaf`, one of PACKED."""
        if self.lora.quantize == "int8":
            packed, absmax = quantize_int8(self._weight(module, box[0]))
            return packed[:, box[1]] if leaf == "packed" else absmax
        if leaf in ("nested", "offset"):
            return self._double(module)[1 if leaf == "nested" else 2]
        if leaf == "absmax" and self.lora.double_quantization:
            return self._double(module)[0][box]
        per = 2 if leaf == "packed" else BLOCK
        columns = slice(box[1].start * per, box[1].stop * per)
        return quantize_nf4(self._weight(module, box[0], columns))[0 if leaf == "packed" else 1]

    def rows(self, module: str, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Whole rows of the weight as they are computed with."""
        weight = self._weight(module, rows)
        if self.lora.quantize is None or module == HEAD:
            return weight.to(dtype)
        if self.lora.quantize == "int8":
            return dequantize_int8(*quantize_int8(weight), dtype)
        packed, absmax = quantize_nf4(weight)
        if self.lora.double_quantization:
            codes, nested, offset = self._double(module)
            absmax = expand_scales(codes[rows], nested, offset, (rows.start, 0), codes.shape[1])
        return dequantize_nf4(packed, absmax, dtype)


@torch.no_grad()
def fill_nested_scales(model: nn.Module, read: Read) -> None:
    """Fill what double quantisation holds besides parameters: every rank has it whole, 0.002 bits a weight."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.doubled:
            for leaf in ("nested", "offset"):
                buffer = getattr(module, leaf)
                buffer.copy_(read(f"{name}.{leaf}", tuple(slice(0, size) for size in buffer.shape)))


def adapter_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The adapters' parameters by our names, in the model's order, a vocabulary without its padding."""
    lora = recipe.lora
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapted(lora.targets, recipe.model.num_layers) if lora.rank else ():
        out, width = linear_shape(name, recipe.model)
        shapes[f"{name}.lora_a"] = (lora.rank, width)
        shapes[f"{name}.lora_b"] = (out, lora.rank)
        if lora.dora:
            shapes[f"{name}.magnitude"] = (out,)
    return shapes


def adapters_in_words(recipe: Recipe) -> list[str]:
    """How much is trained, as PEFT's print_trainable_parameters says it; nothing where all is."""
    if recipe.train.freeze:
        trained, total = counts(recipe.train.freeze, recipe.model)
        return [f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"]
    if not recipe.lora.rank:
        return []
    trained = sum(torch.Size(shape).numel() for shape in adapter_shapes(recipe).values())
    total = count_parameters(recipe.model)[0] + trained
    lines = [f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"]
    if recipe.lora.quantize:
        weights, size = packed_size(recipe)
        rest, wide = count_parameters(recipe.model)[0] - weights, 4 if recipe.train.precision == "fp32" else 2
        lines.append(
            f"base weights: {weights:,} in {recipe.lora.quantize}, {8 * size / weights:.3f} bits a parameter, "
            f"{size / 1e6:,.1f} MB; embedding, output and norms: {rest:,} in {8 * wide} bits, {rest * wide / 1e6:,.1f} MB"
        )
    return lines


def packed_size(recipe: Recipe) -> tuple[int, int]:
    """Weights of the blocks' linears, and the bytes of their packed form with its scales, over the whole model."""
    lora, weights, size = recipe.lora, 0, 0
    for name in all_linears(recipe.model.num_layers)[:-1]:
        out, width = linear_shape(name, recipe.model)
        weights += out * width
        if lora.quantize == "int8":
            size += out * width + 4 * out
        else:
            scales = out * width // BLOCK
            size += out * width // 2 + (
                scales + 4 * -(-scales // NESTED) + 4 if lora.double_quantization else 4 * scales
            )
    return weights, size
