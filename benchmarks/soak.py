"""What faults cost a run on a real Slurm of five virtual nodes: steps done again and seconds until training goes on.

python benchmarks/soak.py [--faults 50] [--seed 7] [--json FILE] trains one small Llama twice on two nodes, once left
alone and once disturbed in every way of tests/slurm/faults.py, compares the last checkpoints bit by bit, and prints each
kind of fault with its seconds (median, worst) and steps. Needs root and Debian's Slurm, which it does not install. The
seconds are those of this machine: starting Python twice on each node, which share its cores, is most of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the lab is the tests'

from data_prep.indexed import IndexedWriter  # noqa: E402
from tests.slurm.conftest import Lab, shared_folders  # noqa: E402
from tests.slurm.faults import RECIPE, Disturbed, disturb, final_files  # noqa: E402

CPU = {"HERD_NODE_TYPE": "cpu", "HERD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
STEPS_A_FAULT = 8
"""Long enough a run that it is not done before the last fault."""


def prepare(folder: Path) -> None:
    """Tokens and a recipe."""
    (folder / "soak.yaml").write_text(RECIPE)
    with IndexedWriter(folder / "corpus", np.uint16) as corpus:
        for length in range(20, 320):
            corpus.add_document(np.arange(length) % 97 + 3)


def measure(lab: Lab, folder: Path, faults: int, seed: int) -> dict[str, object]:
    """Run both and compare."""
    steps = max(40, faults * STEPS_A_FAULT)
    script, words = ROOT / "slurm/run.slurm", ["soak.yaml", f"train.steps={steps}"]
    began = time.monotonic()
    alone = Disturbed(lab, folder, words, CPU, script, run_dir="runs/alone").submit()
    assert alone.ends(600) == "COMPLETED", alone.log()
    undisturbed = time.monotonic() - began

    began = time.monotonic()
    run = Disturbed(lab, folder, words, CPU, script, run_dir="runs/disturbed").submit()
    for hit in disturb(run, seed, faults, spread=True):
        print(f"{len(run.hits):3d} {hit.fault} at step {hit.step}", flush=True)
    assert run.ends(600) == "COMPLETED", run.log()
    disturbed = time.monotonic() - began
    table = {}
    for fault in sorted({hit.fault for hit in run.hits}):
        hits = [hit for hit in run.hits if hit.fault == fault]
        seconds, redone = [hit.seconds for hit in hits], [hit.redone for hit in hits]
        table[fault] = {
            "times": len(hits),
            "seconds_median": round(statistics.median(seconds), 1),
            "seconds_worst": round(max(seconds), 1),
            "steps_redone_median": statistics.median(redone),
            "steps_redone_worst": max(redone),
        }
    return {
        "faults": len(run.hits),
        "seed": seed,
        "steps": steps,
        "checkpoint_interval": 5,
        "same_weights": final_files(run.run.path) == final_files(alone.run.path),
        "steps_redone": sum(hit.redone for hit in run.hits),
        "seconds_undisturbed": round(undisturbed, 1),
        "seconds_disturbed": round(disturbed, 1),
        "seconds_median": round(statistics.median(hit.seconds for hit in run.hits), 1),
        "seconds_worst": round(max(hit.seconds for hit in run.hits), 1),
        "by_fault": table,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="herd-soak-", dir="/var/tmp"))
    try:
        prepare(folder)
        with Lab(5, shared_folders(folder)) as lab:
            figures = measure(lab, folder, options.faults, options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, 5 virtual nodes", **figures}
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if figures["same_weights"] else 1)


if __name__ == "__main__":
    main()
