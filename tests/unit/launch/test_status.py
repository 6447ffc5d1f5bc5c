"""How a run stands, told from real run folders and lines of the queue as squeue prints them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from launch import slurm, tail
from launch.resume import wanted
from launch.standing import Facts, State, find, gather, judge, runs
from launch.status import bad_nodes, rows
from launch.stop import jobs_of
from launch.submit import _devices, ask_shell
from launch.tail import Tail, last_lines, log_of
from llama.run_folder import LastWords, Lock, RunFolder, write_json

JOB = {
    "job": "12", "restarts": 0, "name": "tiny", "attempt": 1, "nodes": ["node2", "node1"], "node_type": "cpu",
    "ranks_per_node": 1, "script": "/x/slurm/run.slurm", "recipe": "./tiny.yaml", "overrides": ["train.steps=9"],
    "log": "/x/run.slurm-12.log", "partition": "main", "ends": None, "user": "me", "started": "2026-01-01T00:00:00.000Z",
}  # fmt: skip
RUNNING = slurm.Job("12", "RUNNING", nodes="node[1-2]", command="/x/slurm/run.slurm ./tiny.yaml")
PENDING = replace(RUNNING, state="PENDING", reason="Priority", nodes="")


class Folder:
    """A run folder as training and the job script write it; `later` seconds pass without anything being written."""

    def __init__(self, path: Path):
        path.mkdir(parents=True)
        self.run, self.later = RunFolder(path), 0.0
        (path / "recipe.yaml").write_text("name: tiny\n")

    def job(self, attempt: int = 1, **facts: Any) -> Folder:
        write_json(self.run.job, JOB | {"attempt": attempt, "submit_dir": str(self.run.path.parents[1])} | facts)
        return self

    def event(self, event: str, attempt: int = 1, job: str | None = "12", **facts: Any) -> Folder:
        os.environ.pop("SLURM_JOB_ID", None)
        if job:
            os.environ["SLURM_JOB_ID"] = job
        self.run.record(event, attempt, **facts)
        return self

    def step(self, step: int, attempt: int = 1, **facts: Any) -> Folder:
        figures = {"epoch": time.time(), "attempt": attempt, "step": step, "steps": 100, "loss": 2.5, "step_time": 1.0}
        write_json(self.run.status, figures | facts)
        return self

    def lock(self, attempt: int = 1, job: str | None = "12", age: float = 0, **facts: Any) -> Folder:
        os.environ.pop("SLURM_JOB_ID", None)
        lock = Lock(self.run, attempt)
        lock.acquire()
        write_json(self.run.lock, lock.mine | {"job": job} | facts)
        os.utime(self.run.lock, (time.time() - age,) * 2)
        return self

    def word(self, text: str, attempt: int = 1) -> Folder:
        self.run.leave_word(attempt, LastWords("memory", text, 0))
        return self

    def stop(self, job: str = "12") -> Folder:
        write_json(self.run.stop, {"job": job})
        return self

    def after(self, seconds: float) -> Folder:
        self.later = seconds
        return self

    def judged(self, *queue: slurm.Job, asked: bool = True) -> State:
        facts = gather(self.run, queue if asked else None)
        beat = None if facts.beat is None else facts.beat + self.later
        return judge(replace(facts, beat=beat), time.time() + self.later)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("SLURM_JOB_ID", "")  # put back what the scenes change
    return Folder(tmp_path / "runs/tiny")


Scene = Callable[[Folder], Folder]
CASES: dict[str, tuple[Scene, list[slurm.Job], str, str]] = {
    "nothing yet": (lambda f: f, [], "unknown", "never started"),
    "first in the queue": (
        lambda f: f, [replace(PENDING, id="7", comment="herd run {run}")], "waiting",
        "waiting in the queue: jobs of higher priority come first",
    ),
    "first start": (lambda f: f, [replace(RUNNING, id="7", comment="herd run {run}")], "starting", "starting: job 7 has its"),
    "nodes boot": (lambda f: f.job(), [replace(RUNNING, state="CONFIGURING")], "starting", "nodes are being made ready"),
    "preflight": (lambda f: f.job(), [RUNNING], "starting", "compiling/starting"),
    "compiles": (
        lambda f: f.job(attempt=3).lock(3).event("start", 3).after(100), [RUNNING], "starting",
        "compiling/starting (attempt 3), for 2 min",
    ),
    "the lock of a dead attempt says nothing of the next": (
        lambda f: f.lock(1, age=900).job(attempt=2).event("preflight", 2).after(150), [RUNNING], "starting", "(attempt 2)",
    ),
    "trains": (lambda f: f.job().lock().event("start").step(5), [RUNNING], "training", "training"),
    "saves for long": (lambda f: f.job().lock().event("start").step(5).after(110), [RUNNING], "training", "training"),
    "steps of minutes": (
        lambda f: f.job().event("start").step(5, step_time=120.0).after(1500), [RUNNING], "training", "training",
    ),
    "first node lost": (
        lambda f: f.job().lock(host="node2").event("start").step(5).after(240), [RUNNING], "silent",
        "silent for 4 min (node2 lost?)",
    ),
    "hangs": (
        lambda f: f.job().event("start").step(5).after(900), [RUNNING], "silent", "silent for 15 min (its processes live",
    ),
    "a rank died": (
        lambda f: f.job().event("start").step(5).event("verdict", verdict="restart", reason="rank 3 was killed"), [RUNNING],
        "restarting", "restarting: rank 3 was killed",
    ),
    "ended without a word": (
        lambda f: f.job().event("start").event("lost", reason="no rank said why"), [RUNNING], "restarting", "no rank said why",
    ),
    "second attempt inside the job": (
        lambda f: f.job().event("verdict", verdict="restart", reason="x").event("start", 2).step(7, 2), [RUNNING], "training",
        "training",
    ),
    "second attempt has no step yet": (
        lambda f: f.job().step(5).event("verdict", verdict="restart").event("start", 2), [RUNNING], "restarting",
        "restarting (attempt 2)",
    ),
    "requeued": (
        lambda f: f.job().event("start").event("verdict", verdict="requeue", reason="node1 lost"),
        [replace(PENDING, reason="BeginTime")], "restarting", "restarting, waiting in the queue: its begin time",
    ),
    "requeued and started, job.json is of the last start": (
        lambda f: f.job().event("start").event("verdict", verdict="requeue", reason="node1 lost"), [RUNNING], "restarting",
        "node1 lost",
    ),
    "requeued and started": (
        lambda f: f.job().event("verdict", verdict="requeue", reason="node1 lost").job(attempt=2, restarts=1), [RUNNING],
        "restarting", "restarting (attempt 2): node1 lost",
    ),
    "a new job after one that was requeued": (
        lambda f: f.job().event("verdict", verdict="requeue").job(attempt=2, job="13"), [replace(RUNNING, id="13")], "starting",
        "compiling/starting (attempt 2)",
    ),
    "preempted": (
        lambda f: f.job().event("end", outcome="stopped").event("verdict", verdict="stop", reason="Slurm ends this job"),
        [replace(RUNNING, state="COMPLETING")], "ending", "ending: Slurm ends this job",
    ),
    "submitted anew after a failure": (
        lambda f: f.job().event("end", outcome="failed", reason="x").event("verdict", verdict="fail"),
        [replace(RUNNING, state="FAILED"), replace(PENDING, id="13", comment="herd run {run}")], "waiting", "higher priority",
    ),
    "suspended": (lambda f: f.job().event("start"), [replace(RUNNING, state="SUSPENDED")], "waiting", "suspended"),
    "saved, leaving": (
        lambda f: f.job().lock().event("start").step(9).event("end", outcome="finished"), [RUNNING], "ending", "saved and ended",
    ),
    "finished, Slurm still cleans up": (
        lambda f: f.job().event("end", outcome="finished").event("verdict", verdict="done"),
        [replace(RUNNING, state="COMPLETING")], "finished", "finished",
    ),
    "finished": (
        lambda f: f.job().event("end", outcome="finished").event("verdict", verdict="done"), [], "finished", "finished",
    ),
    "stopped by herd stop": (
        lambda f: f.job().stop().event("end", outcome="stopped", reason="SIGUSR1").event("verdict", verdict="stop"), [],
        "stopped", "stopped by you",
    ),
    "stopped while it waited to start again": (
        lambda f: f.job().event("start").event("verdict", verdict="requeue", reason="node1 lost").stop(),
        [replace(RUNNING, state="CANCELLED")], "stopped", "stopped by you",
    ),
    "stop.json of an earlier job": (
        lambda f: f.stop("3").job().event("end", outcome="stopped", reason="SIGTERM").event("verdict", verdict="stop"), [],
        "stopped", "stopped: SIGTERM",
    ),
    "failed": (
        lambda f: f.job().event("end", outcome="failed", reason="loss is nan\nmore").event("verdict", verdict="fail"), [],
        "failed", "failed: loss is nan",
    ),
    "the verdict's reason comes first": (
        lambda f: f.job().event("end", outcome="failed", reason="x").event("verdict", verdict="fail", reason="5 attempts without"),
        [], "failed", "failed: 5 attempts without",
    ),
    "only a rank's last words": (
        lambda f: f.job().event("start").word("rank 0 ran out of memory"), [], "failed", "failed: rank 0 ran out of memory",
    ),
    "time was over before it could save": (
        lambda f: f.job().event("start").step(5), [replace(RUNNING, state="TIMEOUT")], "lost", "ran into its time limit",
    ),
    "nothing is known of its end": (
        lambda f: f.job().event("start").step(5), [], "lost", "lost: attempt 1 ended without a word",
    ),
    "was to be requeued, and is gone": (
        lambda f: f.job().event("verdict", verdict="requeue", reason="node1 lost"), [replace(RUNNING, state="CANCELLED")],
        "lost", "job 12 was cancelled when it was to start again (node1 lost)",
    ),
    "trains here": (
        lambda f: f.lock(job=None, host=socket.gethostname()).event("start", job=None).step(3), [], "training", "training",
    ),
    "trains here while an old job is known": (
        lambda f: f.job().event("verdict", verdict="fail").lock(2, job=None).event("start", 2, job=None).step(3, 2),
        [replace(RUNNING, state="FAILED")], "training", "training",
    ),
    "was killed here": (
        lambda f: f.lock(job=None, born="another").event("start", job=None).step(3), [], "lost", "ended without a word",
    ),
    "finished here": (
        lambda f: f.event("start", job=None).event("end", job=None, outcome="finished"), [], "finished", "finished",
    ),
    "interrupted here": (
        lambda f: f.event("start", job=None).event("end", job=None, outcome="stopped", reason="SIGINT"), [], "stopped",
        "stopped by you",
    ),
    "submitted after training here": (
        lambda f: f.event("end", job=None, outcome="stopped"), [replace(PENDING, comment="herd run {run}")], "waiting", "waiting",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_a_run(case: str, folder: Folder) -> None:
    scene, queue, word, text = CASES[case]
    queue = [replace(line, comment=line.comment.format(run=folder.run.path)) for line in queue]
    state = scene(folder).judged(*queue)
    assert (state.word, state.text) == (word, state.text) and text in state.text, state


def test_without_slurm_the_lock_tells_whether_a_job_lives(folder: Folder) -> None:
    folder.job().lock(host="node2").event("start").step(5)
    assert folder.judged(asked=False).word == "training"
    assert folder.after(400).judged(asked=False) == State("unknown", "unknown: no Slurm here to ask about job 12")
    assert folder.judged().word == "lost", "where Slurm answers, a job that it does not know is gone"


def test_no_state_depends_on_how_much_is_known(folder: Folder) -> None:
    """Any part of a run folder may be missing or cut: judging never fails."""
    folder.job().lock().event("start").step(5).event("verdict", verdict="restart").word("x").stop()
    whole = gather(folder.run, [RUNNING])
    empty = Facts()
    for name in vars(whole):
        for line in (None, RUNNING, PENDING, replace(RUNNING, state="FAILED")):
            for asked in (True, False):
                facts = replace(whole, **{name: getattr(empty, name)})
                assert judge(replace(facts, line=line, asked=asked), time.time()).text


def test_bad_nodes_are_those_that_the_newest_job_shut_out(folder: Folder) -> None:
    folder.event("verdict", 1, job="7", exclude=["node9"])
    folder.event("verdict", 2, exclude=["node3"]).event("verdict", 3, exclude=["node1"]).event("verdict", 4, exclude=[])
    assert bad_nodes(list(folder.run.history())) == ["node1", "node3"]


@pytest.mark.parametrize(
    ("reason", "more", "said"),
    [
        ("Resources", {}, "its nodes are in use by others"),
        ("ReqNodeNotAvail, UnavailableNodes:node[3-4]", {}, "down, drained or reserved (node[3-4])"),
        ("Dependency", {"waits_for": "afterok:11(unfulfilled)"}, "job 11 has to end first"),
        ("Dependency", {"waits_for": ""}, "another job has to end first"),
        ("DependencyNeverSatisfied", {}, "never starts"),
        ("AssocGrpNodeLimit", {}, "a limit of its account or user is reached (AssocGrpNodeLimit)"),
        ("QOSMaxJobsPerUserLimit", {}, "a limit of its QOS is reached"),
        ("launch failed requeued held", {}, "scontrol release 12"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", {}, "are down"),
        ("SomethingNewInSlurm", {}, "SomethingNewInSlurm"),
    ],
)
def test_slurm_s_reasons_are_said_in_words(reason: str, more: dict[str, Any], said: str) -> None:
    assert said in replace(PENDING, reason=reason, **more).why()


def test_a_line_of_the_queue_is_read_whatever_its_texts_hold() -> None:
    values = [
        "12", "PENDING", "None", "a|b c", "me", "main", "4", "", "N/A", "1795337784", "/home/me/my runs",
        "/x/slurm/run.slurm ./a b.sh k=v", "(null)", "herd run /home/me/my runs/tiny",
    ]  # fmt: skip
    job = slurm.parse("slurm: a warning\n" + "\x1f".join(values) + "\n")[0]
    assert (job.name, job.count, job.start, job.ends, job.waits_for) == ("a|b c", 4, None, 1795337784.0, "")
    assert (job.step, job.run, job.folder) == ("run", "/home/me/my runs/tiny", "/home/me/my runs")
    assert (
        replace(job, comment="").step == "run" and replace(job, comment="", command="/bin/sleep run.slurmX").step == ""
    )


@pytest.mark.parametrize(
    ("gres", "kind"),
    [
        ("gpu:h200:8", ("gpu", 8)),
        ("gpu:8", ("gpu", 8)),
        ("gpu:h100:4(S:0-1),nvme:2", ("gpu", 4)),
        ("neuron:16", ("trn2", 16)),
        ("neuron:trn1:16", ("trn1", 16)),
        ("gpu", ("gpu", 1)),
        ("(null)", ("cpu", 0)),
        ("nvme:2", ("cpu", 0)),
    ],
)
def test_devices_of_a_node_are_read_in_every_spelling(gres: str, kind: tuple[str, int]) -> None:
    assert _devices(gres) == kind


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        ("idle", True), ("allocated", True), ("mixed-", True), ("idle~", True), ("completing", True), ("planned", True),
        ("down", False), ("down*", False), ("idle*", False), ("drained", False), ("draining", False), ("fail", False),
    ],
)  # fmt: skip
def test_nodes_in_service_are_told_from_others(state: str, usable: bool) -> None:
    assert slurm.Node("node1", state, "", "main").usable is usable


def test_stop_finds_the_jobs_of_a_chain_and_no_others(folder: Folder) -> None:
    folder.job()
    ours = f"{folder.run.path}"
    queue = [
        replace(PENDING, id="14", comment=f"herd export {ours}"),
        RUNNING,
        replace(PENDING, id="15", comment=f"herd run {ours}-other"),
        replace(RUNNING, id="11", state="COMPLETED", comment=f"herd compile {ours}"),
    ]
    assert [job.id for job in jobs_of(folder.run, queue)] == ["12", "14"]


def test_resume_asks_for_what_was_submitted_changed_by_what_is_given(folder: Folder) -> None:
    folder.job(ends=3600.0 * 2, started="1970-01-01T00:00:00.000Z", node_type="gpu", ranks_per_node=8, account="lab")
    wish = wanted(folder.run, None, ("train.steps=20",), ())
    assert (wish.recipe, wish.overrides, wish.nodes) == ("./tiny.yaml", ("train.steps=9", "train.steps=20"), 2)
    assert wish.options == ("--partition=main", "--account=lab", "--time=120", "--job-name=tiny")
    assert wish.environment == {"HERD_NODE_TYPE": "gpu", "HERD_RANKS_PER_NODE": "8"}
    assert wish.folder == folder.run.path.parents[1]
    moved = wanted(folder.run, 8, (), ("--partition=other", "--time=5"))
    assert moved.nodes == 8 and moved.environment == {}, "another partition may have other nodes"
    assert moved.options == ("--account=lab", "--job-name=tiny", "--partition=other", "--time=5")


def test_a_run_that_was_never_submitted_cannot_be_resumed(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"herd submit .*recipe\.yaml"):
        wanted(folder.run, None, (), ())


def test_a_shell_recipe_is_asked_what_it_trains_on_this_kind_of_node(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.sh"
    recipe.write_text(
        'echo noise; [[ $HERD_NODE_TYPE == trn2 ]] && r=a || r=b\nexec "${HERD:-herd}" train "$r" "name=a b" "$@"\n'
    )
    assert ask_shell(str(recipe), ["x=[1, 2]"], "trn2") == ["a", "name=a b", "x=[1, 2]"]
    assert ask_shell(str(recipe), [], "gpu") == ["b", "name=a b"]
    for text, said in (
        ("exit 0", "it did not"),
        ("echo no data >&2; exit 3", "exit code 3: no data"),
        ("$HERD run", "did not"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=said) as error:
            ask_shell(str(recipe), [], "gpu")
        assert error.value.code == 2


def test_runs_are_found_by_path_and_by_name_and_near_names_are_told(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = folder.run.path.parents[1]
    monkeypatch.chdir(top)
    Folder(top / "runs/demo/run")
    assert runs(Path("runs")) == [Path("runs/demo/run"), Path("runs/tiny")]
    assert find("tiny").path == find("runs/tiny").path == Path("runs/tiny")
    for name, said in (
        ("tiyn", "did you mean tiny"),
        ("zzz", "runs/ has demo/run, tiny"),
        ("runs", "is no run folder"),
    ):
        with pytest.raises(UserError, match=said):
            find(name)


def test_all_runs_and_jobs_are_listed_those_at_work_first(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    top = folder.run.path.parents[1]
    monkeypatch.chdir(top)
    folder.job().event("start").step(5, seconds_left=100.0)
    old = (
        Folder(top / "runs/a_old").event("end", job=None, outcome="finished").event("verdict", job=None, verdict="done")
    )
    elsewhere = Folder(top / "elsewhere/runs/x").job(job="20")
    queue = [
        RUNNING,
        replace(RUNNING, id="20", folder=str(top / "elsewhere"), state="PENDING", reason="Resources"),
        replace(PENDING, id="11", command="/x/slurm/compile.slurm tiny", name="tiny-compile"),
        replace(PENDING, id="30", command="/bin/sleep 5"),
        replace(PENDING, id="31", folder=str(top), name="new"),
    ]
    found = rows(queue, time.time() + 10)
    assert [(row.name, row.state.word) for row in found] == [
        ("compile job 11 tiny-compile", "waiting"),
        ("elsewhere/runs/x", "waiting"),
        ("run job 31 new", "waiting"),
        ("runs/tiny", "training"),
        ("runs/a_old", "finished"),
    ]
    assert found[3].figures(time.time() + 10)["seconds_left"] == pytest.approx(90, abs=2)
    assert old.run.path.is_dir() and elsewhere.run.path.is_dir()


def _herd(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"PATH": "/usr/bin-without-slurm", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_commands_without_slurm(folder: Folder) -> None:
    """Runs of this machine are told of; what needs a cluster says so in a line. And none of it loads torch."""
    top = folder.run.path.parents[1]
    folder.lock(job=None).event("start", job=None, nodes=["here"]).step(5, mfu=0.375, tokens_per_second=12345.0)
    done = _herd("status", cwd=top)
    assert done.returncode == 0 and done.stderr == ""
    assert [re.split("  +", line) for line in done.stdout.splitlines()] == [
        ["run", "state", "attempt", "step", "loss", "tokens/s", "mfu"],
        ["runs/tiny", "training", "1", "5/100", "2.5000", "12.3k", "37.5%"],
    ]
    facts = json.loads(_herd("status", "tiny", "--json", cwd=top).stdout)
    assert (facts["state"], facts["step"], facts["nodes"], facts["mfu"]) == ("training", 5, ["here"], 0.375)
    assert "last events" in _herd("status", "runs/tiny", cwd=top).stdout
    folder.event("end", job=None, outcome="finished", step=9)
    folder.run.lock.unlink()
    assert json.loads(_herd("status", "--json", cwd=top).stdout)[0]["step"] == 9, "the last steps were not written down"
    done = _herd("stop", "tiny", cwd=top)
    assert done.returncode == 0 and "nothing is running; no checkpoint was saved" in done.stdout
    for words, said in ((("submit", "tiny_cpu"), "no sbatch here"), (("resume", "tiny"), "no Slurm job ran here")):
        done = _herd(*words, cwd=top)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr
    done = _herd("status", "nope", cwd=top)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_verbs_of_a_person_load_no_torch() -> None:
    modules = "launch.submit, launch.status, launch.tail, launch.stop, launch.resume"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def _tail(folder: Folder, path: Path, node: str | None = None, attempt: int | None = None, lines: int = 2) -> Tail:
    return Tail(folder.run, node, attempt, lines, path.open("wb"), lambda text: None)


def _log(folder: Folder, attempt: int, node: str, text: str, mode: str = "a") -> None:
    folder.run.attempt(attempt).mkdir(parents=True, exist_ok=True)
    with (folder.run.attempt(attempt) / f"{node}.log").open(mode) as file:
        file.write(text)


def test_tail_begins_with_the_last_lines_follows_and_goes_on_in_the_next_attempt(
    folder: Folder, tmp_path: Path
) -> None:
    folder.job()
    out = tmp_path / "out"
    reader = _tail(folder, out)
    assert not reader.look(), "no log yet"
    _log(folder, 1, "node1", "other\n")
    _log(folder, 1, "node2", "a\nb\nc\nd")
    assert reader.look() and out.read_text() == "c\nd"
    _log(folder, 1, "node2", "e\n")
    assert reader.look() and not reader.look() and out.read_text() == "c\nde\n"
    _log(folder, 1, "node2", "last words\n")
    _log(folder, 2, "node2", "again 1\nagain 2\nagain 3\n")
    reader.look()
    assert out.read_text() == "c\nde\nlast words\nagain 1\nagain 2\nagain 3\n", "nothing between attempts is lost"
    _log(folder, 2, "node2", "new\n", "w")
    reader.look()
    assert out.read_text().endswith("again 3\nnew\n"), "a file that was written anew is read from its start"


def test_tail_ends_with_the_run_and_shows_what_came_last(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log(folder, 1, "node1", "x\n")
    monkeypatch.setattr(tail, "ASK", 0.1)
    states = iter(["training", "training", "finished"])

    def state() -> State:
        word = next(states)
        _log(folder, 1, "node1", f"{word}\n")
        return State("finished" if word == "finished" else "training", word)

    assert tail.follow(_tail(folder, tmp_path / "out", lines=9), state).word == "finished"
    assert (tmp_path / "out").read_text() == "x\ntraining\ntraining\nfinished\n"


def test_a_node_is_named_or_counted_as_the_job_numbers_its_nodes(folder: Folder) -> None:
    folder.job()  # its first node is node2
    for node in ("node1", "node2"):
        _log(folder, 1, node, "")
    for given, expected in ((None, "node2"), ("0", "node2"), ("1", "node1"), ("node1", "node1")):
        found = log_of(folder.run, 1, given)
        assert found is not None and found.stem == expected
    with pytest.raises(UserError, match="logs of 0 node2, 1 node1"):
        log_of(folder.run, 1, "2")
    folder.event("start", nodes=["node1", "node2"])
    found = log_of(folder.run, 1, "0")
    assert found is not None and found.stem == "node1", "what the attempt itself said of its nodes counts more"


def test_the_last_lines_of_a_large_log_are_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"%d " % i + b"x" * 999 + b"\n" for i in range(3000)))
    data, size = last_lines(path, 200)
    assert data.count(b"\n") == 200 and data.startswith(b"2800 ") and size == path.stat().st_size
    assert last_lines(path, 0)[0] == b""
