"""The lab itself: nodes of their own, that fail as nodes fail, come back, and leave nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
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
    assert lab.run("srun", "-N1", "-w", "node2", "--immediate=20", "hostname").strip() == "node2"
    lab.settle()
    assert lab.state(job) == "CANCELLED"


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
