"""Packed weights are bitsandbytes' byte for byte, whole and in parts; products and gradients are those of what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama.config import Recipe
from llama.model.llama import Llama
from llama.model.lora import adapt
from llama.model.nf4 import (
    QuantizedLinear,
    compress_scales,
    dequantize_int8,
    dequantize_nf4,
    expand_scales,
    quantize_int8,
    quantize_nf4,
)
from llama.parallel.adapters import adapters_in_words, fill_nested_scales, packed_size, with_adapters
from llama.parallel.shards import fill_parameters
from tests.oracles import oracle


def _weight(out: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * torch.rand(out, 1, generator=generator)
    weight[3] = 0  # a row of zeros has no scale
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (75, 192), (864, 320)], ids=str)
def test_nf4_bytes_and_values_are_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    functional = oracle("bitsandbytes.functional")
    weight = _weight(*shape, dtype)
    packed, absmax = quantize_nf4(weight)
    expected, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.flatten(), expected.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    wide = functional.dequantize_4bit(expected, state)
    torch.testing.assert_close(dequantize_nf4(packed, absmax, dtype), wide, rtol=0, atol=0)


def state_scales(functional: Any, weight: torch.Tensor) -> torch.Tensor:
    scales: torch.Tensor = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")[1].absmax
    return scales


@pytest.mark.parametrize("shape", [(96, 128), (75, 192), (864, 320)], ids=str)
def test_double_quantisation_is_bitsandbytes_whole_and_in_parts(shape: tuple[int, int]) -> None:
    functional = oracle("bitsandbytes.functional")
    weight = _weight(*shape, torch.float32)
    packed, absmax = quantize_nf4(weight)
    expected, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, nested, offset = compress_scales(absmax)
    assert torch.equal(nested, state.state2.absmax) and torch.equal(offset, state.offset)
    # Of other types than fp32, bf16 and fp16 bitsandbytes' CPU looks for the nearest value as its CUDA does; of these it
    # reads a table that is off by one now and then, near the middle of two values.
    wide = (state_scales(functional, weight) - offset).double()
    nearest, _ = torch.ops.bitsandbytes.quantize_blockwise(wide, state.state2.code, 256)
    assert torch.equal(codes.flatten(), nearest)
    off = (codes.flatten().int() - state.absmax.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.005
    theirs = expand_scales(state.absmax.view(codes.shape), nested, offset, (0, 0), codes.shape[1])
    values = dequantize_nf4(packed, theirs, torch.float32)
    torch.testing.assert_close(values, functional.dequantize_4bit(expected, state), rtol=0, atol=0)
    scales = expand_scales(codes, nested, offset, (0, 0), codes.shape[1])
    part = expand_scales(codes[17:40, 1:], nested, offset, (17, 1), codes.shape[1])
    assert torch.equal(part, scales[17:40, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_int8_bytes_and_values_are_bitsandbytes(dtype: torch.dtype) -> None:
    functional = oracle("bitsandbytes.functional")
    weight = _weight(96, 100, dtype)
    packed, absmax = quantize_int8(weight)
    expected, scales, _ = functional.int8_vectorwise_quant(weight)
    whole = torch.arange(96) != 3  # theirs divides by zero there
    assert torch.equal(packed[whole], expected[whole]) and torch.equal(absmax, scales)
    values = functional.int8_vectorwise_dequant(expected, scales)
    torch.testing.assert_close(dequantize_int8(packed, absmax, torch.float32)[whole], values[whole].float())
    assert not dequantize_int8(packed, absmax, torch.float32)[3].any()


def recipe(**lora: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": dict(
                vocab_size=96, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2,
            ),
            "data": {"seq_length": 16},
            "train": {"steps": 3, "global_batch_size": 2, "precision": "fp32"},
            "lora": {"rank": 4} | lora,
        }
    )  # fmt: skip


@pytest.mark.parametrize("lora", [
    {"quantize": "nf4"}, {"quantize": "nf4", "double_quantization": False, "dora": True}, {"quantize": "int8"},
    {"quantize": "nf4", "dora": True, "targets": "all-linear"},
], ids=["nf4", "nf4_single_dora", "int8", "nf4_dora"])  # fmt: skip
def test_a_packed_model_computes_as_one_of_the_unpacked_values(lora: dict[str, Any]) -> None:
    config = recipe(**lora)
    torch.manual_seed(0)
    values = {name: torch.randn_like(p) * 0.1 for name, p in Llama(config.model).named_parameters()}
    read = with_adapters(config, lambda name, box: values[name][box], torch.float32)
    with torch.device("meta"):
        model = Llama(config.model)
        adapt(model, config.lora, torch.float32)
    model.to_empty(device="cpu")
    fill_parameters(model, read)
    fill_nested_scales(model, read)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 14

    plain_config = config.model_copy(update={"lora": config.lora.model_copy(update={"quantize": None})})
    means = {f"{name}.weight": module.matrix(torch.float32) for name, module in packed.items()}
    plain = Llama(config.model)
    adapt(plain, plain_config.lora, torch.float32)
    fill_parameters(plain, with_adapters(plain_config, lambda name, box: (values | means)[name][box], torch.float32))
    for (name, length), (_, other) in zip(*(
        [item for item in m.named_parameters() if item[0].endswith("magnitude")] for m in (model, plain)
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(length, other, msg=name)
    tokens = torch.arange(32).view(2, 16)
    losses = [m(tokens, labels=tokens) for m in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain)]
    torch.testing.assert_close(gradients[0], gradients[1])

    weights, size = packed_size(config)
    held = [t for m in packed.values() for t in (*m.buffers(recurse=False), m.packed.data, m.absmax.data)]
    assert sum(t.nbytes for t in held) == size
    assert weights == sum(m.in_features * m.out_features for m in packed.values())
    bits = {"nf4": 4.5, "int8": 8.0}[str(config.lora.quantize)]
    assert f" {8 * size / weights:.3f} bits" in adapters_in_words(config)[1] and 8 * size / weights < bits * 1.06


def test_a_large_matrix_takes_4_127_bits() -> None:
    from llama import recipe as recipes

    weights, size = packed_size(recipes.load("openllama_3b_v2", ["lora.rank=8", "lora.quantize=nf4"]))
    assert f"{8 * size / weights:.3f}" == "4.127"
