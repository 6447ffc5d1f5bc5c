"""Training runs on the stand-in: the tests' tiny recipes through train(), with what one step did on the device."""

from __future__ import annotations

import time
from typing import Any

import torch

from llama.config import Recipe
from llama.train.loop import Trainer
from tests.device import standin
from tests.dist.runs import Record, spied_train

EOD = 249


def neuron_train(rank: int, config: Recipe, act: Any = None) -> Record:
    """spied_train on the device; what its second step did is in the record's `operators`, `reads`, `held`."""
    device = torch.get_device_module("neuron")
    device.set_device(rank)

    def watch(trainer: Trainer, step: int) -> None:
        record: Any = trainer.record  # type: ignore[attr-defined]
        if act is not None:
            act(trainer, step)
        if step == 2:
            time.sleep(0.05)  # a thread of gloo may hold what it has sent for a moment longer
            device.reset_peak_memory_stats()
            record.held = device.memory_allocated()
            standin.forget()
        if step == 3 and hasattr(record, "held"):  # a run that went on from a checkpoint took no second step here
            record.operators, record.reads = standin.operators(), standin.reads()
            record.peak, record.held_after = device.max_memory_allocated(), device.memory_allocated()
            until = time.monotonic() + 1
            while record.held_after > record.held and time.monotonic() < until:
                time.sleep(0.01)
                record.held_after = device.memory_allocated()

    return spied_train(rank, config, watch, device="neuron")
