"""A node that cannot train says so before torchrun starts, in a line and in the run folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import node_check
from llama.run_folder import RunFolder, write_json

ROOT = Path(__file__).resolve().parents[3]
START = [sys.executable, "-m", "launch.node_check"]


def _check(start: list[str] = START, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HERD_", "SLURM", "MASTER_"))}
    given = inherited | {"PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "node3", "SLURM_NODEID": "2"} | environment
    return subprocess.run(start, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60, check=False)


def _on(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"HERD_RUN": str(tmp_path), "HERD_ATTEMPT": "3", **more}


def test_a_node_that_is_well_says_nothing_leaves_nothing_and_does_not_load_torch(tmp_path: Path) -> None:
    given = _on(tmp_path, HERD_CACHE=str(tmp_path), MASTER_ADDR="localhost", HERD_RANKS_PER_NODE="2")
    started = time.perf_counter()
    done = _check(**given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.perf_counter() - started < 2  # 0.1 s; importing torch takes 2 s and more
    assert list(tmp_path.iterdir()) == []
    done = _check([sys.executable, "-c", "import sys, launch.node_check; print('torch' in sys.modules)"], **given)
    assert done.stdout == "False\n"


def test_each_fault_is_named_at_once_and_left_in_the_run_folder_under_slurms_name(tmp_path: Path) -> None:
    done = _check(**_on(tmp_path, HERD_CACHE="/nowhere", MASTER_ADDR="no.such.node.invalid", TMPDIR="/nowhere/tmp"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("herd: node node3 cannot train: compile cache /nowhere is not there")
    assert "/nowhere/tmp is not there" in done.stderr and "no.such.node.invalid is not known here" in done.stderr
    (word,) = RunFolder(tmp_path).last_words(3)
    assert (word.kind, word.nodes, word.rank) == ("node", ("node3",), 90002)
    assert f"herd: node node3 cannot train: {word.text}\n" == done.stderr


def test_a_run_folder_that_the_node_does_not_see_is_named(tmp_path: Path) -> None:
    done = _check(**_on(tmp_path / "away"))
    assert done.returncode == 1 and f"run folder {tmp_path / 'away'} is not there" in done.stderr


def test_a_python_that_is_too_old_is_told_though_it_cannot_read_our_code(tmp_path: Path) -> None:
    old = "import sys, runpy; sys.version_info = (3, 9, 2); runpy.run_module('launch.node_check', run_name='__main__')"
    done = _check([sys.executable, "-c", old], **_on(tmp_path))
    assert done.returncode == 1 and "older than 3.11" in done.stderr and "Traceback" not in done.stderr
    (word,) = RunFolder(tmp_path).last_words(3)
    assert (word.kind, word.nodes) == ("node", ("node3",))


def test_a_python_without_torch_is_told(tmp_path: Path) -> None:
    main = "from launch.node_check import main; sys.exit(main())"
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {main}"]
    done = _check(bare, **_on(tmp_path))
    assert done.returncode == 1 and f"{sys.executable} finds no torch, numpy, pydantic" in done.stderr
    assert RunFolder(tmp_path).last_words(3)[0].nodes == ("node3",)


@pytest.mark.parametrize(
    ("kind", "ranks", "more", "there", "lost"),
    [
        ("gpu", 8, {}, 8, ""),
        ("gpu", 8, {}, 7, "7 of 8 devices"),
        ("gpu", 7, {"SLURM_GPUS_ON_NODE": "8"}, 7, "7 of 8 devices"),
        ("trn2", 64, {}, 16, ""),
        ("trn2", 64, {}, 15, "15 of 16 devices"),
        ("trn2", 128, {"NEURON_LOGICAL_NC_CONFIG": "1"}, 16, ""),
        ("trn1", 32, {}, 16, ""),
        ("cpu", 4, {}, 0, ""),
    ],
)
def test_devices_are_counted(
    kind: str, ranks: int, more: dict[str, str], there: int, lost: str, tmp_path: Path
) -> None:
    for i in range(there):
        (tmp_path / f"{'nvidia' if kind == 'gpu' else 'neuron'}{i}").touch()
    (tmp_path / "nvidiactl").touch()
    given = {"HERD_NODE_TYPE": kind, "HERD_RANKS_PER_NODE": str(ranks), **more}
    told = node_check.missing_devices(given, tmp_path)
    assert (lost in told[0]) if lost else told == []


def test_of_nodes_that_count_different_devices_the_one_with_fewer_is_at_fault(tmp_path: Path) -> None:
    write_json(RunFolder(tmp_path).job, {"job": "12", "nodes": ["node1", "node3"], "ranks_per_node": 8})
    given = _on(tmp_path, SLURM_JOB_ID="12")
    assert _check(**given, HERD_RANKS_PER_NODE="8").returncode == 0
    done = _check(**given, HERD_RANKS_PER_NODE="7")
    assert done.stderr == "herd: node node3 cannot train: room for 7 ranks where others have 8\n"
    done = _check(**given, HERD_RANKS_PER_NODE="9")
    assert done.stderr == "herd: node node1 cannot train: room for 8 ranks where others have 9\n"
    assert RunFolder(tmp_path).last_words(3)[0].nodes == ("node1",)
    assert _check(**given | {"SLURM_JOB_ID": "13"}, HERD_RANKS_PER_NODE="7").returncode == 0  # another job's record


def test_a_full_disk_is_the_users_since_it_is_full_for_all_nodes(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=2", "tmpfs", disk], check=True)
    try:
        (disk / "one").touch()
        done = _check(**_on(tmp_path, HERD_CACHE=str(disk)))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    (word,) = RunFolder(tmp_path).last_words(3)
    assert (word.kind, word.nodes) == ("user", ())


def test_disks_that_do_not_answer_are_told(tmp_path: Path) -> None:
    """A fifo nobody writes to stands for the dead file server: opening it blocks for ever."""
    os.mkfifo(tmp_path / "fifo")
    hang = (
        "import sys; from pathlib import Path; from launch import node_check; node_check.PATIENCE = 0.2; "
        "node_check.node.unwritable = lambda folder: Path(folder, 'fifo').read_bytes(); sys.exit(node_check.main())"
    )
    done = _check([sys.executable, "-c", hang], **_on(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("herd: node node3 cannot train: its disks do not answer")
