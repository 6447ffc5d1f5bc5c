"""herd doctor over the nodes of a real Slurm: from the login node, and in a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.slurm.conftest import ROOT, Lab

DOCTOR = f"{sys.executable} -m launch.cli doctor --quick --run-dir /tmp/odd"


def test_the_odd_node_is_named(lab: Lab, shared: Path) -> None:
    lab.settle()
    for name in ("node1", "node2", "node3"):
        lab.run("mkdir", "-p", "/tmp/odd", node=name)
    lab.run("mount", "-t", "tmpfs", "-o", "ro", "none", "/tmp/odd", node="node2")
    try:
        found = json.loads(lab.run("bash", "-c", f"{DOCTOR} --nodes 3 --json; test $? = 1", cwd=ROOT))
        assert [each["node"] for each in found["nodes"]] == ["node1", "node2", "node3"]
        assert {each["same"]["Slurm"] for each in found["nodes"]} != {""}
        bad = [each for each in found["findings"] if each["level"] == "bad"]
        assert [(each["node"], each["text"]) for each in bad] == [
            ("node2", "run folder: /tmp/odd cannot be written: Read-only file system")
        ]
    finally:
        lab.run("umount", "/tmp/odd", node="node2")
    job = lab.submit("sbatch", "-N3", "-o", shared / "doctor.log", "--wrap", DOCTOR, cwd=ROOT)
    assert lab.wait(job) == "COMPLETED"
    said = (shared / "doctor.log").read_text().splitlines()
    assert said[0] == "3 nodes: node1, node2, node3" and said[-1].startswith("fit"), said
