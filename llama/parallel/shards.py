"""Which part of each parameter this rank holds, and filling just that part from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Box = tuple[slice, ...]
"""Rows and columns of a whole parameter, one slice a dimension."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's plain tensor. Where it lies takes a hundred times as long to say: 0.4 ms under FSDP and TP."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Box]:
    """This rank's plain tensor and where it lies in the whole one."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return plain(tensor), tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters in the order of the whole model, each shared one once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def fill_parameters(model: nn.Module, read: Callable[[str, Box], torch.Tensor]) -> None:
    """Set every parameter from `read(name, box)`, which gives the box's values in any dtype, on the CPU or elsewhere.

    Only this rank's shard is asked for, one parameter at a time, so the peak is the shard plus what `read` holds.
    """
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter)
        if local.numel():
            local.copy_(read(name, box))
