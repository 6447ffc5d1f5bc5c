"""Seconds and memory of merging at 1, 4 and 16 times the size: time follows the bytes, memory stays where it is.

python benchmarks/merge_scale.py [--to FILE] merges, each in a process of its own:

- sparse: up to 51 GB in 64 sets, whose data are holes but for the documents' ends, and whose index is real (26 million
  sequences): what the plan of a large job costs, without its disk;
- dense: up to 2 GB of real bytes in 128 sets: what copying costs;
- many: up to 20,000 sets of a few kilobytes.

A set is made once and named many times. Beside each merge of real bytes stands a plain copy of as many, synced as the
merge is, and `verify` of the result.
Writes benchmarks/results/merge_scale-CPU.json; needs 3 GB of disk for some seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SCALES = (1, 4, 16)
JOBS = {  # sets at scale 1, sequences of a set, tokens of a sequence, whether the data are holes
    "sparse": (4, 400_000, 1000, True),
    "dense": (8, 8_000, 1000, False),
    "many": (1250, 4, 500, False),
}

# Run by itself, so that the peak is its own: action, prefix, output, number of sets, threads.
CHILD = """
import json, os, re, sys, time
from pathlib import Path
action, prefix, output, sets, workers = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
from data_prep.merge import merge
from data_prep.verify import verify
# Not getrusage's ru_maxrss, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
if action == "merge":
    merge([prefix] * sets, output, workers=workers, meta={"vocab_size": 32000, "eod": 2, "append_eod": True})
elif action == "verify":
    assert verify(output, workers=workers).ok
else:
    with open(output + ".bin", "wb", buffering=0) as target:
        for _ in range(sets):
            with open(prefix + ".bin", "rb", buffering=0) as source:
                while block := source.read(1 << 22):
                    target.write(block)
        os.fsync(target.fileno())
print(json.dumps({
    "seconds": round(time.perf_counter() - start, 3), "cpu_seconds": round(time.process_time() - cpu, 2),
    "peak_mb": peak(), "peak_of_imports_mb": before,
}))
"""


def make_set(prefix: Path, sequences: int, tokens: int, holes: bool) -> None:
    """A set of equal documents; with holes, only each page that holds a document's end takes disk."""
    from data_prep.indexed import IndexedWriter

    random = np.random.default_rng(1)
    with IndexedWriter(prefix, np.uint16) as writer:
        if holes:
            writer._lengths.extend([tokens] * sequences)
            writer._documents.extend(range(1, sequences + 1))
            writer.tokens = tokens * sequences
            assert writer._bin is not None
            writer._bin.truncate(2 * writer.tokens)
            return
        for start in range(0, sequences, 1000):
            count = min(1000, sequences - start)
            ids = random.integers(3, 32000, (count, tokens)).astype(np.uint16)
            ids[:, -1] = 2
            writer.add_documents(ids.reshape(-1), [tokens] * count)


def child(action: str, prefix: Path, output: Path, sets: int, workers: int) -> dict[str, Any]:
    words = [sys.executable, "-c", CHILD, action, str(prefix), str(output), str(sets), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", type=Path, default=HERE / "results" / "merge_scale-CPU.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="Where to work; a temporary folder when not given.")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge-scale-") as name:
        folder = Path(name)
        for job, (sets, sequences, tokens, holes) in JOBS.items():
            prefix = folder / job
            make_set(prefix, sequences, tokens, holes)
            rows = []
            for scale in SCALES:
                output = folder / "out"
                row: dict[str, Any] = {"sets": sets * scale, "bytes": 2 * sequences * tokens * sets * scale}
                row["sequences"] = sequences * sets * scale
                # What is read in holes has no document ends, and would take disk when copied plainly.
                for action in ("merge",) if holes else ("copy", "merge", "verify"):
                    if action == "merge":
                        for path in folder.glob("out*"):
                            path.unlink()
                    row[action] = child(action, prefix, output, sets * scale, options.workers)
                rows.append(row)
                print(job, json.dumps(row), flush=True)
                for path in folder.glob("out*"):
                    path.unlink()
            first, last = rows[0], rows[-1]
            ratio = last["merge"]["seconds"] / first["merge"]["seconds"]
            results[job] = {"rows": rows, "size_x": SCALES[-1] // SCALES[0], "merge_seconds_x": round(ratio, 2)}
            results[job]["peak_growth_mb"] = last["merge"]["peak_mb"] - first["merge"]["peak_mb"]
    machine = {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.release(),
        "numpy": np.__version__,
    }
    report = {"machine": machine, "command": sys.argv, "workers": options.workers, "results": results}
    options.to.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.to}")


if __name__ == "__main__":
    main()
