"""`herd sweep --slurm` on a real Slurm: a job a point, as many at once as asked, and the table afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import yaml

from data_prep.indexed import IndexedWriter
from tests.slurm.conftest import ROOT, Lab
from tests.slurm.test_person import CPU, TINY


def test_points_are_jobs_that_run_in_turn_and_the_table_follows(lab: Lab, shared: Path) -> None:
    desk = shared / "sweep"
    desk.mkdir()
    with IndexedWriter(desk / "corpus", np.uint16) as corpus:
        for length in range(20, 120):
            corpus.add_document(np.arange(length) % 97 + 3)
    (desk / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    settings = CPU | {"PYTHONPATH": str(ROOT), "HERD_CACHE": str(desk / "cache"), "COLUMNS": "200"}

    def herd(*words: str) -> str:
        call = [
            sys.executable,
            "-m",
            "launch.cli",
            "sweep",
            "tiny.yaml",
            "optimizer.lr=1e-3,1e-2",
            "train.steps=3",
            *words,
        ]
        return lab.run(*call, cwd=desk, timeout=120, **settings)

    dry = herd("--slurm", "--at-once", "1", "--dry-run").splitlines()
    assert len(dry) == 3 and all("--dependency=singleton" in line for line in dry[1:])
    said = herd("--slurm", "--at-once", "1")
    jobs = [int(line.rpartition(" ")[2]) for line in said.splitlines() if ": job " in line]
    assert len(jobs) == 2
    waiting = lab.run("squeue", "-h", "-j", jobs[1], "-o", "%T %r").split()
    assert waiting == ["PENDING", "Dependency"]
    assert [lab.wait(job) for job in jobs] == ["COMPLETED", "COMPLETED"]
    table = json.loads(herd("--table", "--json"))
    assert {row["state"] for row in table["rows"]} == {"finished"} and len(table["rows"]) == 2
    assert "finished already" in herd("--slurm")
