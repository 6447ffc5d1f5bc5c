"""FSDP2 and HSDP (Zhao et al. 2023; torch.distributed.fsdp.fully_shard): weights, gradients, optimizer over data ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llama.config import Precision
from llama.model.llama import Llama

POLICIES = {
    # fp32 weights, bf16 arithmetic, gradients summed over ranks in fp32.
    "bf16_mixed": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    ),
    # Weights are bf16 already; only the sum over ranks is widened.
    "bf16_sr": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    "fp32": MixedPrecisionPolicy(cast_forward_inputs=False),
}


@contextmanager
def _integers_untrained() -> Iterator[None]:
    """Let quantized weights be sharded. Needed for torch 2.11 alone, which makes each sharded weight a trained one before
    it looks whether the weight was; integers cannot be. Later versions look first."""

    def requires_grad_(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor:
        return torch.Tensor.requires_grad_(tensor, wanted and tensor.is_floating_point())

    DTensor.requires_grad_ = requires_grad_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del DTensor.requires_grad_


@_integers_untrained()
def shard(model: Llama, mesh: DeviceMesh, precision: Precision, reshard_after_forward: bool) -> None:
    """Spread each block, then the rest, over the last axis of `mesh` and copy over the first when there are two. In place.

    Gradients come out as sums over the data ranks: the loss is divided by the global token count afterwards.
    """
    apply: Any = partial(fully_shard, mesh=mesh, mp_policy=POLICIES[precision])
    for block in model.layers.values():
        apply(block, reshard_after_forward=reshard_after_forward)
    tied = model.config.tie_embeddings and model.embed is not None and model.head is not None
    if not tied:  # a shared weight must sit in one group, so tied ends stay with the root
        if model.embed is not None:
            apply(model.embed, reshard_after_forward=reshard_after_forward)
        if model.head is not None and model.norm is not None:
            # Used last in forward and first in backward: freeing them between would only gather them again.
            apply([model.norm, model.head], reshard_after_forward=False)
    apply(model, reshard_after_forward=False)
    for module in modules(model):
        # Sum, not mean; gloo has no sum that scales before it adds, which torch would otherwise ask for.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def modules(model: nn.Module) -> list[FSDPModule]:
    """The parts that FSDP handles as units; none when the model is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def last_micro_batch(model: nn.Module, last: bool) -> None:
    """Tell FSDP whether the next backward ends the step: copies sum their gradients only then.

    Over shards every micro-batch is reduced, which keeps gradients at a shard's size.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Free every gathered weight: after a forward without a backward.

    The root's group stays gathered then, and its next backward would silently leave it without a gradient.
    """
    for module in modules(model):
        module.reshard()
