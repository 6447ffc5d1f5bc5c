"""A run that stands still writes where it stands, names who is silent, and ends; one that moves is left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from llama.run_folder import Lock, RunFolder
from llama.train import watchdog
from llama.train.watchdog import Watchdog

HANGS = """
import sys, threading
from pathlib import Path
from llama.run_folder import RunFolder
from llama.train.watchdog import Watchdog
run = RunFolder(Path(sys.argv[1]))
run.attempt(1).mkdir(parents=True)
with Watchdog(run, 1, 0, ("node1", "node2"), 60.0) as watch:
    watch.beat("step 7", limit=0.3)
    def stuck_in_a_collective():
        threading.Event().wait()
    stuck_in_a_collective()
"""


def test_a_hang_ends_the_process_with_stacks_and_the_silent_rank_s_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    run = RunFolder(tmp_path)
    stacks = (run.attempt(1) / "stacks-rank00000.txt").read_text()
    assert re.search(r"rank 0: no progress for \d+ s in step 7", stacks) and "in stuck_in_a_collective" in stacks
    (word,) = run.last_words(1)
    assert word.kind == "hang" and word.nodes == ("node2",)
    assert "rank 1 on node2 did not even write a stack, the others wait" in word.text
    assert word.text in done.stdout


def test_a_run_that_moves_is_left_alone_and_leaves_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.attempt(1).mkdir(parents=True)
    with Watchdog(run, 1, 0, ("node1",), 0.5) as watch:
        for step in range(8):
            time.sleep(0.1)
            watch.beat(f"step {step}")
    assert list(run.attempt(1).iterdir()) == []


def test_without_a_limit_it_only_shows_that_the_owner_of_the_lock_lives(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lock = Lock(run, 1)
    lock.acquire()
    os.utime(run.lock, (0, 0))
    before, watchdog.TOUCH = watchdog.TOUCH, 0.0
    try:
        with Watchdog(run, 1, 0, ("node1",), 0.0, lock):
            deadline = time.monotonic() + 5
            while run.lock.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        watchdog.TOUCH = before
    assert time.time() - run.lock.stat().st_mtime < 60
    assert not run.attempt(1).exists()
