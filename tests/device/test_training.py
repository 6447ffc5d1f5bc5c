"""Training runs on a neuron device as on a CPU: each layout, precision and way to recompute, and what a step runs there.

The device is a stand-in (tests/device/standin), so this is about our code, not about Trainium's.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama.config import Recipe
from llama.train.loop import Trainer
from tests.device import standin
from tests.device.runs import EOD, neuron_train
from tests.dist import harness
from tests.dist.runs import Record, run_recipe, spied_train, whole_weights, write_tokens

TP = {"parallel__tensor_parallel": 2}
MASKED = {"data__document_mask": True, "data__eod": EOD}
LORA = {"lora__rank": 4, "lora__targets": "all-linear"}
NF4 = {"lora__quantize": "nf4", "model__hidden_size": 128, "model__intermediate_size": 384, "model__head_dim": 32}
# name -> (ranks, what changes in the recipe)
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "fsdp2_selective": (2, {"train__activation_checkpointing": "selective"}),
    "sp2_tied_recomputed": (2, {**TP, "train__activation_checkpointing": "full", "model__tie_embeddings": True}),
    "tp2_masked": (2, {**TP, **MASKED, "parallel__sequence_parallel": False}),
    "fsdp2_sp2": (4, TP),
    "hsdp2x2": (4, {"parallel__replicate": 2}),
    "fsdp2_mixed": (2, {"train__precision": "bf16_mixed"}),
    "fsdp2_sp2_sr_selective": (
        4,
        {**TP, "train__precision": "bf16_sr", "train__activation_checkpointing": "selective"},
    ),
    "fsdp2_lora": (2, LORA),
    # Dropout goes by the bits of its input, which differ by a rounding between two attention kernels.
    "sp2_lora_dora_mixed": (
        2,
        {**LORA, **TP, "lora__dora": True, "lora__dropout": 0.05, "train__precision": "bf16_mixed"},
    ),
    "fsdp2_nf4": (2, {**LORA, **NF4}),
}
PLAIN = ("parallel__", "train__activation_checkpointing")
OPERATORS = Path(__file__).with_name("operators.txt")
# Trainium computes in 32 bits what is Long. All of these hold numbers of tokens, rows or scales, far below 2^31.
LONG = {
    "aten::add": "a scale's place in its matrix, of a 4-bit base",
    "aten::arange": "a scale's row and column",
    "aten::floor_divide": "the group of a scale",
    "aten::index": "the group of a scale",
    "aten::mul": "a scale's place",
    "aten::clamp": "a token's row of this rank's vocabulary",
    "aten::embedding_dense_backward": "a token's row",
    "aten::gather": "a label's column",
    "aten::ge": "whether a row is of this rank's",
    "aten::index_select": "a token's row",
    "aten::lt": "whether a row is of this rank's",
    "aten::ne": "whether a label is trained",
    "aten::scatter_add": "a label's column",
    "aten::sub": "a token's row of this rank's vocabulary",
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    standin.require()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        _trained.cache_clear()
        yield Path(path)


def _recipe(folder: Path, name: str, changes: dict[str, Any]) -> Recipe:
    prefix = folder / "tokens0"
    if not prefix.with_suffix(".bin").exists():
        write_tokens(folder)
    keys = {
        "train__steps": 3, "train__micro_batch_size": 2, "log__interval": 100, "validation__interval": 3,
        "validation__batches": 1, "checkpoint__interval": 0, "checkpoint__at_end": False, "schedule__kind": "constant",
    }  # fmt: skip
    return run_recipe(folder / name, str(prefix), **(keys | changes))


def _count_many(trainer: Trainer, step: int) -> None:
    """In step 1, sum more tokens than float32 counts to."""
    if step == 1:
        device, rank = trainer.device.torch(), torch.distributed.get_rank()
        labels = torch.zeros(1, dtype=torch.int64).expand(3001, 3001 + rank)
        batches: Any = [SimpleNamespace(labels=labels)]
        record: Any = trainer.record  # type: ignore[attr-defined]
        loss = torch.full((), 3e7, device=device)
        record.many = trainer.total(loss, batches, torch.full((), 0.25, device=device))


def _train(rank: int, config: Recipe) -> Record:
    return neuron_train(rank, config, _count_many)


@functools.cache
def _trained(folder: Path, name: str) -> list[Any]:
    world, changes = RUNS[name]
    return harness.run(world, _train, _recipe(folder, name, changes), enter=standin.enter)


@functools.cache
def _on_the_cpu(folder: Path, changes: tuple[tuple[str, Any], ...]) -> list[Record]:
    return harness.run(1, spied_train, _recipe(folder, f"cpu{abs(hash(changes))}", dict(changes)))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_device_is_the_run_on_the_cpu(folder: Path, name: str) -> None:
    changes = RUNS[name][1]
    plain = tuple((key, value) for key, value in changes.items() if not key.startswith(PLAIN))
    found, expected = _trained(folder, name), _on_the_cpu(folder, plain)
    assert found[0].error is None
    exact = changes.get("train__precision", "fp32") == "fp32"
    for record in found:
        assert record.losses == pytest.approx(expected[0].losses, rel=1e-5 if exact else 1e-2)
        assert record.outcome.validation_loss == pytest.approx(
            expected[0].outcome.validation_loss, rel=1e-4 if exact else 1e-2
        )
        assert record.reads == 1, "a step waits for the device once, when it reads its sums"
        assert record.held_after == record.held < record.peak, "a step leaves on the device what it found there"
    if exact:
        weights = whole_weights(found)
        for name_, weight in whole_weights(expected).items():
            torch.testing.assert_close(weights[name_], weight, rtol=1e-3, atol=1e-4)


def test_tokens_are_counted_where_numbers_have_24_bits(folder: Path) -> None:
    ranks = _trained(folder, "fsdp2_selective")
    for record in ranks:
        loss, tokens, squared, stops = record.many
        assert tokens == 3001 * 3001 + 3001 * 3002 > 2**24 and tokens % 2  # float32 has no such number
        assert math.isclose(loss, 6e7, rel_tol=1e-6) and (squared, stops) == (0.5, 0)


def test_a_step_runs_the_known_operators(folder: Path) -> None:
    types: dict[str, set[str]] = {}
    for name in RUNS:
        for record in _trained(folder, name):
            for line in record.operators:
                operator, *found = line.split()
                types.setdefault(operator, set()).update(found)
    text = "".join(f"{operator} {' '.join(sorted(found))}\n" for operator, found in sorted(types.items()))
    if os.environ.get("HERD_REFRESH"):
        OPERATORS.write_text(text)
    assert text == OPERATORS.read_text(), (
        f"a training step runs other operators on the device than {OPERATORS.name} says. On Trainium one without a kernel "
        "falls back to the CPU and slows every step: look whether it is needed, then write the file anew with "
        f"HERD_REFRESH=1 pytest {Path(__file__).parent.name}/{Path(__file__).name}"
    )
    assert {operator for operator, found in types.items() if "Long" in found} == set(LONG)
    for operator, found in types.items():
        assert not found & {"Double", "ComplexFloat", "ComplexDouble", "Half"}, operator
        if operator.startswith("c10d::"):
            assert found <= {"Float", "BFloat16", "Byte"}, operator


def test_a_pipeline_is_refused(folder: Path) -> None:
    config = _recipe(folder, "pp2", {"parallel__pipeline_parallel": 2})
    for record in harness.run(2, _train, config, enter=standin.enter):
        assert record.error is not None
        assert "pipeline_parallel=2 needs ranks to send to each other" in record.error
        assert "set parallel.pipeline_parallel=1 and let FSDP shard over those ranks" in record.error
