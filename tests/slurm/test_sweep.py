"""`herd sweep --slurm` on a real Slurm: an array, a task a point, and the table afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import yaml

from data_prep.indexed import IndexedWriter
from llama.run_folder import read_json
from tests.slurm.conftest import ROOT, Lab
from tests.slurm.test_person import CPU, TINY


def test_points_are_tasks_of_an_array_and_the_table_follows(lab: Lab, shared: Path) -> None:
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

    said = herd("--slurm").split()
    array, table = (int(said[said.index(word) + 1].strip(":;")) for word in ("array", "job"))
    assert f"in the queue already, task {array}_1" in herd("--slurm")
    assert lab.wait(table) == "COMPLETED"
    rows = json.loads((desk / "runs/tiny-sweep/table.json").read_text())["rows"]
    assert {row["state"] for row in rows} == {"finished"} and len(rows) == 2
    jobs = {read_json(desk / row["run"] / "job.json")["job"] for row in rows}
    assert len(jobs) == 2 and str(array) in jobs  # one task bears the array's number
    assert "finished already" in herd("--slurm")
