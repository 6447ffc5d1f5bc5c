"""`python -m launch.demo`: makes all it names, does nothing twice, goes on after Ctrl-C, and spares other folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from launch import demo
from llama import recipe

# The demo's recipe, small enough for a test; RECIPE in the environment of the child names it.
TINY = """base: demo
name: tiny
model: {vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1}
data: {seq_length: 64}
train: {steps: %d}
validation: {interval: 4, batches: 1}
checkpoint: {interval: 4}
log: {interval: 2}
"""
PROGRAM = "import sys; from launch import demo; demo.RECIPE, demo.MEGABYTES = sys.argv.pop(1), 0.5; demo.main()"


def write_recipe(folder: Path, steps: int) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY % steps)
    return path


def start(config: Path, to: Path) -> subprocess.Popen[str]:
    """The demo as a terminal would start it: head of a process group of its own."""
    command = [sys.executable, "-c", PROGRAM, str(config), "--to", str(to)]
    environment = {**os.environ, "COLUMNS": "140"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0, env=environment)


@pytest.mark.slow
def test_it_makes_everything_once_and_training_anew_when_the_recipe_changes(tmp_path: Path) -> None:
    to, config = tmp_path / "out", write_recipe(tmp_path, 8)
    process = start(config, to)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    for path in ("data/text.idx", "run/checkpoints/step-00000008", "run/tensorboard", "curves.png", "sample.txt"):
        assert (to / path).exists(), path
    assert (to / "model/model.safetensors").stat().st_size > 10_000
    assert (to / "sample.txt").read_text().startswith(demo.PROMPT)
    assert f"$ herd prep tokenize {to}/data/text.jsonl --tokenizer" in out and "in 8 steps" in out
    written = {path: path.stat().st_mtime_ns for path in to.rglob("*") if path.is_file() and path.name != demo.STATE}

    process = start(config, to)
    out, _ = process.communicate()
    assert process.returncode == 0 and out.count("done before") == 6
    now = {path: path.stat().st_mtime_ns for path in to.rglob("*") if path.is_file() and path.name != demo.STATE}
    assert now == written, "nothing was made again"


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    to, config = tmp_path / "out", write_recipe(tmp_path, 100_000)
    process = start(config, to)
    deadline = time.monotonic() + 120
    while not list((to / "run/checkpoints").glob("step-*/herd.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "the same command goes on from here" in out
    saved = max(int(path.parent.name[5:]) for path in (to / "run/checkpoints").glob("step-*/herd.json"))

    process = start(config, to)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "step" in line and "loss" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert f"resuming after step {saved};" in "".join(lines)
    assert process.returncode == 143


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    for options in ([], ["--fresh"]):
        result = CliRunner().invoke(demo.command, ["--to", str(tmp_path), *options])
        assert isinstance(result.exception, UserError) and "holds something else" in str(result.exception)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_the_recipe_is_about_the_text_that_its_first_lines_prepare() -> None:
    config = recipe.load(demo.RECIPE)
    commands = [demo.shell(part.command) for part in demo.plan(Path("runs/demo"), config)]
    head = recipe.find(demo.RECIPE).read_text()
    assert f"#   {commands[0]}\n" in head
    assert f"#   {commands[1].removesuffix(' --overwrite')}\n" in head
    assert config.data.train[0].path == "runs/demo/data/text" and config.folder == "runs/demo/run"
