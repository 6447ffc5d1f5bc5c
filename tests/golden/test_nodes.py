"""The exact command and environment that each kind of node starts with, against tests/golden/nodes.

HERD_REFRESH_GOLDEN=1 pytest tests/golden writes the files anew; read the diff before it is committed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.test_scripts import JOB, PREFIXES, ROOT

FILES = Path(__file__).with_name("nodes")
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
NODES: dict[str, dict[str, str]] = {
    "trn2.48xlarge": {"HERD_NODE_TYPE": "trn2.48xlarge"},
    "trn2.48xlarge-lnc1": {"HERD_NODE_TYPE": "trn2.48xlarge", "NEURON_LOGICAL_NC_CONFIG": "1"},
    "trn3": {"HERD_NODE_TYPE": "trn3"},
    "p4d.24xlarge": {"HERD_NODE_TYPE": "p4d.24xlarge", **GPUS},
    "p5.48xlarge": {"HERD_NODE_TYPE": "p5.48xlarge", **GPUS},
    "cpu": {"HERD_NODE_TYPE": "cpu", "OMP_NUM_THREADS": "4"},
}
MACHINE = ("FI_EFA_FORK_SAFE",)
"""Depends on the kernel of the machine that runs this test; on GPU nodes all of EFA's does, by whether its driver is there."""
OURS = (*PREFIXES, "HERD_NODE_TYPE", "HERD_RANKS_PER_NODE", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")


def _started(given: dict[str, str], tmp_path: Path) -> str:
    """What node.sh would start for a recipe, and what it would find in its environment."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$2" != launch.node_check ] || exit 0\necho python "$@"\nenv\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], **JOB, **given, "HERD_PYTHON": str(python)}
    done = subprocess.run(
        [ROOT / "slurm/node.sh", "train", "RECIPE"], env=environment, capture_output=True, text=True, check=True
    )
    command, *rest = done.stdout.splitlines()
    left_out = MACHINE if given["HERD_NODE_TYPE"].startswith("trn") else (*MACHINE, "FI_")
    lines = sorted(line for line in rest if line.startswith(OURS) and not line.startswith(left_out))
    said = "\n".join([command, *lines]).replace(str(ROOT), "$HERD_ROOT")
    return said.replace(f"herd-neff-{os.getuid()}", "herd-neff-$UID") + "\n"


@pytest.mark.parametrize("name", NODES)
def test_a_node_starts_the_command_and_environment_of_its_golden_file(name: str, tmp_path: Path) -> None:
    started, golden = _started(NODES[name], tmp_path), FILES / f"{name}.txt"
    if os.environ.get("HERD_REFRESH_GOLDEN") == "1":
        golden.write_text(started)
    assert started == golden.read_text(), "see the top of this file for how to refresh it"


def test_every_golden_file_is_of_a_node() -> None:
    assert {path.stem for path in FILES.glob("*.txt")} == set(NODES)


WATCH = """
import json, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            with open(os.environ["SEEN"], "a") as file:
                file.write(json.dumps([sys.orig_argv, dict(os.environ)]) + "\\n")
            if "RANK" in os.environ:
                os._exit(0)

sys.meta_path.insert(0, Watch())
"""
"""A sitecustomize that notes the environment when torch begins to be imported; in a rank it ends there."""


def _imports_of_torch(
    folder: Path, command: list[str | Path], **environment: str
) -> list[tuple[list[str], dict[str, str]]]:
    (folder / "sitecustomize.py").write_text(WATCH)
    given = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": f"{ROOT}:{folder}", "SEEN": str(folder / "seen"),
        **environment,
    }  # fmt: skip
    done = subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in (folder / "seen").read_text().splitlines()]  # type: ignore[misc]


def test_each_rank_of_a_trainium_node_has_its_variables_when_torch_is_imported(tmp_path: Path) -> None:
    """Through node.sh and torchrun as a job calls them: caches and stochastic rounding are read at that moment."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" != launch.node_check ] || exit 0\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = JOB | {
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "HERD_PYTHON": str(python),
        "MASTER_PORT": str(20000 + os.getpid() % 10000), "HERD_NODE_TYPE": "trn2.48xlarge", "HERD_RANKS_PER_NODE": "2",
        "HERD_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    words: list[str | Path] = [ROOT / "slurm/node.sh", "train", "llama3.1_8b_trn2", "train.seed=7"]
    seen = _imports_of_torch(tmp_path, words, **job)
    ranks = {found["RANK"]: found for argv, found in seen if "launch.train" in argv and "RANK" in found}
    assert sorted(ranks) == ["0", "1"]
    for found in ranks.values():
        assert found["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "1" and found["NEURON_RT_STOCHASTIC_ROUNDING_SEED"] == "7"
        assert found["TORCH_NEURONX_NEFF_CACHE_DIR"] == f"{tmp_path}/cache/neff"
        assert found["TORCH_NEURONX_HLO_CACHE_DIR"] == f"{tmp_path}/cache/hlo"
        assert found["TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR"].startswith("/tmp/")
    agents = [found for argv, found in seen if "RANK" not in found]
    assert all(found["TORCH_NEURONX_NEFF_CACHE_DIR"] == f"{tmp_path}/cache/neff" for found in agents)


@pytest.mark.parametrize(("module", "precision", "expected"), [
    ("launch.train", "bf16_mixed", "0"), ("launch.compile", "bf16_sr", "1"),
])  # fmt: skip
def test_rounding_follows_the_recipe_and_compiling_ahead_has_the_same(
    module: str, precision: str, expected: str, tmp_path: Path
) -> None:
    words: list[str | Path] = [
        sys.executable,
        "-m",
        module,
        "tiny_cpu",
        f"train.precision={precision}",
        "train.compile=true",
    ]
    seen: Any = _imports_of_torch(tmp_path, words, RANK="0", WORLD_SIZE="1")
    assert seen[-1][1]["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == expected
