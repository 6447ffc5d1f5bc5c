"""What a run survives on a real Slurm: every fault, then many by chance; in the end the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.indexed import IndexedWriter
from tests.slurm.conftest import ROOT, Lab
from tests.slurm.faults import FAULTS, RECIPE, Disturbed, disturb, final_files

CPU = {"HERD_NODE_TYPE": "cpu", "HERD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
STEPS = 60
SOAK_FAULTS = int(os.environ.get("HERD_SOAK_FAULTS", "20"))  # 50 take 8 minutes
SOAK_STEPS = 50 + 9 * SOAK_FAULTS  # a slow machine, where faults come late, must not reach the end before the last


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    """Where the jobs are submitted: a recipe and its tokens, counting up to a number and starting again."""
    place = shared / "lifecycle"
    place.mkdir()
    (place / "soak.yaml").write_text(RECIPE)
    with IndexedWriter(place / "corpus", np.uint16) as corpus:
        for length in range(20, 320):
            corpus.add_document(np.arange(length) % 97 + 3)
    return place


@pytest.fixture
def disturbed(lab: Lab, folder: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Disturbed]]:
    """Submits a run in a folder of its own; everything of it is gone afterwards."""
    lab.settle()

    def submit(*overrides: str, nodes: int = 2, run_dir: str = "", options: Sequence[str] = ()) -> Disturbed:
        where = run_dir or f"runs/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"
        words = ["soak.yaml", f"train.steps={STEPS}", *overrides]
        return Disturbed(lab, folder, words, CPU, ROOT / "slurm/run.slurm", nodes, where, options).submit()

    yield submit
    lab.settle()


@pytest.fixture(scope="module")
def references(lab: Lab, folder: Path) -> Callable[[int], Path]:
    """Undisturbed runs by their number of steps, made when first asked for."""
    made: dict[int, Path] = {}

    def reference(steps: int) -> Path:
        if steps not in made:
            words = ["soak.yaml", f"train.steps={steps}"]
            run = Disturbed(lab, folder, words, CPU, ROOT / "slurm/run.slurm", 2, f"runs/undisturbed-{steps}").submit()
            assert run.ends() == "COMPLETED", run.log()
            made[steps] = run.run.path
        return made[steps]

    return reference


def curve(folder: Path, tag: str = "reduced_train_loss") -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def same_as(run: Disturbed, reference: Path) -> None:
    """The run ended with the weights, moments, cursor and curves of the undisturbed one."""
    assert final_files(run.run.path) == final_files(reference)
    for tag in ("reduced_train_loss", "consumed_samples", "lr"):
        assert curve(run.run.path, tag) == curve(reference, tag)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_survives_fault_after_fault(
    disturbed: Callable[..., Disturbed], references: Callable[[int], Path]
) -> None:
    reference = references(SOAK_STEPS)
    run = disturbed(f"train.steps={SOAK_STEPS}")
    hits = list(disturb(run, seed=7, count=SOAK_FAULTS))
    assert run.ends(300) == "COMPLETED", run.log()
    same_as(run, reference)
    assert {hit.fault for hit in hits} == set(FAULTS)
    # So many steps are done again as lie between two checkpoints, and one that was being written.
    # A damaged one costs another interval, also to the fault that follows before the run has caught up.
    plain = [hit for before, hit in pairwise([hits[0], *hits]) if "corrupt" not in (before.fault, hit.fault)]
    assert max(hit.redone for hit in plain) <= 11, hits

    events = list(run.run.history())
    names = [event["event"] for event in events]
    assert names[-2:] == ["end", "verdict"] and "damaged" in names
    assert not run.run.lock.exists()
    reasons = " ".join(str(event.get("reason")) for event in events if event["event"] == "verdict")
    assert re.search(r"no progress for \d+ s in step \d+; rank [01] on node\d did not even write a stack", reasons)
    assert list(run.run.path.glob("logs/*/flight-rank*.pickle")), "what its collectives were"
    assert re.search(r"rank [01] on node\d was killed by SIGKILL", reasons)
    assert "stopped by SIGUSR1" in reasons
    samples = {}
    for event in events:  # a step that is done again reads what it read before
        if event["event"] == "save":
            assert samples.setdefault(event["step"], event["samples"]) == event["samples"] == 8 * event["step"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_storage_that_fails_ends_a_run_with_its_reason_and_nothing_is_lost(
    lab: Lab, disturbed: Callable[..., Disturbed], references: Callable[[int], Path]
) -> None:
    reference = references(STEPS)
    with lab.disk("small", "40m") as disk:  # five checkpoints of 2 MB and TensorBoard need 15
        run = disturbed(run_dir=str(disk / "run"))
        run.trains(7)
        lab.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk / "run/checkpoints")
        assert run.ends() == "FAILED"
        # 30, read-only; or 2 where the save had begun.
        assert re.search(r"herd: fail: checkpoint in \S+ could not be written: \[Errno (30|2)\]", run.log()), run.log()
        lab.run("umount", disk / "run/checkpoints")

        run.submit()
        run.trains(7, run.newest()[0])
        lab.run("bash", "-c", f"! dd if=/dev/zero of={disk}/filler bs=64k status=none 2>&1")
        assert run.ends() == "FAILED"
        assert "No space left on device" in run.log() and lab.restarts(run.job) == 0, run.log()
        lab.run("rm", disk / "filler")

        run.submit()
        assert run.ends() == "COMPLETED", run.log()
        same_as(run, reference)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_time_limit_a_second_job_a_loss_that_blows_up_and_deaths_without_progress(
    lab: Lab, disturbed: Callable[..., Disturbed], folder: Path
) -> None:
    # Slurm's own warning would come too late here: the run has to know its time.
    options = ("--time=1", "--signal=B:USR1@1")
    words = ["train.steps=100000", "log.interval=10", "resilience.stop_margin=40"]  # Slurm may warn 30 s early
    long = disturbed(*words, nodes=1, run_dir="runs/long", options=options)
    long.until(lambda: long.run.lock.exists())

    second = Disturbed(lab, folder, long.words, CPU, long.script, 1, long.run_dir).submit()
    assert second.ends() == "FAILED"
    assert re.search(rf"herd: run folder \S+ is being trained in by job {long.job}, process", second.log())
    assert "Traceback" not in second.log()

    # Meanwhile: training that goes wrong by itself, and one that dies each time before its first checkpoint.
    blown = disturbed("optimizer.lr=1e30", "train.guard.max_skips=3", nodes=1, run_dir="runs/blown")
    assert blown.ends() == "FAILED" and lab.restarts(blown.job) == 0
    assert re.search(r"herd: fail: .*3 steps in a row", blown.log()), blown.log()
    doomed = disturbed("resilience.fruitless_attempts=2", nodes=1, run_dir="runs/doomed")
    for attempt in (1, 2):
        doomed.until(lambda attempt=attempt: max(doomed.run.attempts(), default=0) == attempt)  # type: ignore[misc]
        lab.signal(node := lab.wait_running(doomed.job)[0], doomed.rank_of(node))
    assert doomed.ends() == "FAILED", doomed.log()
    assert "herd: fail: 2 attempts in a row got no further than step 0: rank 0 on" in doomed.log(), doomed.log()

    long.until(lambda: lab.restarts(long.job) == 1, 90)
    stops = [event for event in long.run.history() if event["event"] == "end"]
    assert stops[0]["outcome"] == "stopped" and stops[0]["reason"] == "time limit"
    long.trains(1, 1)
    resumed = [event["step"] for event in long.run.history() if event["event"] == "resume"]
    assert resumed == [stops[0]["step"]]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_node_that_does_not_see_the_run_folder_is_left_out(
    lab: Lab, disturbed: Callable[..., Disturbed], folder: Path
) -> None:
    (folder / "blind").mkdir()
    lab.run("mount", "-t", "tmpfs", "tmpfs", folder / "blind", node="node3")
    try:
        words = ["train.steps=5", "train.micro_batch_size=1"]
        run = disturbed(*words, nodes=4, run_dir="blind/run")
        assert run.ends() == "COMPLETED", run.log()
    finally:
        lab.run("umount", folder / "blind", node="node3")
    verdicts = [event for event in run.run.history() if event["event"] == "verdict"]
    assert [(event["verdict"], event["exclude"]) for event in verdicts] == [("requeue", ["node3"]), ("done", [])]
    assert "herd: node node3 cannot train: " in run.log()
    assert json.loads(run.run.job.read_text())["nodes"] == ["node1", "node2", "node4", "node5"]
