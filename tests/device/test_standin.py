"""The stand-in counts and notes what happens on it, and refuses what Trainium is said to lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama.device import find_device
from tests.device import standin
from tests.dist import harness


@pytest.fixture(autouse=True)
def _built() -> None:
    standin.require()


def _message(call: Any) -> str:
    """What the stand-in says against `call`; empty when it says nothing."""
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _alone(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    before = torch.get_device_module("neuron").memory_allocated()
    x = torch.ones(256, 4, device="neuron")
    found["held"] = torch.get_device_module("neuron").memory_allocated() - before
    standin.forget()
    found["sum"] = (x.t() @ x).sum().item()
    found["ran"], found["reads"] = standin.operators(), standin.reads()
    del x
    found["left"] = torch.get_device_module("neuron").memory_allocated() - before

    layer = torch.nn.Linear(4, 4).to("neuron")
    with torch.autocast("neuron", torch.bfloat16):
        out = layer(torch.ones(2, 4, device="neuron"))
    out.float().sum().backward()
    found["autocast"] = str(out.dtype)
    before_step = layer.weight.detach().cpu().clone()
    torch.optim.AdamW(layer.parameters(), foreach=True).step()
    found["moved"] = bool((layer.weight.detach().cpu() != before_step).all())
    device = find_device()
    found["device"] = device.type, str(device.torch()), str(torch.accelerator.current_accelerator())
    found["refused"] = [
        _message(call)
        for call in (
            lambda: torch.zeros(2, dtype=torch.float64, device="neuron"),
            lambda: torch.zeros(2, device="neuron").double(),
            lambda: torch.zeros(2, dtype=torch.complex64, device="neuron"),
            lambda: torch.optim.AdamW(layer.parameters(), fused=True).step(),
            lambda: torch.ones(2, device="neuron").nonzero(),
            lambda: torch.full((2,), 2**40, device="neuron"),
            lambda: torch.ones(2, device="neuron:99"),
        )
    ]
    return found


def test_one_process_computes_on_it_and_is_told_what_it_lacks() -> None:
    (found,) = harness.run(1, _alone, enter=standin.enter)
    assert (found["held"], found["left"], found["sum"]) == (4096, 0, 4096.0)
    assert found["ran"] == ["aten::_local_scalar_dense Float", "aten::mm Float", "aten::sum Float"]
    assert found["reads"] == 1 and found["moved"] and found["autocast"] == "torch.bfloat16"
    assert found["device"] == ("neuron", "neuron:0", "neuron")
    wanted = (
        "a Double tensor", "a Double tensor", "a ComplexFloat tensor", "_fused_adamw_ has no kernel", "depends on values",
        "32 bits do not hold", "no device 99",
    )  # fmt: skip
    for message, words in zip(found["refused"], wanted, strict=True):
        assert words in message, message


def _together(rank: int) -> dict[str, Any]:
    def numbers(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device="neuron") + 10 * rank

    found: dict[str, Any] = {}
    standin.forget()
    x = numbers(1, 2)
    dist.all_reduce(x)
    found["sum"] = x.tolist()
    dist.broadcast(x := numbers(3), src=1)
    found["broadcast"] = x.tolist()
    whole = torch.empty(4, device="neuron")
    dist.all_gather_into_tensor(whole, numbers(1, 2))
    found["gathered"] = whole.tolist()
    part = torch.empty(2, device="neuron")
    dist.reduce_scatter_tensor(part, numbers(1, 2, 3, 4))
    found["scattered"] = part.tolist()
    dist.all_to_all_single(whole, numbers(1, 2, 3, 4))
    found["exchanged"] = whole.tolist()
    x = torch.ones(1, dtype=torch.float64)  # of the CPU: gloo takes it
    dist.all_reduce(x)
    found["of the CPU"] = x.tolist()
    found["ran"] = [line for line in standin.operators() if line.startswith("c10d")]
    found["refused"] = [
        _message(lambda: dist.send(numbers(1), 1 - rank)),
        _message(lambda: dist.recv(numbers(1), 1 - rank)),
        _message(lambda: dist.all_to_all_single(numbers(1, 2, 3), numbers(1, 2, 3), [2 - rank, 1 + rank], [2 - rank, 1 + rank])),
    ]  # fmt: skip
    return found


def test_ranks_meet_on_it_as_on_the_device_and_never_send() -> None:
    first, second = harness.run(2, _together, enter=standin.enter)
    assert first["sum"] == second["sum"] == [12, 14]
    assert first["broadcast"] == second["broadcast"] == [13]
    assert first["gathered"] == second["gathered"] == [1, 2, 11, 12]
    assert (first["scattered"], second["scattered"]) == ([12, 14], [16, 18])
    assert (first["exchanged"], second["exchanged"]) == ([1, 2, 11, 12], [3, 4, 13, 14])
    assert first["of the CPU"] == [2]
    kinds = ("allgather", "allreduce", "alltoall", "broadcast", "reduce_scatter")
    assert first["ran"] == [f"c10d::{kind} Float" for kind in kinds]
    for message, words in zip(first["refused"], ("send", "recv", "uneven parts"), strict=True):
        assert words in message, message
