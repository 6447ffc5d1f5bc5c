"""The lab itself: nodes of their own, that fail as nodes fail, come back, and leave nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Lab, shared_folders

NODES = ["node1", "node2", "node3", "node4", "node5"]
RANK = r"^\S*/sleep 1000"


def test_the_lab_has_five_idle_nodes_each_with_its_own_tmp_and_all_with_the_shared_folders(
    lab: Lab, shared: Path
) -> None:
    lab.settle()
    assert lab.run("sinfo", "-h", "-o", "%P %D %t").splitlines() == ["main* 5 idle", "urgent 5 idle"]
    lab.run("srun", "-N5", "bash", "-c", "hostname >/tmp/own")
    assert sorted(lab.run("srun", "-N5", "cat", "/tmp/own").split()) == NODES
    (shared / "seen").touch()
    for path in (*shared_folders(), shared / "seen"):
        lab.run("srun", "-N5", "test", "-e", path)


@pytest.mark.slow
def test_a_killed_node_leaves_nothing_its_job_goes_on_with_a_spare_and_it_comes_back(lab: Lab, shared: Path) -> None:
    lab.settle()
    # A script that ends when srun does, before Slurm knows of the node, would count as FAILED and stay so.
    job = lab.submit("sbatch", "-N4", "--requeue", "--wrap", "srun sleep 1000; sleep 1000", cwd=shared)
    assert lab.wait_running(job) == NODES[:4]
    until = time.monotonic() + 10
    while not lab.pids("node2", RANK) and time.monotonic() < until:
        time.sleep(0.05)
    assert lab.pids("node2", RANK)
    space = (lab.folder / "node2.space").read_text().strip()
    lab.kill("node2")
    assert not lab.alive("node2") and space not in _spaces("pid")
    with pytest.raises(AssertionError, match="node2 is off"):
        lab.run("true", node="node2")
    assert lab.wait_running(job, restarts=1) == ["node1", "node3", "node4", "node5"]
    assert "port2" not in lab.run("ls", "/sys/class/net"), "its cable went with it"
    lab.start("node2")
    assert lab.run("srun", "-N1", "-w", "node2", "--immediate=20", "hostname", cwd=shared).strip() == "node2"
    lab.run("srun", "-N1", "-w", "node2", "test", "-e", shared, cwd=shared)  # as before, though it is under /tmp
    lab.settle()
    assert lab.state(job) == "CANCELLED"


def test_a_node_set_down_stays_down_and_its_job_goes_on_with_a_spare(lab: Lab, shared: Path) -> None:
    lab.settle()
    job = lab.submit("sbatch", "-N4", "--requeue", "--wrap", "sleep 1000", cwd=shared)
    assert lab.wait_running(job) == NODES[:4]
    lab.down("node3", "its fan")
    assert lab.wait_running(job, restarts=1) == ["node1", "node2", "node4", "node5"]
    assert lab.run("sinfo", "-h", "-p", "main", "-N", "-t", "down", "-o", "%N %E").strip() == "node3 its fan"
    lab.settle()


def test_a_job_of_the_urgent_partition_sends_one_of_main_back_to_the_queue(lab: Lab, shared: Path) -> None:
    lab.settle()
    common = lab.submit("sbatch", "-N4", "--exclusive", "--requeue", "--wrap", "srun sleep 1000", cwd=shared)
    lab.wait_running(common)
    urgent = lab.submit("sbatch", "-N3", "--exclusive", "-p", "urgent", "--wrap", "true", cwd=shared)
    assert lab.wait(urgent) == "COMPLETED"
    lab.wait_running(common, restarts=1)
    lab.settle()


def test_a_rank_is_killed_and_stopped_by_its_number(lab: Lab, shared: Path) -> None:
    lab.settle()
    job = lab.submit("sbatch", "-N2", "--wrap", "srun --kill-on-bad-exit=0 sleep 1000", cwd=shared)
    lab.wait_running(job)
    until = time.monotonic() + 10
    while len([node for node in NODES[:2] if lab.pids(node, RANK)]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    (first,), (second,) = (lab.pids(node, RANK) for node in NODES[:2])
    lab.signal("node1", first)
    lab.signal("node2", second, signal.SIGSTOP)
    assert lab.run("ps", "-C", "sleep", "-o", "state=", node="node2").split() == ["S", "T"], "the node's own and ours"
    with pytest.raises(AssertionError, match="not on node1"):
        lab.signal("node1", second)
    while lab.pids("node1", RANK):
        time.sleep(0.05)
    lab.signal("node2", second, signal.SIGCONT)
    lab.settle()


def test_a_small_disk_is_seen_by_all_nodes_fills_up_and_goes(lab: Lab) -> None:
    lab.settle()
    with lab.disk("small", "1m") as disk:
        lab.run("srun", "-N2", "bash", "-c", f"hostname >{disk}/$SLURM_NODEID")
        assert (lab.outside(disk) / "1").read_text().strip() == "node2"
        fill = ["dd", "if=/dev/zero", f"of={disk}/full", "bs=1M", "count=2"]
        with pytest.raises(AssertionError, match="No space left"):
            lab.run(*fill, node="node3")
        lab.remount(disk, "size=3m")
        lab.run(*fill, node="node3")
        lab.remount(disk, "ro")
        with pytest.raises(AssertionError, match="Read-only file system"):
            lab.run("touch", disk / "new", node="node4")
        lab.kill("node5")
        lab.start("node5")
        lab.run("test", "-e", disk / "full", node="node5")
    for node in ("head", *NODES):
        assert str(disk) + " " not in lab.run("cat", "/proc/mounts", node=node)
    lab.settle()


def test_the_lab_settles_whatever_was_done_to_it(lab: Lab, shared: Path) -> None:
    lab.submit("sbatch", "-N3", "--requeue", "--wrap", "trap '' TERM; while :; do sleep 1; done", cwd=shared)
    lab.submit("sbatch", "-N5", "--hold", "--wrap", "true", cwd=shared)
    lab.kill("node4", silent=True)
    lab.down("node2")
    lab.run("scontrol", "update", "nodename=node3", "state=drain", "reason=x")
    lab.settle()
    assert lab.idle() == set(NODES) and not lab.run("squeue", "-h")
    assert sorted(lab.run("srun", "-N5", "hostname").split()) == NODES


def _spaces(kind: str) -> set[str]:
    """Namespaces of this kind that a process lives in."""
    living = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            living.add(str((process / "ns" / kind).readlink()))
    return living


def _interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_a_lab_that_is_left_leaves_no_process_no_interface_no_mount_and_no_folder(lab: Lab, shared: Path) -> None:
    before = _interfaces(), Path("/proc/mounts").read_text()
    with Lab(1, shared_folders(shared)) as small:
        inside = int((small.folder / "head.pid").read_text())
        small.run("sbatch", "--wrap", "sleep 1000", cwd=shared)
        network, processes = (str((Path("/proc") / str(inside) / "ns" / kind).readlink()) for kind in ("net", "pid"))
        with small.disk("left"), contextlib.suppress(AssertionError):
            assert before == (_interfaces(), Path("/proc/mounts").read_text()), "all of it is in the head's own spaces"
    assert network not in _spaces("net") and processes not in _spaces("pid")
    assert not small.folder.exists() and not list(Path("/proc").glob(f"{inside}/ns/net"))


def test_tests_that_are_killed_take_their_lab_along(lab: Lab, shared: Path) -> None:
    code = (
        "from tests.slurm.conftest import Lab, shared_folders; import time; l = Lab(1, shared_folders()).__enter__(); "
        "print((l.folder / 'head.pid').read_text().strip(), l.folder, flush=True); time.sleep(100)"
    )
    victim = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    head, folder = victim.stdout.readline().split()
    space = str(Path(f"/proc/{head}/ns/pid").readlink())
    assert space in _spaces("pid")
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    until = time.monotonic() + 20
    while space in _spaces("pid"):
        assert time.monotonic() < until, f"{folder} lives on"
        time.sleep(0.1)
    while Path(folder).exists():
        assert time.monotonic() < until, f"{folder} is still there"
        time.sleep(0.1)


def _herd(*words: str, cwd: Path, lab: Path, code: int = 0, stdin: str = "") -> str:
    """What `herd lab ...` says, with a lab in a place of the test's own."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HERD_", "SLURM_", "OMP_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "lab", *words], cwd=cwd, input=stdin, capture_output=True, text=True,
        env=environment | {"HERD_LAB": str(lab), "PYTHONPATH": str(ROOT)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def place(lab: Lab, shared: Path) -> Iterator[Path]:
    """Where a test may have a lab as people have it; none is left there. `lab` has seen to Slurm."""
    folder = Path(tempfile.mkdtemp(prefix="herd-lab-place-", dir="/var/tmp"))
    yield folder / "lab"
    _herd("down", cwd=shared, lab=folder / "lab")
    folder.rmdir()


def test_herd_lab_starts_a_slurm_that_stays_runs_what_is_typed_and_goes_without_a_trace(
    place: Path, shared: Path
) -> None:
    before = _interfaces(), Path("/proc/mounts").read_text()
    assert "no lab is up" in _herd("down", cwd=shared, lab=place)
    assert "herd lab up starts one" in _herd("status", cwd=shared, lab=place, code=2)
    said = _herd("up", "--nodes", "2", cwd=shared, lab=place)
    assert "Slurm is up with 2 nodes" in said and "sbatch --nodes 2" in said
    assert "is up already" in _herd("up", cwd=shared, lab=place)
    space = str(Path(f"/proc/{(place / 'head.pid').read_text().strip()}/ns/pid").readlink())
    assert space in _spaces("pid")

    # A user's words as they are, options too; a shell's; and the job's environment is that of nodes without devices.
    wrap = "srun bash -c \"hostname; \\$HERD_PYTHON -c 'print(2 + 3)'; echo \\$HERD_NODE_TYPE\" >said"
    _herd("exec", "sbatch", "--nodes", "2", "--wrap", wrap, cwd=shared, lab=place)
    until = time.monotonic() + 20
    while not (shared / "said").exists() or len((shared / "said").read_text().split()) < 6:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert sorted((shared / "said").read_text().split()) == ["5", "5", "cpu", "cpu", "node1", "node2"]
    assert _herd("exec", "--node", "node2", "hostname", cwd=shared, lab=place) == "node2\n"
    _herd("exec", "--", "bash", "-c", "exit 7", cwd=shared, lab=place, code=7)
    said = _herd("shell", cwd=shared, lab=place, stdin="hostname; pwd; sinfo -h -p main -o %D; herd lab status; true\n")
    assert said.split()[:3] == ["head", str(shared), "2"] and "inside the lab" in said
    _herd("exec", "sbatch", "--exclusive", "--wrap", "sleep 1000", cwd=shared, lab=place)
    assert "node[1-2]" in (said := _herd("status", cwd=shared, lab=place)) and "wrap" in said

    assert "no node 'node3'" in _herd("exec", "--node", "node3", "true", cwd=shared, lab=place, code=2)
    with tempfile.TemporaryDirectory(dir="/tmp") as hidden:
        assert f"do not see {hidden}" in _herd("shell", cwd=Path(hidden), lab=place, code=2)

    assert _herd("down", cwd=shared, lab=place) == ""
    assert space not in _spaces("pid") and not place.exists()
    assert before == (_interfaces(), Path("/proc/mounts").read_text())
    assert "no lab is up" in _herd("down", cwd=shared, lab=place)


def test_a_lab_that_died_is_known_to_be_dead_and_its_place_is_used_again(place: Path, shared: Path) -> None:
    _herd("up", "--nodes", "1", cwd=shared, lab=place)
    os.kill(int((place / "head.pid").read_text()), signal.SIGKILL)
    until = time.monotonic() + 10
    while "no lab is up" not in _herd("status", cwd=shared, lab=place, code=2):
        assert time.monotonic() < until
    assert (place / "ready").exists(), "as a power failure leaves it"
    assert "Slurm is up with 1 nodes" in _herd("up", "--nodes", "1", cwd=shared, lab=place)
    os.kill(int((place / "head.pid").read_text()), signal.SIGKILL)
    _herd("down", cwd=shared, lab=place)
    assert not place.exists()
