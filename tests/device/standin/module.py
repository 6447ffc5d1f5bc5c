"""What `torch.neuron` is: the functions that torch asks a device's module for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

library: Any = None
initialized = False


def Stream(device: Any = None, priority: int = 0) -> torch.Stream:  # noqa: N802
    return torch.Stream(device="neuron", priority=priority)


def Event(*args: Any, **kwargs: Any) -> torch.Event:  # noqa: N802
    return torch.Event(device="neuron")


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream()


def stream(stream: torch.Stream) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return initialized


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return int(library.count())


def current_device() -> int:
    return int(library.current())


def set_device(device: Any) -> None:
    global initialized
    if not torch.distributed.is_initialized():
        raise RuntimeError("neuron stand-in: Trainium's runtime must not be touched before ranks have met")
    initialized = True
    library.set_current(device if isinstance(device, int) else torch.device(device).index or 0)


def synchronize(device: Any = None) -> None:
    pass


def memory_allocated(device: Any = None) -> int:
    return int(library.held())


def max_memory_allocated(device: Any = None) -> int:
    return int(library.peak())


def reset_peak_memory_stats(device: Any = None) -> None:
    library.reset_peak()


def empty_cache() -> None:
    pass


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# Random numbers are the CPU's.


def manual_seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


manual_seed = manual_seed_all


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(state)
