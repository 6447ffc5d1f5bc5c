"""A run on the device stops, and goes on: there on other ranks, or on the CPU, as if it had never stopped or moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama.config import Recipe
from tests.device import standin
from tests.device.runs import neuron_train
from tests.dist import harness
from tests.dist.runs import run_recipe, samples_of, spied_train, whole_weights, write_tokens

TP = {"parallel__tensor_parallel": 2}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    standin.require()


def test_checkpoints_go_to_other_layouts_and_to_the_cpu_and_back(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path)

    def config(folder: str, steps: int, **changes: Any) -> Recipe:
        keys = {
            "train__steps": steps, "schedule__kind": "constant", "checkpoint__interval": 2, "data__order_samples": 56,
            "train__micro_batch_size": 2,
        }  # fmt: skip
        return run_recipe(tmp_path / folder, prefix, **(keys | changes))

    whole = harness.run(1, spied_train, config("whole", 6))
    parts = [
        harness.run(2, neuron_train, config("parts", 2), enter=standin.enter),  # FSDP, written in the background
        harness.run(2, neuron_train, config("parts", 4, **TP), enter=standin.enter),  # tensor and sequence parallel
        harness.run(1, spied_train, config("parts", 6)),  # the CPU
    ]
    assert [part[0].error for part in parts] == [None] * 3
    assert [loss for part in parts for loss in part[0].losses] == pytest.approx(whole[0].losses, rel=1e-5)
    assert {k: v for part in parts for k, v in samples_of(part).items()} == samples_of(whole)
    weights = whole_weights(parts[-1])
    for name, weight in whole_weights(whole).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)

    back = harness.run(2, neuron_train, config("whole", 7), enter=standin.enter)  # what the CPU wrote
    assert back[0].error is None and [report.step for report in back[0].reports] == [7]
