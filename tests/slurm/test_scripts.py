"""What slurm/node.sh would start, word for word, on each kind of node; and that the scripts are sound shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama.recipe import load
from tests.slurm.conftest import ROOT

JOB = {
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NODEID": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "20008",
    "HERD_ROOT": str(ROOT),
    "HERD_CACHE": "/shared/cache",
}
STARTED = (
    "-m launch.torchrun --nnodes 4 --node-rank 2 --nproc-per-node {ranks} --master-addr node1 "
    "--master-port 20008 --max-restarts 0 -m launch.train"
)
TRAINIUM = {
    "FI_EFA_USE_DEVICE_RDMA": "1",
    "FI_PROVIDER": "efa",
    "HERD_CACHE": "/shared/cache",
    "MALLOC_ARENA_MAX": "128",
    "OMP_NUM_THREADS": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NEURONX_HLO_CACHE_DIR": "/shared/cache/hlo",
    "TORCH_NEURONX_NEFF_CACHE_DIR": "/shared/cache/neff",
    "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": f"/tmp/herd-neff-{os.getuid()}",
}
PLAIN = {
    "HERD_CACHE": "/shared/cache",
    "OMP_NUM_THREADS": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}
GPU = PLAIN | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
# What the caller sets -> ranks on the node, and all that Python then finds in its environment beside the caller's.
KINDS: dict[str, tuple[dict[str, str], int, dict[str, str]]] = {
    "trn2": ({"HERD_NODE_TYPE": "trn2.48xlarge"}, 64, TRAINIUM),
    "trn2_single_cores": ({"HERD_NODE_TYPE": "trn2", "NEURON_LOGICAL_NC_CONFIG": "1"}, 128, TRAINIUM),
    "trn3": ({"HERD_NODE_TYPE": "trn3"}, 64, TRAINIUM),
    "gpu": ({"HERD_NODE_TYPE": "gpu", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 8, GPU),
    "8xH200": ({"HERD_NODE_TYPE": "8xH200", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 8, GPU),
    "gpu_some": ({"HERD_NODE_TYPE": "gpu", "CUDA_VISIBLE_DEVICES": "2,3"}, 2, GPU),
    "cpu": ({"HERD_NODE_TYPE": "cpu", "OMP_NUM_THREADS": "1"}, 1, PLAIN),
    "cpu_ranks": ({"HERD_NODE_TYPE": "cpu", "HERD_RANKS_PER_NODE": "999"}, 999, PLAIN),
    "own_values": (
        {"HERD_NODE_TYPE": "trn2", "FI_PROVIDER": "sockets", "OMP_NUM_THREADS": "4", "HERD_RANKS_PER_NODE": "4"},
        4,
        TRAINIUM | {"FI_PROVIDER": "sockets", "OMP_NUM_THREADS": "4"},
    ),
}
KIND_OF = {"trn2_single_cores": "trn2", "8xH200": "gpu", "gpu_some": "gpu", "cpu_ranks": "cpu", "own_values": "trn2"}
PREFIXES = ("FI_", "NEURON", "TORCH", "PYTORCH", "MALLOC", "OMP", "HERD_CACHE")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Stands where Python is started: writes down its arguments, environment and open-file limit."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\n[ "$2" != launch.node_check ] || exit 0\necho "$@"\nenv | sort\necho "LIMIT=$(ulimit -n)"\n'
    )
    path.chmod(0o755)
    return path


def _node(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "slurm/node.sh", *command],
        env={"PATH": os.environ["PATH"], **JOB, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_starts_torchrun_with_the_ranks_and_the_environment_of_its_kind(kind: str, python: Path) -> None:
    given, ranks, expected = KINDS[kind]
    done = _node("train", "tiny_cpu", "name=a b", HERD_PYTHON=str(python), **given)
    assert done.returncode == 0 and done.stderr == ""
    started, *rest = done.stdout.splitlines()
    assert started == f"{STARTED.format(ranks=ranks)} tiny_cpu name=a b"
    found = dict(line.split("=", 1) for line in rest if "=" in line)
    # FI_EFA_FORK_SAFE depends on the kernel of the machine that runs this test.
    mine = {key: value for key, value in found.items() if key.startswith(PREFIXES) and key != "FI_EFA_FORK_SAFE"}
    mine.pop("NEURON_LOGICAL_NC_CONFIG", None)
    assert mine == expected
    assert found["HERD_RANKS_PER_NODE"] == str(ranks) and found["HERD_NODE_TYPE"] == KIND_OF.get(kind, kind)
    assert found["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert int(found["LIMIT"]) >= min(65535, int(subprocess.check_output(["bash", "-c", "ulimit -H -n"]) or 0))


@pytest.mark.parametrize(("kind", "recipe"), [("trn2", "llama2_7b_trn2"), ("gpu", "llama2_7b_gpu")])
def test_llama_7b_takes_the_recipe_of_the_node_and_overrides_last(kind: str, recipe: str, python: Path) -> None:
    script = str(ROOT / "slurm/llama_7b.sh")
    given = {"HERD_NODE_TYPE": kind, "HERD_RANKS_PER_NODE": "8", "HERD_PYTHON": str(python)}
    started = _node("train", script, "train.steps=4", **given).stdout.splitlines()[0]
    assert started == f"{STARTED.format(ranks=8)} {recipe} data.train={ROOT}/data/llama2/corpus train.steps=4"
    assert load(recipe).train.global_batch_size == 256
    mine = _node("train", script, DATA="/elsewhere/text", **given).stdout.splitlines()[0]
    assert mine.endswith("data.train=/elsewhere/text")


def test_without_a_named_python_the_active_environment_s_is_taken(python: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python.rename(tmp_path / "bin/python")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = _node("tiny_cpu", HERD_NODE_TYPE="cpu", OMP_NUM_THREADS="1", **{variable: str(tmp_path)})
        assert done.stdout.splitlines()[0] == f"{STARTED.format(ranks=1)} tiny_cpu", done.stderr


def _step(step: str, tmp_path: Path, **environment: str) -> str:
    """What job.sh would give to srun for a step, with Slurm's commands standing still."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    says = {
        "scontrol": 'case $2 in hostnames) printf "node1\\nnode2\\n" ;; job) echo " Command=/x/slurm/run.slurm recipe" ;; esac',
        "squeue": "echo 2026-11-22T10:00:00",
        "srun": 'echo "srun $*"',
    }
    for name, text in says.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]", "HERD_ROOT": str(ROOT), **environment}
    script = f'set -euo pipefail; source "$HERD_ROOT/slurm/job.sh"; prepare recipe "a b"; {step} recipe "a b"'
    return subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{tools}:{os.environ['PATH']}", **job}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def test_the_steps_of_a_job_word_for_word(tmp_path: Path) -> None:
    node = f"{ROOT}/slurm/node.sh recipe a b"
    assert _step("on_first open", tmp_path) == (
        f"srun --export=ALL --cpu-bind=none --overlap --nodes=1 --ntasks=1 --nodelist=node1 {node}"
    )
    assert _step("on_all train", tmp_path, SLURM_GPUS_ON_NODE="8") == (
        "srun --export=ALL --cpu-bind=none --gpus-per-node=8 --label --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 "
        f"--wait=60 {node}"
    )


def test_a_container_gets_pyxis_flags_and_any_other_option_its_place(tmp_path: Path) -> None:
    options = {"HERD_CONTAINER": "herd.sqsh", "HERD_SRUN_OPTIONS": "--mpi=none --network=sn_all"}
    here = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path}"
    assert (
        f"--container-image=herd.sqsh --container-workdir={tmp_path} --container-mounts={here} --mpi=none --network=sn_all"
        in _step("on_all train", tmp_path, **options)
    )
    own = _step("on_all train", tmp_path, HERD_CONTAINER="herd.sqsh", HERD_CONTAINER_MOUNTS="/fsx:/fsx")
    assert "--container-mounts=/fsx:/fsx " in own


def test_wrong_use_is_answered_in_one_line() -> None:
    done = _node("train")
    assert done.returncode == 2 and done.stderr == "herd: node.sh takes a recipe: RECIPE [key=value ...]\n"
    done = _node("train", "tiny_cpu", HERD_NODE_TYPE="tpu")
    assert done.returncode != 0
    assert done.stderr == "herd: HERD_NODE_TYPE=tpu is not one of trn2, trn3, gpu, cpu, nor an instance of these\n"
    done = _node("train", "tiny_cpu", HERD_NODE_TYPE="trn1.32xlarge")
    assert done.returncode != 0 and done.stdout == ""
    assert (
        done.stderr.startswith("herd: trn1.32xlarge: Trn1 is not supported: AWS ended") and done.stderr.count("\n") == 1
    )


def test_the_scripts_pass_shellcheck() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}")
    assert program, "shellcheck is not installed: pip install -e .[dev]"
    scripts = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".slurm"))
    scripts += [ROOT / "tests/slurm/lab.sh", ROOT / ".ci/run"]
    done = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
