"""herd prep on the lab: an array of nodes that share the work, one of which is killed midway, then the merge."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from data_prep.demo_text import train_tokenizer, write_demo_text
from data_prep.tokenize import Options, tokenize
from tests.slurm.conftest import ROOT, Lab

CPU = {"HERD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HERD_CLAIM_SECONDS": "6", "HERD_ROOT": str(ROOT)}


def test_an_array_that_loses_a_node_gives_the_bytes_of_one_machine(lab: Lab, shared: Path) -> None:
    folder = shared / "prep"
    folder.mkdir()
    text = write_demo_text(folder, megabytes=4)
    model = train_tokenizer(text, folder / "tokenizer.model", vocab_size=800)
    wanted = tokenize([text], model, folder / "alone", Options(workers=1))
    lab.settle()
    asked = ["tokenize", text, "--tokenizer", model, "--output", folder / "out", "--part-size", "64K", "--workers", "1"]
    script = ROOT / "slurm/prep.slurm"
    job = lab.submit("sbatch", "--array", "0-3", script, *asked, "--engine", "official", cwd=folder, **CPU)
    after = ["--dependency", f"afterok:{job}"]
    merge = lab.submit(
        "sbatch", *after, script, "merge", folder / "out.parts", "--output", folder / "out", cwd=folder, **CPU
    )
    done, deadline = set[Path](), time.monotonic() + 90
    while len(done) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
        done = set((folder / "out.parts").glob("text-*.json"))
    node = lab.run("squeue", "-h", "-j", f"{job}_2", "-o", "%N").strip()
    assert node and len(done) < len(list((folder / "out.parts").glob("*.claim"))) + 60, "too late to kill a node midway"
    lab.kill(node)
    try:
        assert lab.wait(merge, 180) == "COMPLETED", _logs(folder)
    finally:
        lab.start(node)
    assert lab.restarts(f"{job}_2") >= 1, "the node that was killed had no part in it"
    for ending in ("bin", "idx"):
        assert (folder / f"out.{ending}").read_bytes() == (folder / f"alone.{ending}").read_bytes()
    meta = json.loads((folder / "out.meta.json").read_text())
    assert meta["documents"] == wanted["documents"] and meta["tokens"] == wanted["tokens"]
    hosts = {json.loads(path.read_text())["host"] for path in (folder / "out.parts").glob("text-*.json")}
    assert len(hosts) >= 3, hosts


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in folder.glob("prep.slurm-*.log"))
