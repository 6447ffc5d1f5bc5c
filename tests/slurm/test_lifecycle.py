"""What a run survives on a real Slurm: every fault, then many by chance; in the end the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.indexed import IndexedWriter
from tests.slurm.conftest import ROOT, Lab
from tests.slurm.faults import FAULTS, RECIPE, Disturbed, draw_faults, final_files

CPU = {"HERD_NODE_TYPE": "cpu", "HERD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
STEPS = 60
SOAK_STEPS = 400
SOAK_FAULTS = int(os.environ.get("HERD_SOAK_FAULTS", "50"))


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

    def submit(*overrides: str, nodes: int = 2, run_dir: str = "", **environment: str) -> Disturbed:
        where = run_dir or f"runs/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"
        words = ["soak.yaml", f"train.steps={STEPS}", *overrides]
        return Disturbed(lab, folder, words, CPU | environment, ROOT / "slurm/run.slurm", nodes, where).submit()

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


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives(fault: str, disturbed: Callable[..., Disturbed], references: Callable[[int], Path]) -> None:
    reference = references(STEPS)
    run = disturbed()
    run.trains(13)
    run.hit(fault, random.Random(fault))
    assert run.ends() == "COMPLETED", run.log()
    same_as(run, reference)
    events = [event["event"] for event in run.run.history()]
    assert events[-2:] == ["end", "verdict"] and not run.run.lock.exists()
    if fault == "corrupt":
        assert "damaged" in events
    if fault == "hang":
        assert re.search(
            r"no progress for \d+ s in step \d+; rank [01] on node\d did not even write a stack", run.log()
        )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_survives_many_faults_in_a_row(
    disturbed: Callable[..., Disturbed], references: Callable[[int], Path]
) -> None:
    reference = references(SOAK_STEPS)
    run, draw, began = disturbed(f"train.steps={SOAK_STEPS}"), random.Random(7), time.monotonic()
    for fault in draw_faults(seed=7, count=SOAK_FAULTS):
        run.trains(draw.randint(2, 9))
        run.hit(fault, draw)
    assert run.ends(300) == "COMPLETED", run.log()
    same_as(run, reference)
    print(f"{len(run.hits)} faults in {time.monotonic() - began:.0f} s")
    # No step is lost beyond the last checkpoint: so many are redone as lie between two, and one that was being written.
    assert max(hit.redone for hit in run.hits if hit.fault != "corrupt") <= 11, run.hits
