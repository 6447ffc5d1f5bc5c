"""Time to the first step, cold against warm: what `herd compile` before a run saves.

    python benchmarks/compile_ahead.py --rounds 3

In each round, on an empty disk as of a fresh node each time: `herd train` on an empty cache, `herd compile` on another,
`herd train` on what that left, and one without train.compile. A time is from the command's start until its first step
is done, by the step's own line. Writes benchmarks/results/compile_ahead-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data_prep.indexed import IndexedWriter  # noqa: E402

RECIPE, SEQUENCE = "tiny_cpu", 256
COUNTS = re.compile(r"Total graphs: (\d+) / compiled: (\d+) / cached: (\d+) / failed: (\d+)")


def write_tokens(prefix: Path, vocabulary: int = 4096) -> None:
    """Random tokens: what is trained on does not matter here."""
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in np.random.RandomState(0).randint(0, vocabulary, (2000, SEQUENCE)):
            writer.add_document(document)


def call(verb: str, work: Path, cache: Path, words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One command on an empty disk; seconds until its first step was done and until its end, and what it said."""
    with tempfile.TemporaryDirectory(dir=work) as disk:
        command = [sys.executable, "-m", "launch.cli", verb, RECIPE, "--processes", str(options.processes)]
        command += [
            f"data.train={work / 'tokens'}", "train.steps=2", "validation.interval=2", "validation.batches=1",
            f"run_dir={disk}/run", "log.tensorboard=false", "checkpoint.at_end=false", *words,
        ]  # fmt: skip
        # TMPDIR holds what the compilers keep by themselves, such as precompiled headers.
        environment = os.environ | {"HERD_CACHE": str(cache), "TMPDIR": disk, "PYTHONPATH": str(HERE.parent)}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        started, first, said = time.monotonic(), None, []
        with subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.rstrip())
                if first is None and line.startswith("step 1/"):
                    first = time.monotonic() - started
        if process.returncode or first is None:
            raise SystemExit("\n".join(said))
        found = next((line.removeprefix("compile cache ") for line in said if line.startswith("compile cache")), None)
        counts = next((list(map(int, match.groups())) for line in said if (match := COUNTS.search(line))), None)
        return {"first_step": first, "all": time.monotonic() - started, "found": found, "graphs": counts}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()

    import torch

    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="herd-compile-ahead-") as folder:
        work = Path(folder)
        write_tokens(work / "tokens")
        for number in range(options.rounds):
            cold, ahead, on = work / f"cold{number}", work / f"ahead{number}", ["train.compile=true"]
            row = {
                "cold": call("train", work, cold, on, options),
                "compile": call("compile", work, ahead, on, options),
                "warm": call("train", work, ahead, on, options),
                "not_compiled": call("train", work, cold, ["train.compile=false"], options),
            }
            assert row["cold"]["found"].startswith("cold") and row["warm"]["found"].startswith("warm"), row
            rounds.append(row)
            print(json.dumps(row, indent=1), flush=True)
    median = {side: statistics.median(row[side]["first_step"] for row in rounds) for side in rounds[0]}
    print("seconds to the first step, median:", ", ".join(f"{side} {value:.1f}" for side, value in median.items()))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = "CPU" if device is None else torch.get_device_module(device.type).get_device_name()
    machine = {
        "device": name, "cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "load": os.getloadavg()[0],
    }  # fmt: skip
    to = options.to or HERE / "results" / f"compile_ahead-{name.replace(' ', '_')}.json"
    to.parent.mkdir(parents=True, exist_ok=True)
    results = {"recipe": RECIPE, "processes": options.processes, "median_first_step": median, "rounds": rounds}
    to.write_text(json.dumps({"machine": machine, "command": sys.argv, "results": results}, indent=1) + "\n")
    print(f"written to {to}")


if __name__ == "__main__":
    main()
