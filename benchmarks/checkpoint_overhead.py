"""What saving checkpoints adds to a step: none, in the background, and while training waits; side by side.

python benchmarks/checkpoint_overhead.py [--every 5] [--steps 40] [--rounds 3] [--json FILE] trains a Llama of 20 million
parameters on two processes with `herd train`, and compares seconds a step of the whole run, saves included, by the times
of TensorBoard's points.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.indexed import IndexedWriter
from llama.run_folder import complete, read_json

MODEL = ["model.vocab_size=8192", "model.hidden_size=384", "model.intermediate_size=1024", "model.num_layers=8"]
MODEL += ["train.global_batch_size=4", "train.micro_batch_size=2", "data.seq_length=128"]
WARM = 4
"""Steps left out: the first save also makes the copy's memory."""


def seconds_a_step(folder: Path, name: str, steps: int, overrides: list[str]) -> float:
    """Train once; mean seconds between points."""
    words = ["tiny_cpu", "--processes", "2", *MODEL, f"data.train={folder}/corpus", f"run_dir={folder}/{name}"]
    words += [f"train.steps={steps}", "validation.interval=0", "checkpoint.at_end=false", *overrides]
    environment = os.environ | {"HERD_DEVICE": "cpu", "HERD_PREFLIGHT": "0"}
    subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *words], env=environment, check=True, capture_output=True
    )
    events = EventAccumulator(f"{folder}/{name}/tensorboard", size_guidance={"scalars": 0}).Reload()
    times = [event.wall_time for event in events.Scalars("global_step")]
    return (times[-1] - times[WARM]) / (len(times) - 1 - WARM)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    ways = {
        "none": ["checkpoint.interval=0"],
        "background": [f"checkpoint.interval={options.every}"],
        "waiting": [f"checkpoint.interval={options.every}", "checkpoint.save_async=false"],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="herd-checkpoints-") as name:
        folder = Path(name)
        with IndexedWriter(folder / "corpus", np.uint16) as corpus:
            for length in range(200, 1200):
                corpus.add_document(np.arange(length) % 97 + 3)
        for number in range(options.rounds):
            for way, overrides in ways.items():
                seconds[way].append(seconds_a_step(folder, f"{way}-{number}", options.steps, overrides))
                print(f"round {number + 1}: {way}: {seconds[way][-1]:.3f} s a step", flush=True)
        saved = read_json(complete(folder / "waiting-0")[-1] / "herd.json")
        size = sum(size for size, _ in saved["files"].values())
    median = {way: statistics.median(times) for way, times in seconds.items()}
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 2 processes",
        "steps_between_checkpoints": options.every,
        "checkpoint_bytes": size,
        "seconds_a_step": {way: [round(value, 4) for value in times] for way, times in seconds.items()},
        "background_over_none": round(median["background"] / median["none"], 3),
        "waiting_over_none": round(median["waiting"] / median["none"], 3),
        "seconds_a_save_background": round((median["background"] - median["none"]) * options.every, 3),
        "seconds_a_save_waiting": round((median["waiting"] - median["none"]) * options.every, 3),
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
