"""One job of `herd prep tokenize`, killed a hundred times at random moments: the same bytes, and what was done again.

python benchmarks/prep_soak.py [--kills 100] [--seed 7] tokenizes text of Python's documentation once undisturbed and once
killed again and again, each time in one of the ways of tests/unit/data_prep/test_kills.py or by the loss of a worker, and
followed by the same command. Counted are the parts that were begun and not finished at each kill, which are made again;
finished ones must stay as they were. Engine and parts are such that a job outlives its kills. Writes
benchmarks/results/prep_soak-CPU.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the ways of killing are the tests'

from data_prep import demo_text  # noqa: E402
from tests.unit.data_prep.test_kills import WAYS, WORKERS, Command, begun, done, output  # noqa: E402

PART = "128K"
START_SECONDS = 1.5  # in which imports, the tokenizer and workers load: a third of the kills falls there


def prepare(folder: Path, megabytes: int) -> None:
    """A corpus of as many megabytes in plain and packed files, and a tokenizer."""
    import gzip

    text = demo_text.write_demo_text(folder, megabytes=min(megabytes, 8))
    demo_text.train_tokenizer(text, folder / "tokenizer.model", vocab_size=1000)
    data, corpus = text.read_bytes(), folder / "corpus"
    corpus.mkdir()
    for number in range(-(-megabytes * 1_000_000 // len(data))):
        packed = number % 4 == 3
        path = corpus / f"{number:03}.jsonl{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data, 1) if packed else data)


def lost(folder: Path, pid: int | None) -> int:
    """Parts begun and not finished, by one process or by all."""
    if pid is None:
        return len(begun(folder))
    names = {path.name[1:].split(".")[0] for path in folder.glob(f".*.{pid}.bin")}
    return len(names & begun(folder))


def soak(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """The job, killed `kills` times."""
    draw, prefix, ways = random.Random(seed), folder / "out", [*WAYS, "worker_killed"]
    began = time.monotonic()
    assert Command(folder, folder / "alone", "--part-size", PART, "--keep-parts").end()[0] == 0
    alone, parts = time.monotonic() - began, len(done(Path(f"{folder / 'alone'}.parts")))
    counts: Counter[str] = Counter()
    redone: list[int] = []
    began, commands, left = time.monotonic(), 0, Path(f"{prefix}.parts")
    known: dict[str, int] = {}
    command: Command | None = None
    while len(redone) < kills:
        if command is None or command.process.poll() is not None:
            assert command is None or len(done(left)) < parts, f"the job was done after {len(redone)} kills"
            command, commands, workers_killed = (
                Command(folder, prefix, "--part-size", PART, "--keep-parts"),
                commands + 1,
                0,
            )
        way = draw.choice(ways if workers_killed < 2 else ways[:-1])  # three over one part end the work
        share = (parts - len(known)) / (kills - len(redone))
        if draw.random() < 1 / 3:
            moment = time.monotonic() + draw.random() * START_SECONDS
            while time.monotonic() < moment and len(done(left)) - len(known) < share:
                time.sleep(0.01)
        else:
            command.wait_for_parts(1 + int(draw.random() * min(3, share)))
            time.sleep(draw.random() * 0.05)
        if way == "worker_killed":
            workers = command.workers()
            if not workers:
                continue
            victim = draw.choice(workers)
            try:
                victim.kill()
                victim.wait(5)
            except psutil.Error:
                continue
            workers_killed += 1
            redone.append(lost(left, victim.pid))
            bound = 2
        else:
            number, whom, _ = WAYS[way]
            if command.process.poll() is not None:
                continue
            (os.killpg if whom == "group" else os.kill)(command.process.pid, number)
            code, errors = command.end()
            assert code != 0, f"{way}: the job ended\n{errors}"
            redone.append(lost(left, None))
            bound = 2 * WORKERS
        assert redone[-1] <= bound, (way, redone[-1])
        counts[way] += 1
        now = done(left)
        assert {name: now.get(name) for name in known} == known, "a finished part was made again"
        known = now
        print(f"{len(redone):3d} {way}: {len(known)} of {parts} parts done, {redone[-1]} to be made again", flush=True)
    if command is None or command.process.poll() is not None or command.end()[0] != 0:
        command, commands = Command(folder, prefix, "--part-size", PART, "--keep-parts"), commands + 1
        assert command.end()[0] == 0
    rest = [path.name for path in left.iterdir() if path.name.startswith(".") or path.suffix == ".claim"]
    return {
        "kills": len(redone),
        "by_way": dict(sorted(counts.items())),
        "commands": commands,
        "workers": WORKERS,
        "parts": parts,
        "same_bytes": output(prefix) == output(folder / "alone"),
        "left_aside": rest,
        "parts_redone": sum(redone),
        "parts_redone_by_kill_mean": round(statistics.mean(redone), 2),
        "parts_redone_by_kill_worst": max(redone),
        "seconds_undisturbed": round(alone, 1),
        "seconds_disturbed": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--megabytes", type=int, help="of text; by default as many as the kills need")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "prep_soak-CPU.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="herd-prep-soak-", dir="/var/tmp") as name:
        prepare(Path(name), options.megabytes or max(8, options.kills // 2))
        figures = soak(Path(name), options.kills, options.seed)
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.release()}
    report = {"machine": machine, "command": sys.argv, "seed": options.seed, **figures}
    print(json.dumps(report, indent=1))
    options.to.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if figures["same_bytes"] and not figures["left_aside"] else 1)


if __name__ == "__main__":
    main()
