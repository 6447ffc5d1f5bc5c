"""Activation checkpointing: what backward recomputes instead of keeping (Chen et al. 2016; torch's selective policy)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama.model import varlen
from llama.model.llama import Llama

# Kept under "selective": results that cost much to compute for the memory they take. The rest (norms, rotations,
# activations, reshapes) is cheap and comes again in backward.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,  # of devices that torch does not bring along
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


if varlen.kernel() is not None:
    _KEPT.add(torch.ops.torch_attn._varlen_attn.default)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(model: Llama, mode: str) -> None:
    """Make each block of `model` recompute in backward: "full" all of it, "selective" what is cheap. In place.

    The block's forward is wrapped, not the module, so that parameter names stay.
    """

    def wrap(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if mode == "selective":
            options["context_fn"] = lambda: create_selective_checkpoint_contexts(_policy)

        def recomputed(*args: Any) -> torch.Tensor:
            return checkpoint(forward, *args, **options)

        return recomputed

    for block in model.layers.values():
        block.forward = wrap(block.forward)  # type: ignore[method-assign]
