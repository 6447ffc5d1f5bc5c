"""What a device lacks is refused with the nearest layout that works, before anything runs."""

from __future__ import annotations

import dataclasses

import pytest

from data_prep.errors import UserError
from llama import recipe as recipes
from llama.config import Recipe
from llama.device import find_device
from tests.dist.layouts import recipe

PIPED = recipe(parallel__pipeline_parallel=2)
LOOPED = recipe(parallel__pipeline_parallel=2, parallel__pipeline_schedule="interleaved_zero_bubble")
V_SHAPED = recipe(parallel__pipeline_parallel=2, parallel__pipeline_schedule="zbv_zero_bubble")


def test_a_pipeline_is_refused_where_ranks_cannot_send() -> None:
    neuron = dataclasses.replace(find_device("cpu"), type="neuron", pipeline=False)
    with pytest.raises(
        UserError, match=r"pipeline_parallel=2 .* on neuron; set parallel\.pipeline_parallel=1"
    ) as error:
        recipes.check_device(PIPED, neuron)
    assert error.value.code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [V_SHAPED, LOOPED])
def test_zero_bubble_is_refused_on_an_older_torch(config: Recipe) -> None:
    old = dataclasses.replace(find_device("cpu"), zero_bubble=False)
    recipes.check_device(PIPED, old)
    with pytest.raises(UserError, match=r"needs torch 2\.13 or newer; use interleaved_1f1b"):
        recipes.check_device(config, old)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no neuron device here"):
        find_device("neuron")


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)]
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("HERD_DEVICE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert find_device().peak_flops == peak
