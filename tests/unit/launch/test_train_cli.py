"""`herd train` as a person meets it: wrong use is one line and an exit code; a run leaves what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama import recipe as recipes
from tests.dist.runs import write_tokens

ROOT = Path(__file__).resolve().parents[3]
MODEL = dict(
    vocab_size=250, hidden_size=32, intermediate_size=80, num_layers=2, num_heads=4, max_position=64, vocab_multiple=8
)  # fmt: skip


def _herd(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HERD_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "launch.cli", "train", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with token files and a recipe tiny.yaml over them."""
    prefix = write_tokens(tmp_path)
    recipe: dict[str, Any] = {
        "name": "tiny", "model": MODEL,
        "data": {"train": Path(prefix).name, "seq_length": 32, "split": "90,10,0"},
        "train": {"steps": 4, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-2}, "validation": {"interval": 2, "batches": 1}, "checkpoint": {"interval": 2},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def _truncate_index(folder: Path) -> None:
    path = folder / "tokens0.idx"
    path.write_bytes(path.read_bytes()[:-20])


WRONG: dict[str, tuple[list[str], Any, int, str]] = {
    "unknown recipe": (["tiny_cqu"], None, 2, "no recipe 'tiny_cqu'"),
    "unknown key": (["tiny.yaml", "train.step=3"], None, 2, "did you mean steps?"),
    "not key=value": (["tiny.yaml", "steps"], None, 2, "is not key=value"),
    "missing token file": (["tiny.yaml", "data.train=nowhere"], None, 1, "nowhere"),
    "truncated index": (["tiny.yaml"], _truncate_index, 1, "tokens0.idx"),
    "no token files": (["tiny.yaml", "data.train=[]"], None, 2, "herd prep tokenize"),
    "layout that does not fit": (["tiny.yaml", "parallel.tensor_parallel=2", "-n", "3"], None, 2, "start 4 ranks"),
    "batch that does not divide": (["tiny.yaml", "train.global_batch_size=5", "-n", "2"], None, 2, "6 would be"),
    "run folder is a file": (["tiny.yaml", "run_dir=tiny.yaml/run"], None, 2, "choose another run_dir"),
    "processes": (["tiny.yaml", "-n", "0"], None, 2, "0 is not in the range"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_use_is_one_line_and_an_exit_code(kind: str, folder: Path) -> None:
    arguments, prepare, code, text = WRONG[kind]
    if prepare:
        prepare(folder)
    done = _herd(*arguments, *([] if "-n" in arguments else ["-n", "1"]), folder=folder)
    lines = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert text in lines[-1] and "Traceback" not in done.stderr
    assert done.stdout == ""
    # click shows its own usage above an error in an option; ours is one line
    assert len(lines) == 1 or lines[0].startswith("Usage: ")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_a_run_leaves_its_recipe_its_checkpoints_and_its_curves_and_goes_on_when_prolonged(folder: Path) -> None:
    done = _herd("tiny.yaml", "--processes", "2", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "2 x CPU as fsdp2" in done.stdout and "random weights" in done.stdout
    assert "mfu is relative to" in done.stdout and "validation loss" in done.stdout
    run = folder / "runs/tiny"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert list((run / "tensorboard").glob("events*"))
    assert recipes.load(str(run / "recipe.yaml")) == recipes.load(str(folder / "tiny.yaml"))
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.writing"))

    again = _herd("runs/tiny/recipe.yaml", "train.steps=6", "parallel.tensor_parallel=2", "-n", "2", folder=folder)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 4" in again.stdout and "as tp2" in again.stdout
    assert "step 5/6" in again.stdout and "step 4/6" not in again.stdout


@pytest.mark.slow
def test_of_an_error_that_both_processes_meet_one_line_is_printed(folder: Path) -> None:
    done = _herd("tiny.yaml", "-n", "2", "model.vocab_size=200", folder=folder)
    assert done.returncode == 1
    assert done.stderr.count("herd: ") == 1 and "Traceback" not in done.stderr
    assert "holds token id" in done.stderr.splitlines()[-1]
