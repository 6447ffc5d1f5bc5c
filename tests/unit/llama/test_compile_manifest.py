"""What a change of the recipe does to compiled graphs: which are found again, and what is said of those that are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama import compile_manifest as manifests
from llama.config import Recipe
from llama.layout import layout
from tests.dist.layouts import recipe

DEVICE = {"backend": "inductor", "node_type": "cpu", "device": "CPU"}


def _recipe(**changes: Any) -> Recipe:
    return recipe(train__compile=True, **changes)


def _parts(config: Recipe, ranks: int = 4) -> dict[str, Any]:
    return manifests.parts(config, layout(config, ranks)) | DEVICE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    return tmp_path


def _compile(parts: dict[str, Any]) -> None:
    folder = manifests.shelf("inductor", "cpu") / manifests.key(parts)
    folder.mkdir(parents=True)
    facts = {"graphs": {"total": 12, "compiled": 12}, "packs": [], "job": "7", "time": "2026-11-22T08:00:00.000Z"}
    manifests.write(folder, parts, facts)


@pytest.mark.parametrize(
    "change",
    [
        {"train__steps": 500},
        {"train__global_batch_size": 16},
        {"optimizer__lr": 1e-3},
        {"train__seed": 1},
        {"model__init_std": 0.5},
        {"checkpoint__interval": 7},
        {"parallel__shard": 4},  # what it is anyway
    ],
)
def test_what_no_graph_depends_on_keeps_them(change: dict[str, Any]) -> None:
    assert manifests.key(_parts(_recipe(**change))) == manifests.key(_parts(_recipe()))


@pytest.mark.parametrize(
    "change",
    [
        {"model__hidden_size": 64},
        {"data__seq_length": 16},
        {"data__document_mask": True},
        {"train__micro_batch_size": 2},
        {"train__precision": "bf16_mixed"},
        {"train__activation_checkpointing": "selective"},
        {"train__loss_chunk": 8},
        {"validation__interval": 2},
        {"parallel__tensor_parallel": 2},
        {"parallel__pipeline_parallel": 2},
        {"parallel__replicate": 2},
    ],
)
def test_what_graphs_depend_on_makes_others_and_is_named(change: dict[str, Any], cache: Path) -> None:
    _compile(_parts(_recipe()))
    verdict = manifests.judge(_parts(_recipe(**change)))
    (name,) = change
    name = name.replace("__", ".").replace("validation.interval", "validation")
    assert not verdict.warm and f"{name}=" in verdict.why and "(compiled: " in verdict.why, verdict


def test_ranks_code_torch_and_settings_of_the_compiler_count(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {manifests.key(_parts(_recipe())), manifests.key(_parts(_recipe(), ranks=2))}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert manifests.key(_parts(_recipe())) in keys
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    keys.add(manifests.key(_parts(_recipe())))
    monkeypatch.setattr(manifests, "versions", lambda: {"torch": "9.9"})
    keys.add(manifests.key(_parts(_recipe())))
    monkeypatch.setattr(manifests, "code", lambda: "changed")
    keys.add(manifests.key(_parts(_recipe())))
    assert len(keys) == 5


def test_nothing_compiled_yet_is_said(cache: Path) -> None:
    assert str(manifests.judge(_parts(_recipe()))) == f"cold: nothing was compiled into {cache} yet"


def test_warm_says_whose_graphs_they_are(cache: Path) -> None:
    _compile(_parts(_recipe()))
    words = "warm: 12 graphs compiled by job 7 at 2026-11-22T08:00:00.000Z"
    assert str(manifests.judge(_parts(_recipe()))) == words
    # A login node does not see the device; it may know the kind of node.
    config = _recipe()
    assert str(manifests.foresee(config, layout(config, 4))) == words
    assert manifests.foresee(config, layout(config, 4), "cpu").warm
    cold = manifests.foresee(config, layout(config, 4), "gpu")
    assert str(cold) == "cold: no graphs for node_type=gpu (compiled: cpu)"


def test_the_nearest_graphs_are_named_and_no_more_than_four_differences(cache: Path) -> None:
    far = dict(model__hidden_size=64, model__intermediate_size=96, model__num_layers=8, data__seq_length=16)
    _compile(_parts(_recipe(train__precision="bf16_sr", train__loss_chunk=8, **far)))
    verdict = manifests.judge(_parts(_recipe()))
    assert verdict.why.count("compiled:") == 4 and verdict.why.endswith(" and 2 more")
    _compile(_parts(_recipe(train__precision="bf16_mixed")))
    assert str(manifests.judge(_parts(_recipe()))) == "cold: no graphs for train.precision=fp32 (compiled: bf16_mixed)"


def test_a_damaged_manifest_is_none(cache: Path) -> None:
    _compile(_parts(_recipe()))
    (path,) = cache.glob("*/*/manifest.json")
    path.write_text(path.read_text()[:200])
    assert not manifests.judge(_parts(_recipe())).warm


def test_a_recipe_without_graphs_is_always_warm(cache: Path) -> None:
    assert str(manifests.foresee(recipe(), layout(recipe(), 1))).startswith("warm: this recipe compiles nothing")


def test_a_login_node_needs_no_torch() -> None:
    check = "import sys, llama.compile_manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
