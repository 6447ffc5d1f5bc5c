"""The scripts of slurm/ on a real Slurm of five nodes: the README's commands, word for word."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.indexed import IndexedWriter
from tests.slurm.conftest import ROOT, Lab

# What makes Llama-2 7B small enough for a test; everything else is as the recipe says.
TINY = [
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.num_layers=2",
    "model.num_heads=4", "data.seq_length=64", "train.global_batch_size=16", "train.precision=fp32",
    "train.compile=false", "train.activation_checkpointing=none", "optimizer.lr=3e-3", "schedule.warmup_steps=5",
]  # fmt: skip
CPU = {"HERD_NODE_TYPE": "cpu", "HERD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.fixture(scope="module")
def checkout(shared: Path) -> Path:
    """A checkout of this repository, with data, where jobs may write."""
    folder = shared / "checkout"
    folder.mkdir()
    for name in ("launch", "llama", "data_prep", "configs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log", "runs"))
    (folder / "data/llama2").mkdir(parents=True)
    # Counting up to a number and starting again: a few steps teach the most of it.
    with IndexedWriter(folder / "data/llama2/corpus", np.uint16) as corpus:
        for length in range(20, 320):
            corpus.add_document(np.arange(length) % 97 + 3)
    return folder


def _log(folder: Path, script: str, job: int) -> str:
    path = folder / f"{script}-{job}.log"
    return path.read_text() if path.exists() else "no log was written"


def _scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def _stand_in(folder: Path, name: str, body: str) -> dict[str, str]:
    """Environment in which this shell text runs where a node would start training."""
    path = folder / name
    real = f'case $2 in launch.job) exec {sys.executable} "$@" ;; launch.node_check) exit 0 ;; esac'
    path.write_text(f"#!/bin/bash\n{real}\n{body}\n")
    path.chmod(0o755)
    return CPU | {"HERD_PYTHON": str(path)}


def test_every_node_starts_one_torchrun_which_sees_its_gpus_and_the_same_meeting_point(
    lab: Lab, checkout: Path
) -> None:
    shows = _stand_in(checkout, "shows", 'echo "$SLURM_NODEID $CUDA_VISIBLE_DEVICES $PWD $*"')
    words = ["tiny_cpu", "name=shown", "data.train=data/llama2/corpus", "train.global_batch_size=128"]
    command = ["sbatch", "--nodes", "4", "slurm/run.slurm", *words]
    job = lab.submit(*command, cwd=checkout, **(shows | {"HERD_NODE_TYPE": "8xH200"}))
    assert lab.wait(job) == "COMPLETED", _log(checkout, "run.slurm", job)
    lines = [line for line in _log(checkout, "run.slurm", job).splitlines() if "launch.train" in line]
    port = 20000 + (job * 64 + 1) % 12000
    assert sorted(lines) == [
        f"{i}: {i} 0,1,2,3,4,5,6,7 {checkout} -m launch.torchrun --nnodes 4 --node-rank {i} --nproc-per-node 8 "
        f"--master-addr node1 --master-port {port} --max-restarts 0 -m launch.train {' '.join(words)}"
        for i in range(4)
    ]
    logs = checkout / "runs/shown/logs/attempt-0001"
    assert sorted(path.name for path in logs.iterdir()) == [f"node{i}.log" for i in (1, 2, 3, 4)]
    assert sorted(lines)[0][3:] in (logs / "node1.log").read_text()


def test_a_node_that_fails_ends_the_attempt_at_once_and_is_named(lab: Lab, checkout: Path) -> None:
    # Python takes as long to fail; what fails sooner, node.sh holds back.
    fails = _stand_in(checkout, "fails", "sleep 0.5; [[ $SLURM_NODEID == 2 ]] && exit 7; sleep 300")
    words = ["tiny_cpu", "name=fails", "data.train=data/llama2/corpus", "resilience.fruitless_attempts=1"]
    job = lab.submit("sbatch", "--nodes", "4", "slurm/run.slurm", *words, cwd=checkout, **fails)
    assert lab.wait(job, timeout=50) == "FAILED"
    assert "node3: task 2: Exited with exit code 7" in _log(checkout, "run.slurm", job)


@pytest.mark.parametrize("script", ["compile.slurm", "run.slurm"])
@pytest.mark.parametrize(
    ("recipe", "said"), [([], "no recipe; sbatch --nodes 4"), (["./no.sh"], "no recipe ./no.sh in")]
)
def test_a_job_without_its_recipe_fails_with_the_remedy(
    lab: Lab, checkout: Path, script: str, recipe: list[str], said: str
) -> None:
    job = lab.submit("sbatch", "--nodes", "1", f"slurm/{script}", *recipe, cwd=checkout, **CPU)
    assert lab.wait(job) == "FAILED"
    assert said in _log(checkout, script, job)
    assert not (checkout / "runs/llama2_7b_gpu").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)  # four jobs of two to four processes each, 15 s apiece on two free cores
def test_the_readme_s_commands_then_on_two_nodes_what_ran_on_four_and_back(lab: Lab, checkout: Path) -> None:
    lab.settle()
    slurm = checkout / "slurm"
    compiled = lab.submit("sbatch", "--nodes", "4", "compile.slurm", "./llama_7b.sh", *TINY, cwd=slurm, **CPU)

    def submit(nodes: int, steps: int, *options: str) -> int:
        words = ["run.slurm", "./llama_7b.sh", *TINY, f"train.steps={steps}", "data.order_samples=640"]
        return lab.submit("sbatch", *options, "--nodes", nodes, *words, cwd=slurm, **CPU)

    first = submit(4, 20, f"--dependency=afterok:{compiled}", "--kill-on-invalid-dep=yes")
    assert lab.wait(compiled) == "COMPLETED", _log(slurm, "compile.slurm", compiled)
    assert "0: Total graphs: 0 / compiled: 0 / cached: 0 / failed: 0" in _log(slurm, "compile.slurm", compiled)
    assert lab.wait(first) == "COMPLETED", _log(slurm, "run.slurm", first)
    for nodes, steps in ((2, 30), (4, 40)):
        job = submit(nodes, steps)
        assert lab.wait(job) == "COMPLETED", _log(slurm, "run.slurm", job)
        assert f"resuming after step {steps - 10}" in _log(slurm, "run.slurm", job)

    board = slurm / "runs/llama2_7b_gpu/tensorboard"
    losses, samples = _scalars(board, "reduced_train_loss"), _scalars(board, "consumed_samples")
    assert sorted(losses) == list(range(1, 41)), "every step is there once"
    assert samples == {step: 16 * step for step in losses}
    assert losses[40] < 0.8 * losses[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_finds_what_a_job_before_it_compiled(lab: Lab, checkout: Path) -> None:
    lab.settle()
    words = [word.replace("train.compile=false", "train.compile=true") for word in TINY]
    words = ["./slurm/llama_7b.sh", *words, "validation.interval=2", "data.split=90,10,0", "run_dir=runs/warm"]
    here = CPU | {"HERD_CACHE": str(checkout / "graphs"), "OMP_NUM_THREADS": "2"}
    compiled = lab.submit("sbatch", "--nodes", "1", "slurm/compile.slurm", *words, cwd=checkout, **here)
    options = ["--nodes", "1", f"--dependency=afterok:{compiled}"]
    run = lab.submit("sbatch", *options, "slurm/run.slurm", *words, "train.steps=5", cwd=checkout, **here)
    assert lab.wait(compiled) == "COMPLETED", _log(checkout, "compile.slurm", compiled)
    said = _log(checkout, "compile.slurm", compiled)
    count = re.search(r"Total graphs: (\d+) / compiled: (\d+) / cached: 0 / failed: 0", said)
    assert count and int(count[1]) == int(count[2]) >= 3, said
    assert "compile cache cold: nothing was compiled into" in said
    assert not (checkout / "runs/warm").exists(), "compiling leaves the run's folder alone"
    assert lab.wait(run) == "COMPLETED", _log(checkout, "run.slurm", run)
    said = _log(checkout, "run.slurm", run)
    assert f"compile cache warm: {count[1]} graphs compiled by job {compiled} at " in said
    assert f"graphs of this attempt: Total graphs: {count[1]} / compiled: 0 / cached: {count[1]} / failed: 0" in said
