"""`herd parity` makes a pair of recipes, refuses what is none, and writes the commands that train and compare them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.indexed import IndexedWriter
from launch import cli
from llama import recipe as recipes

Herd = Callable[..., tuple[int, str, str]]
FIXTURES = Path(__file__).parents[2] / "fixtures/parity"
SMALL = """
base: tiny_cpu
name: small
data: {train: tokens, seq_length: 32}
train: {steps: 400, global_batch_size: 8, micro_batch_size: 4}
"""
FAKE = """#!/usr/bin/env python3
import json, sys
from pathlib import Path
here = Path(__file__).parent
name, words = Path(__file__).name, sys.argv[1:]
with (here / "calls.jsonl").open("a") as log:
    log.write(json.dumps([name, *words]) + "\\n")
number = len((here / "calls.jsonl").read_text().splitlines())
if name == "sinfo":
    for node in ("one", "two"):
        print(f"{node}|idle|(null)|cpu*")
elif "--parsable" in words:
    if "candidate" in " ".join(words) and (here / "refuse").exists() and "--wrap" not in " ".join(words):
        print("sbatch: error: Job violates accounting policy", file=sys.stderr)
        sys.exit(1)
    print(number)
"""


@pytest.fixture
def herd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Herd:
    """Runs `herd` with arguments: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["herd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, the lines of two sides, and token files."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL)
    Path("fp32.yaml").write_text("base: tiny_cpu\ntrain: {precision: fp32}\n")
    Path("cut.yaml").write_text("train: {precision: bf16_mixed}\nparallel: {tensor_parallel: 2}\n")
    with IndexedWriter("tokens", np.uint16) as writer:
        for length in range(50, 150):
            writer.add_document(np.arange(length) % 97)
    return tmp_path


PAIR = ["parity", "small.yaml", "--reference", "fp32.yaml", "--candidate", "cut.yaml"]


def test_a_pair_differs_in_layout_alone_and_its_second_seed_in_the_seed(herd: Herd, here: Path) -> None:
    code, out, _ = herd(*PAIR, "--processes", "1,2", "--dry-run", "train.steps=50")
    assert code == 0
    lines = [line.split(" -m launch.cli ")[1] for line in out.splitlines()]
    assert lines[0] == "train runs/parity-small/reference.yaml --processes 1"
    assert lines[2] == "train runs/parity-small/candidate.yaml --processes 2"
    assert lines[3].startswith(
        "compare --reference runs/parity-small/reference --reference runs/parity-small/reference-seed2 "
        "runs/parity-small/candidate --same-start"
    )
    first, seed, last = (
        recipes.load(f"runs/parity-small/{n}.yaml") for n in ("reference", "reference-seed2", "candidate")
    )
    assert (first.train.precision, last.train.precision, last.parallel.tensor_parallel) == ("fp32", "bf16_mixed", 2)
    assert first.train.steps == last.train.steps == 50
    assert first.train.seed == last.train.seed == seed.train.seed - 1 and first.data == seed.data == last.data


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("train: {global_batch_size: 16}", "train.global_batch_size is 8 and 16"),
        ("optimizer: {lr: 1}", "optimizer.lr is 0.002 and 1.0"),
        ("model: {num_layers: 7}", "model.num_layers is 6 and 7"),
        ("train: {presision: fp32}", "other.yaml: train.presision: unknown key; did you mean precision?"),
        ("- 1", "is no mapping of keys"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_recipes_that_are_no_pair_are_refused(herd: Herd, here: Path, lines: str, says: str) -> None:
    Path("other.yaml").write_text(lines)
    code, _, error = herd("parity", "small.yaml", "--reference", "fp32.yaml", "--candidate", "other.yaml")
    assert code == 2 and says in error and len(error.splitlines()) == 1


def test_a_folder_of_another_pair_is_left_alone(herd: Herd, here: Path) -> None:
    assert herd(*PAIR, "--dry-run")[0] == 0
    assert herd(*PAIR, "--dry-run", "optimizer.lr=1e-3")[0] == 0  # nothing was trained yet
    Path("runs/parity-small/reference").mkdir()
    code, _, error = herd(*PAIR, "--dry-run", "optimizer.lr=5e-4")
    assert code == 2 and "holds another recipe" in error


@pytest.mark.parametrize("text", ["0", "1,2,3", "two", "1,"])
def test_numbers_of_processes_are_one_or_two(herd: Herd, here: Path, text: str) -> None:
    code, _, error = herd(*PAIR, "--processes", text)
    assert code == 2 and "give one number, or two such as 4,2" in error


def finish(name: str, curves: str, steps: int = 400) -> None:
    """A run folder as training leaves it, with recorded curves."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path("runs/parity-small") / name
    board = SummaryWriter(str(folder / "tensorboard"))
    for tag, curve in json.loads((FIXTURES / f"{curves}.json").read_text()).items():
        for step, value in zip(curve["steps"], curve["values"], strict=True):
            board.add_scalar(tag, value, step)
    board.close()
    shutil.copy(f"runs/parity-small/{name}.yaml", folder / "recipe.yaml")
    (folder / "events.jsonl").write_text(json.dumps({"event": "end", "step": steps, "outcome": "finished"}) + "\n")


@pytest.mark.parametrize(("candidate", "code"), [("bf16_mixed", 0), ("gradients_2_percent", 1)])
def test_runs_that_are_done_are_compared_at_once(herd: Herd, here: Path, candidate: str, code: int) -> None:
    herd(*PAIR, "--dry-run")
    for name, curves in (("reference", "reference"), ("reference-seed2", "seed_2"), ("candidate", candidate)):
        finish(name, curves)
    found, out, error = herd(*PAIR, "--json")
    assert found == code, error
    assert json.loads(out)["comparisons"][0]["band"]["final gap"]["half"] > 0
    assert error.count("trained before") == 3
    assert (here / "runs/parity-small/parity.md").exists() and (here / "runs/parity-small/parity.png").exists()


@pytest.fixture
def cluster(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which write down how they are called."""
    tools = here / "tools"
    tools.mkdir()
    for name in ("sbatch", "sinfo", "squeue", "scancel"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.delenv("HERD_NODE_TYPE", raising=False)
    return tools


def calls(cluster: Path) -> list[list[str]]:
    return [json.loads(line) for line in (cluster / "calls.jsonl").read_text().splitlines()]


SLURM = ["--slurm", "--nodes", "1,2", "--reference-option", "partition=cpu", "--candidate-option", "constraint=fast"]


def test_a_chain_submits_all_runs_and_the_comparison_behind_them(herd: Herd, cluster: Path) -> None:
    code, out, error = herd(*PAIR, *SLURM, "--time", "1:00:00")
    assert code == 0, error
    sent = [call for call in calls(cluster) if call[0] == "sbatch" and "--parsable" in call]
    assert len(sent) == 4
    for call, name, nodes in zip(sent, ("reference", "reference-seed2", "candidate"), "112", strict=False):
        assert call[call.index("--nodes") + 1] == nodes
        assert call[-1].endswith(f"runs/parity-small/{name}.yaml") and call[-2].endswith("run.slurm")
        assert not any(word.startswith("--dependency") for word in call) and "--time=1:00:00" in call
    assert "--partition=cpu" in sent[0] and "--constraint=fast" in sent[2] and "--constraint=fast" not in sent[0]
    numbers = re.findall(r"as job (\d+)", out)
    assert f"--dependency=afterok:{':'.join(numbers[:3])}" in sent[3] and "--kill-on-invalid-dep=yes" in sent[3]
    wrapped = next(word for word in sent[3] if word.startswith("--wrap="))
    assert (
        "compare --reference runs/parity-small/reference " in wrapped
        and "--markdown runs/parity-small/parity.md" in wrapped
    )


def test_what_slurm_refuses_takes_the_others_back(herd: Herd, cluster: Path) -> None:
    (cluster / "refuse").touch()
    code, _, error = herd(*PAIR, *SLURM)
    assert code == 1 and "violates accounting policy" in error
    cancelled = [call[1] for call in calls(cluster) if call[0] == "scancel"]
    assert len(cancelled) == 2


def test_a_dry_run_of_the_chain_submits_nothing_and_prints_a_shell_script(herd: Herd, cluster: Path) -> None:
    code, out, _ = herd(*PAIR, *SLURM, "--dry-run")
    assert code == 0
    assert not any("--parsable" in call for call in calls(cluster))
    lines = out.splitlines()
    assert [line.split("=")[0] for line in lines[:3]] == ["reference", "reference_seed2", "candidate"]
    assert "afterok:$reference:$reference_seed2:$candidate" in lines[3]


def test_the_recipes_of_a_pair_are_recipes(herd: Herd, here: Path) -> None:
    herd(*PAIR, "--dry-run", "--seeds", "3", "--folder", "elsewhere")
    names = sorted(path.name for path in Path("elsewhere").glob("*.yaml"))
    assert names == ["candidate.yaml", "reference-seed2.yaml", "reference-seed3.yaml", "reference.yaml"]
    assert yaml.safe_load(Path("elsewhere/candidate.yaml").read_text())["run_dir"] == "elsewhere/candidate"
