"""The device at hand, cpu, cuda or neuron: its backends and its peak. What each can do says llama/capabilities.py."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import torch

from llama.capabilities import TABLE, Abilities, Kind
from llama.capabilities import kind as kind_of

# Dense bf16 peaks in TFLOP/s, from the makers' data sheets: (part of the device's name, peak), first match wins.
_CUDA_PEAKS = (
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
)
_ZERO_BUBBLE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_NEURON_PEAKS = {"trn2": 667.0 / 4, "trn3": 671.0 / 4}  # per rank: a chip is four logical cores at LNC 2


@dataclass(frozen=True)
class Device:
    """What the rest of the code may know of where it runs."""

    type: str
    """cpu, cuda or neuron."""
    name: str
    """For people: the chip's name."""
    communication: str
    """Backends of init_process_group. The CPU's gloo stands beside the accelerator's for background checkpoints."""
    compile_backend: str
    fused_adamw: bool
    """Whether torch's one-kernel AdamW runs here; else the foreach one."""
    pipeline: bool
    """Whether ranks can send to each other, as pipelines need."""
    zero_bubble: bool
    """Whether zero-bubble pipelines run: torch before 2.13 cannot split the backward of a custom autograd function."""
    peak_flops: float | None
    """Published dense bf16 FLOP/s of one rank; None where nobody publishes it, as for CPUs."""
    float64: bool = True
    """Whether the device computes in 64 bits; Trainium makes them 32 without saying so."""

    @property
    def able(self) -> Abilities:
        """This kind of device's column in the table of what each can do."""
        return TABLE[kind_of(self.type)]

    @property
    def wide(self) -> torch.dtype:
        """The type for sums over all ranks."""
        return torch.float64 if self.float64 else torch.float32

    def torch(self) -> torch.device:
        """This process's device."""
        return torch.device("cpu") if self.type == "cpu" else torch.device(self.type, local_rank())

    def peak_memory(self) -> int:
        """Most bytes used so far: of the device's memory, or on a CPU of this process."""
        if self.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(torch.get_device_module(self.type).max_memory_allocated())

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.type != "cpu":
            torch.get_device_module(self.type).synchronize()


def measure_flops(device: Device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s that this rank reaches on matrix products of `dtype` at best, for devices without a published peak."""
    side = 512 if device.type == "cpu" else 8192
    a, out = (torch.ones(side, side, dtype=dtype, device=device.torch()) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    # The first product chooses a kernel, and others wait for what else the machine does: the fastest one counts.
    while (now := time.perf_counter()) - started < seconds or best == float("inf"):
        torch.mm(a, a, out=out)
        device.synchronize()
        best = min(best, time.perf_counter() - now)
    return 2 * side**3 / best


def local_rank() -> int:
    """This process's place on its node, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _device(kind: Kind, name: str, communication: str, peak: float | None) -> Device:
    able = TABLE[kind]
    return Device(
        kind, name, communication, able.compile_backend, able.fused_adamw, able.pipeline, able.zero_bubble and _ZERO_BUBBLE,
        peak, able.float64,
    )  # fmt: skip


def find_device(wanted: str | None = None) -> Device:
    """The accelerator that is there, or the one asked for: cpu, cuda or neuron.

    HERD_DEVICE names one as well. Raises ValueError when the wanted one is not there.
    """
    wanted = wanted or os.environ.get("HERD_DEVICE")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = wanted or (found.type if found is not None and found.type in ("cuda", "neuron") else "cpu")
    if kind == "cpu":
        return _device("cpu", "CPU", "gloo", None)
    if found is None or found.type != kind:
        raise ValueError(
            f"no {kind} device here (found {found.type if found else 'only the CPU'}); HERD_DEVICE=cpu runs on the CPU"
        )
    if kind == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((tera * 1e12 for part, tera in _CUDA_PEAKS if part in name), None)
        return _device("cuda", name, "cpu:gloo,cuda:nccl", peak)
    if kind == "neuron":
        generation = os.environ.get("HERD_NODE_TYPE", "trn2")[:4]
        peak = _NEURON_PEAKS.get(generation)
        return _device("neuron", generation, "cpu:gloo,neuron:neuron", peak * 1e12 if peak else None)
    raise ValueError(f"device {kind!r} is not one of cpu, cuda, neuron")
