"""`herd train` on a device that torch finds by itself, as torch-neuronx makes itself known: by an entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama import recipe as recipes
from tests.device import standin
from tests.dist.runs import run_recipe, write_tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_herd_train_starts_a_rank_on_each_device_and_trains(tmp_path: Path) -> None:
    standin.require()
    standin.build.library()  # once, and not in both ranks
    package = tmp_path / "path" / "standin-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[torch.backends]\nneuron = tests.device.standin:load\n")
    config = run_recipe(tmp_path / "run", write_tokens(tmp_path), train__steps=3, train__micro_batch_size=2)
    recipes.save(config, tmp_path / "tiny.yaml")
    environment = {key: value for key, value in os.environ.items() if key != "HERD_DEVICE"}
    environment |= {"PYTHONPATH": f"{package.parent}:{ROOT}", "STANDIN_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(tmp_path / "tiny.yaml")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 x trn2 as" in done.stdout and "step 3: checkpoint" in done.stdout
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["outcome"] == "finished"
