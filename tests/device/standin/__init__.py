"""A device that stands in for Trainium's: `neuron` on this machine's memory, with collectives over gloo.

It shows that no code takes the device for a GPU or a CPU. It shows nothing of Neuron's compiler, kernels or speed.
neuron.cpp says what it refuses, strictly: float64 and complex tensors, send and recv, uneven all_to_all, fused AdamW,
shapes that depend on values. It notes all else, for tests to look at.
"""

from __future__ import annotations

import os
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch

from tests.device.standin import build, module

COMMUNICATION = "cpu:gloo,neuron:neuron"


def require() -> None:
    """Skip the test where the stand-in cannot be built; under CI=true that is a failure."""
    import pytest  # not in the processes that train

    if why := build.obstacle():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)


def load() -> ModuleType:
    """Make this process have a neuron device, for good; what it notes is asked of the module returned.

    A real one is there as soon as torch is imported.
    """
    import torch.distributed as dist

    if hasattr(torch, "neuron"):
        return build.load()
    library = build.load()
    torch.utils.rename_privateuse1_backend("neuron")
    module.library = library
    torch._register_device_module("neuron", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend("neuron", _backend, devices=["neuron"])
    return library


def _backend(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupGloo

    return build.load().backend(ProcessGroupGloo(store, rank, size, timeout))


def enter() -> str:
    """For harness.run: a process that trains on the stand-in; the backends that it meets the others with."""
    load()
    os.environ["HERD_DEVICE"] = "neuron"
    return COMMUNICATION


def operators() -> list[str]:
    """What ran on the device since `forget`, a line each: operator, types of its tensors."""
    return [f"{name} {' '.join(sorted(types))}" for name, types in sorted(build.load().ran().items())]


def forget() -> None:
    """Start noting anew."""
    build.load().forget()


def reads() -> int:
    """How often the host waited for a value of the device since `forget`."""
    return int(build.load().reads())
