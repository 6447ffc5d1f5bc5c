"""The scripts of slurm/ on a real Slurm of four nodes: the README's commands, word for word."""

from __future__ import annotations

import re
import shutil
import sys
import time
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
    """Environment in which this shell text runs where a node would start Python."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return CPU | {"HERD_PYTHON": str(path)}


def test_every_node_starts_one_torchrun_which_sees_its_gpus_and_the_same_meeting_point(
    lab: Lab, checkout: Path
) -> None:
    shows = _stand_in(checkout, "shows", 'echo "$SLURM_NODEID $CUDA_VISIBLE_DEVICES $PWD $*"')
    command = ["sbatch", "--nodes", "4", "slurm/run.slurm", "tiny_cpu", "name=a b"]
    job = lab.submit(*command, cwd=checkout, **(shows | {"HERD_NODE_TYPE": "gpu"}))
    assert lab.wait(job) == "COMPLETED", _log(checkout, "run.slurm", job)
    lines = [line for line in _log(checkout, "run.slurm", job).splitlines() if "launch.train" in line]
    port = 20000 + job * 8 % 12000
    assert sorted(lines) == [
        f"{i}: {i} 0,1,2,3,4,5,6,7 {checkout} -m torch.distributed.run --nnodes 4 --node-rank {i} --nproc-per-node 8 "
        f"--master-addr node1 --master-port {port} --max-restarts 0 -m launch.train tiny_cpu name=a b"
        for i in range(4)
    ]


def test_a_node_that_fails_ends_the_job_at_once_and_is_named(lab: Lab, checkout: Path) -> None:
    fails = _stand_in(checkout, "fails", "[[ $SLURM_NODEID == 2 ]] && exit 7; sleep 300")
    job = lab.submit("sbatch", "--nodes", "4", "slurm/run.slurm", "tiny_cpu", cwd=checkout, **fails)
    assert lab.wait(job, timeout=30) == "FAILED"
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
    assert not (checkout / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)  # three jobs of four processes each, 30 s apiece on two busy cores
def test_compile_then_run_then_stop_then_go_on_with_the_readme_s_commands(lab: Lab, checkout: Path) -> None:
    slurm = checkout / "slurm"
    compiled = lab.submit("sbatch", "--nodes", "4", "compile.slurm", "./llama_7b.sh", *TINY, cwd=slurm, **CPU)
    run = ["--nodes", "4", "run.slurm", "./llama_7b.sh", *TINY]
    first = lab.submit(
        "sbatch", f"--dependency=afterok:{compiled}", "--kill-on-invalid-dep=yes", *run, "train.steps=100000",
        cwd=slurm, **CPU,
    )  # fmt: skip
    assert lab.wait(compiled) == "COMPLETED", _log(slurm, "compile.slurm", compiled)
    said = _log(slurm, "compile.slurm", compiled)
    assert re.search(r"step +4/4", said) and "herd: compile caches in " in said
    assert not (slurm / "runs").exists(), "compiling leaves the run's folder alone"

    # The time limit's warning: USR1 to the batch script, in good time. The workers save and end.
    log = slurm / f"run.slurm-{first}.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and re.search(r"step +1\d/", log.read_text())):
        assert lab.state(first) in {"PENDING", "RUNNING", "CONFIGURING"} and time.monotonic() < deadline, (
            _log(slurm, "run.slurm", first) + lab.logs()
        )
        time.sleep(0.1)
    lab.run("scancel", "--batch", "--signal=USR1", first)
    assert lab.wait(first) == "COMPLETED", _log(slurm, "run.slurm", first)
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", _log(slurm, "run.slurm", first))
    assert stopped, _log(slurm, "run.slurm", first)
    last = int(stopped[1])
    assert list((slurm / "runs/llama2_7b_gpu").glob(f"**/step-{last:08d}/herd.json"))

    # The same command goes on from there.
    second = lab.submit("sbatch", *run, f"train.steps={last + 10}", cwd=slurm, **CPU)
    assert lab.wait(second) == "COMPLETED", _log(slurm, "run.slurm", second)
    losses = _scalars(slurm / "runs/llama2_7b_gpu/tensorboard", "reduced_train_loss")
    assert sorted(losses) == list(range(1, last + 11)), "every step is there once"
    assert losses[last + 10] < 0.8 * losses[1]
