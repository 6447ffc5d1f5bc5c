"""A run folder's records: events that a crash cut, last words in order, and a lock that knows a dead owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.errors import UserError
from llama.run_folder import STALE, LastWords, Lock, RunFolder, complete, read_json, write_json


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return RunFolder(tmp_path)


def test_an_event_that_a_power_failure_cut_takes_no_other_with_it(run: RunFolder) -> None:
    run.record("save", 1, step=10)
    with run.events.open("a") as file:
        file.write('{"time": "2026-11-22T08:00:00.000Z", "event": "sa')
    run.record("resume", 2, step=10)
    assert [(event["event"], event["attempt"]) for event in run.history()] == [("save", 1), ("resume", 2)]
    assert all(event["time"].endswith("Z") for event in run.history())


def test_only_finished_checkpoints_count(run: RunFolder) -> None:
    for name in ("step-00000010", "step-00000020", "step-00000030.writing", "step-00000020.damaged", "step-00000040"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000040":
            (run.path / "checkpoints" / name / "herd.json").touch()
    assert [path.name for path in complete(run.path)] == ["step-00000010", "step-00000020"]
    assert run.newest_step() == 20


def test_the_cause_is_found_among_the_last_words(run: RunFolder) -> None:
    run.leave_word(3, LastWords("peer", "connection reset", 0, order=1))
    run.leave_word(3, LastWords("error", "ValueError: x", 5, order=3))
    run.leave_word(3, LastWords("error", "KeyError: y", 6, order=2))
    assert [word.rank for word in run.last_words(3)] == [6, 5, 0]
    run.leave_word(3, LastWords("killed", "rank 1 was killed", 1))
    run.leave_word(3, LastWords("user", "the disk is full", 7, nodes=("node1",)))
    assert [word.rank for word in run.last_words(3)] == [7, 1, 6, 5, 0]
    assert run.last_words(3)[0].nodes == ("node1",)
    (run.attempt(3) / "failed-rank00009.json").write_text("{")
    assert len(run.last_words(3)) == 5 and run.last_words(4) == []


def test_json_is_replaced_whole_or_not_at_all(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(run.status, {"step": 1})
    with pytest.raises(TypeError):
        write_json(run.status, {"step": object()})
    assert read_json(run.status) == {"step": 1}
    assert read_json(run.job) == {}


def test_a_living_owner_keeps_the_folder(run: RunFolder) -> None:
    owner = Lock(run, 1)
    assert owner.acquire() is None and owner.held()
    for other in (Lock(run, 2).acquire, Lock(run, 2).check):
        with pytest.raises(UserError, match=rf"is being trained in by process {os.getpid()} on .*herd stop") as refusal:
            other()
        assert refusal.value.code == 2
    assert owner.held()
    owner.release()
    assert not run.lock.exists()
    assert Lock(run, 3).acquire() is None


def test_an_owner_that_was_killed_is_known_to_be_dead(run: RunFolder) -> None:
    script = (
        "import sys; from pathlib import Path; from llama.run_folder import Lock, RunFolder;"
        "Lock(RunFolder(Path(sys.argv[1])), 1).acquire(); import os; os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, run.path], env=os.environ, check=False)
    assert run.lock.exists()
    heir = Lock(run, 2)
    assert "its process is gone" in (heir.acquire() or "")
    assert heir.held()


def test_an_owner_elsewhere_is_dead_once_it_is_silent(run: RunFolder) -> None:
    run.lock.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "born": "b", "since": "now"}))
    with pytest.raises(UserError, match="process 1 on elsewhere since now"):
        Lock(run, 2).acquire()
    os.utime(run.lock, (0, time.time() - STALE - 5))
    assert "no sign of life for 12" in (Lock(run, 2).acquire() or "")


def test_a_lock_that_was_taken_over_is_no_longer_held_nor_released(run: RunFolder) -> None:
    first, second = Lock(run, 1), Lock(run, 2)
    first.acquire()
    run.lock.unlink()
    second.acquire()
    assert not first.held() and second.held()
    first.release()
    assert second.held()
    run.lock.unlink()
    assert not second.held()


def test_later_attempts_of_a_slurm_job_take_over_and_other_jobs_ask_slurm(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    Lock(run, 1).acquire()
    assert "an earlier attempt of this job" in (Lock(run, 2).acquire() or "")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def squeue_says(text: str) -> None:
        (tools / "squeue").write_text(f"#!/bin/sh\n{text}\n")
        (tools / "squeue").chmod(0o755)

    squeue_says("echo RUNNING")
    with pytest.raises(UserError, match="job 12, process"):
        Lock(run, 3).acquire()
    squeue_says("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UserError, match="job 12, process"):
        Lock(run, 3).acquire()
    squeue_says("echo COMPLETED")
    assert "Slurm job 12 has ended" in (Lock(run, 3).acquire() or "")


def test_of_many_that_find_a_dead_owner_one_gets_the_lock(run: RunFolder) -> None:
    run.lock.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "since": "?"}))
    os.utime(run.lock, (0, 0))
    locks, refused = [Lock(run, i) for i in range(8)], []

    def take(lock: Lock) -> None:
        try:
            lock.acquire()
        except UserError:
            refused.append(lock)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lock.held() for lock in locks) == 1 and len(refused) == 7
    assert not list(run.path.glob(".lock*")) and not list(run.path.glob(".now*"))
