"""One table says what a device can do: what is refused, what is warned of, what find_device gives, and the docs go by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from launch import submit
from llama import capabilities
from llama.capabilities import TABLE, check, kind, objections
from llama.device import find_device
from llama.recipe import CONFIGS, check_device, load
from tests.dist.layouts import recipe

ROOT = Path(__file__).resolve().parents[2]
FINE: dict[str, Any] = {"data__seq_length": 2048, "model__max_position": 4096, "train__compile": True}


def test_the_table_needs_no_torch() -> None:
    """`herd submit` and `herd plan` ask it where there may be none."""
    code = "import sys, llama.capabilities; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("trn2", "neuron"), ("trn3", "neuron"), ("neuron", "neuron"), ("gpu", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")],
)
def test_nodes_and_devices_have_a_column(name: str, expected: str) -> None:
    assert kind(name) == expected


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble"])
def test_a_pipeline_is_refused_on_trainium_with_what_to_use_instead(schedule: str) -> None:
    piped = recipe(parallel__pipeline_parallel=2, parallel__pipeline_schedule=schedule, **FINE)
    with pytest.raises(
        UserError, match=r"pipeline_parallel=2 .* on neuron; set parallel\.pipeline_parallel=1"
    ) as error:
        check(piped, "neuron")
    assert error.value.code == 2 and "\n" not in str(error.value)
    assert check(piped, "cuda") == check(piped, "cpu") == []


@pytest.mark.parametrize(
    ("changes", "key", "remedy"),
    [
        ({"data__seq_length": 3000}, "data.seq_length=3000", "use 2048 or 4096"),
        ({"data__seq_length": 1024}, "data.seq_length=1024", "use 2048"),
        ({"data__document_mask": True}, "data.document_mask=true", "chat.pack=false"),
        ({"train__compile": False}, "train.compile=false", "set train.compile=true"),
        ({"lora__rank": 8, "lora__quantize": "int8", "train__compile": False}, "lora.quantize=int8", "lora.quantize=null"),
    ],
)  # fmt: skip
def test_what_is_doubtful_on_trainium_is_said_and_not_refused(changes: dict[str, Any], key: str, remedy: str) -> None:
    doubtful = recipe(**(FINE | changes))
    said = next(line for line in check(doubtful, "neuron") if key in line)
    assert remedy in said and "\n" not in said
    assert check(doubtful, "cuda") == check(doubtful, "cpu") == []


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*_trn2.yaml")))
def test_nothing_speaks_against_a_recipe_of_trainium_on_trainium(name: str) -> None:
    assert objections(load(name), "neuron") == []


@pytest.mark.parametrize("node_type", ["trn2.48xlarge", "trn3"])
def test_a_pipeline_is_refused_before_the_queue(
    node_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.slurm, "call", lambda *args: "")
    monkeypatch.setattr(submit, "_nodes", lambda wanted: [])
    wanted = submit.Wanted(
        "llama2_7b", ("parallel.pipeline_parallel=2",), 4, folder=tmp_path, environment={"HERD_NODE_TYPE": node_type}
    )
    with pytest.raises(UserError, match=r"pipeline_parallel=2 .* on neuron; set parallel\.pipeline_parallel=1"):
        submit.check(wanted)


def test_find_device_goes_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HERD_DEVICE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for name in ("cuda", "neuron"):
        found = type("Found", (), {"type": name})
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found: found)
        _agree(find_device(), name)
    _agree(find_device("cpu"), "cpu")


def _agree(device: Any, name: Any) -> None:
    able = TABLE[name]
    assert device.type == name and device.compile_backend == able.compile_backend
    assert (device.fused_adamw, device.pipeline) == (able.fused_adamw, able.pipeline)
    assert device.zero_bubble <= able.zero_bubble  # an older torch has none


def test_a_run_is_warned_as_well_as_refused() -> None:
    from dataclasses import replace

    neuron = replace(find_device("cpu"), type="neuron", pipeline=False)
    assert check_device(load("llama3.1_8b_trn2"), neuron) == []
    (said,) = check_device(recipe(**(FINE | {"data__seq_length": 1024})), neuron)
    assert "multiples of 2048" in said
    assert check_device(recipe(), find_device("cpu")) == []


def test_the_docs_have_the_table() -> None:
    assert capabilities.table() in (ROOT / "docs/trainium.md").read_text(encoding="utf-8")
