"""What follows an attempt: every way one can end, and when the job gives up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.job import Facts, Verdict, begin, command, decide, fruitless, note_lost
from llama.config import Resilience
from llama.recipe import load, save
from llama.run_folder import Kind, LastWords, RunFolder, write_json

LIMITS = Resilience(fruitless_attempts=3, max_requeues=10)
KILLED = Facts(
    code=143, ending=False, lost=(), end={}, words=[LastWords("killed", "rank 1 was killed", 1)],
    earlier_suspects=frozenset(), stopped_by_user=False, nodes=4, requeues=0, fruitless=1, step=40,
)  # fmt: skip


def _word(kind: Kind, *nodes: str) -> list[LastWords]:
    return [LastWords(kind, "because", 0, nodes=nodes)]


ENDS: dict[str, tuple[Facts, Verdict]] = {
    "all steps": (
        replace(KILLED, code=0, end={"outcome": "finished"}, words=[]),
        Verdict("done", "all steps are done"),
    ),
    "an early end": (
        replace(KILLED, code=0, end={"outcome": "finished", "reason": "no improvement"}, words=[]),
        Verdict("done", "no improvement"),
    ),
    "an end that could not be written": (
        replace(KILLED, code=0, words=[]),
        Verdict("done", "training ended without an error"),
    ),
    "a rank killed": (KILLED, Verdict("restart", "rank 1 was killed")),
    "killed without a word": (
        replace(KILLED, words=[]),
        Verdict("restart", "a process was killed (exit code 143)"),
    ),
    "an exception": (replace(KILLED, words=_word("error")), Verdict("restart", "because")),
    "wrong use": (replace(KILLED, words=_word("user")), Verdict("fail", "because", code=2)),
    "out of memory": (replace(KILLED, words=_word("memory")), Verdict("fail", "because", code=1)),
    "a hang": (replace(KILLED, words=_word("hang", "node2")), Verdict("restart", "because")),
    "the same node hangs again": (
        replace(KILLED, words=_word("hang", "node2", "node3"), earlier_suspects=frozenset({"node2"})),
        Verdict("requeue", "because, for the second time", ("node2",)),
    ),
    "a bad node": (replace(KILLED, words=_word("node", "node3")), Verdict("requeue", "because", ("node3",))),
    "two bad nodes": (
        replace(KILLED, words=_word("node", "node3") + _word("node", "node1")),
        Verdict("requeue", "because", ("node1", "node3")),
    ),
    "most nodes bad": (
        replace(KILLED, words=_word("node", "node1", "node2", "node3")),
        Verdict("fail", "3 of 4 nodes are unfit: because", code=1),
    ),
    "a lost node": (
        replace(KILLED, lost=("node4",)),
        Verdict("requeue", "node4 no longer answers", ("node4",)),
    ),
    "a lost node, told as wrong use by another": (
        replace(KILLED, lost=("node4",), words=_word("user")),
        Verdict("requeue", "node4 no longer answers", ("node4",)),
    ),
    "drained": (
        replace(KILLED, code=0, end={"outcome": "stopped", "reason": "SIGUSR1"}, words=[]),
        Verdict("requeue", "stopped by SIGUSR1"),
    ),
    "out of time": (
        replace(KILLED, code=0, end={"outcome": "stopped", "reason": "time limit"}, words=[]),
        Verdict("requeue", "stopped by time limit"),
    ),
    "herd stop": (
        replace(KILLED, code=0, end={"outcome": "stopped", "reason": "SIGUSR1"}, stopped_by_user=True),
        Verdict("stop", "herd stop was called"),
    ),
    "scancel or preemption": (
        replace(KILLED, ending=True),
        Verdict("stop", "Slurm ends this job; if it was preempted or requeued, it goes on by itself"),
    ),
    "done while Slurm ends it": (
        replace(KILLED, code=0, end={"outcome": "finished"}, ending=True),
        Verdict("done", "all steps are done"),
    ),
    "no progress": (
        replace(KILLED, fruitless=3),
        Verdict(
            "fail",
            "3 attempts in a row got no further than step 40: rank 1 was killed; mend that and submit again, or raise "
            "resilience.fruitless_attempts",
            code=1,
        ),
    ),
    "no progress, by time limits too short for a step": (
        replace(KILLED, end={"outcome": "stopped", "reason": "time limit"}, fruitless=3),
        Verdict(
            "fail",
            "3 attempts in a row got no further than step 40: stopped by time limit; mend that and submit again, or raise "
            "resilience.fruitless_attempts",
            code=1,
        ),
    ),
    "too many requeues": (
        replace(KILLED, lost=("node4",), requeues=10),
        Verdict("fail", "requeued 10 times, resilience.max_requeues; last: node4 no longer answers", code=1),
    ),
    "too many requeues, but none is needed": (replace(KILLED, requeues=10), Verdict("restart", "rank 1 was killed")),
}


@pytest.mark.parametrize("case", ENDS)
def test_what_follows(case: str) -> None:
    facts, verdict = ENDS[case]
    assert decide(facts, LIMITS) == verdict


def test_only_attempts_of_this_job_that_began_at_the_newest_checkpoint_were_fruitless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for attempt in (1, 2):
        begin(run, attempt)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    begin(run, 3)
    assert fruitless(run) == 1
    checkpoint = tmp_path / "checkpoints/step-00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "herd.json").touch()
    assert fruitless(run) == 0
    begin(run, 4)
    begin(run, 5)
    assert fruitless(run) == 2
    run.record("verdict", 5, verdict="stop", reason="Slurm ends this job")
    assert fruitless(run) == 1, "a preemption is not its fault"


def test_an_attempt_without_an_end_is_noted_as_lost_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    note_lost(run, 0)
    begin(run, 1)
    note_lost(run, 1)
    note_lost(run, 1)
    begin(run, 2)
    run.record("end", 2, outcome="finished")
    note_lost(run, 2)
    assert [event["event"] for event in run.history()] == ["attempt", "lost", "attempt", "end"]


def test_after_prints_one_line_for_the_job_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    for key, value in {"HERD_RUN": str(tmp_path), "HERD_ATTEMPT": "1", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(key, value)

    save(load("tiny_cpu"), run.recipe)

    def after(*facts: str) -> str:
        done = CliRunner().invoke(command, ["after", *facts], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout.strip()

    begin(run, 1)
    assert after("--code", "143") == "restart 2" and run.attempt(2).is_dir()
    assert after("--code", "143", "--lost", "node2,node4") == "requeue node2,node4"
    assert after("--code", "143", "--ending") == "stop"
    write_json(run.stop, {"job": "7"})
    assert after("--code", "0") == "stop"
    write_json(run.stop, {"job": "6"})
    run.leave_word(1, LastWords("user", "the disk is full", 0))
    assert after("--code", "1") == "fail 2"
    run.record("end", 1, outcome="finished")
    assert after("--code", "0") == "done"
    verdicts = [(e["verdict"], e["exclude"]) for e in run.history() if e["event"] == "verdict"]
    assert verdicts[:2] == [("restart", []), ("requeue", ["node2", "node4"])]
    assert json.loads(run.events.read_text().splitlines()[-1])["job"] == "7"
