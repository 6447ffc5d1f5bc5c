"""Event files of other trainers, written by themselves or by their own calls: the same batch stands at the same place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from llama.compare import Options, Run, compare, open_run
from llama.compare.align import axis_for, counted_from, line
from llama.compare.events import Curve, find_tag
from tests.fixtures.trainers.make import BATCH, LENGTH, STEPS, loss, norm

FIXTURES = Path(__file__).parents[3] / "fixtures/trainers"
ON = range(1, STEPS + 1)


def herd() -> Run:
    """A run of ours on the same curves."""
    curves = {
        "reduced_train_loss": Curve(list(ON), [loss(n) for n in ON]),
        "gradient_norm": Curve(list(ON), [norm(n) for n in ON]),
        "consumed_samples": Curve(list(ON), [float(n * BATCH) for n in ON]),
        "consumed_tokens": Curve(list(ON), [float(n * BATCH * LENGTH) for n in ON]),
    }
    return Run("herd", Path("herd"), curves)


def megatron(folder: Path, every: int = 1, batch: int = BATCH) -> Path:
    """What Megatron-LM's training_log writes: iterations from 1, and each curve again over args.consumed_train_samples."""
    board = SummaryWriter(log_dir=str(folder / "tensorboard"), max_queue=1000)
    for iteration in range(every, STEPS + 1, every):
        samples = iteration * batch
        for tag, value in (
            ("learning-rate", 1e-3), ("batch-size", batch), ("lm loss", loss(iteration)), ("loss-scale", 1.0),
            ("grad-norm", norm(iteration)), ("params-norm", 20.0),
        ):  # fmt: skip
            board.add_scalar(tag, value, iteration)
            board.add_scalar(f"{tag} vs samples", value, samples)
        board.add_scalar("iteration-time", 0.5, iteration)
        if iteration % 20 == 0:
            board.add_scalar("lm loss validation", 9.0, iteration)
            board.add_scalar("lm loss validation vs samples", 9.0, samples)
    board.close()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("megatron")
    found = {name: open_run(path, name) for name, path in
             (("nemo", FIXTURES / "nemo"), ("hf", FIXTURES / "hf"), ("megatron", megatron(folder)))}  # fmt: skip
    return found | {"herd": herd()}


def test_nemo_and_lightning_number_the_first_step_0_the_others_1(runs: dict[str, Run]) -> None:
    assert {name: counted_from(run.curves) for name, run in runs.items()} == {
        "nemo": 0, "hf": 1, "megatron": 1, "herd": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "over"),
    [
        (name, over)
        for name, units in (
            ("nemo", ("steps", "samples")),
            ("hf", ("steps", "tokens")),
            ("megatron", ("steps", "samples")),
        )
        for over in units
    ],
)
def test_each_batch_stands_where_it_stands_in_our_own_run(runs: dict[str, Run], name: str, over: str) -> None:
    for what in ("loss", "gradient norm"):
        tags = [find_tag(runs[each].curves, what) or "" for each in (name, "herd")]
        theirs, ours = (
            line(runs[each].curves, tag, over, each) for each, tag in zip((name, "herd"), tags, strict=True)
        )
        assert theirs.x.tolist() == ours.x.tolist()
        assert theirs.y == pytest.approx(ours.y, rel=1e-6)


@pytest.mark.parametrize("reference", ["nemo", "hf", "megatron", "herd"])
@pytest.mark.parametrize("candidate", ["nemo", "hf", "megatron", "herd"])
def test_any_two_trainers_on_the_same_batches_are_a_pair(runs: dict[str, Run], reference: str, candidate: str) -> None:
    if reference == candidate:
        return
    found = compare([runs[reference]], runs[candidate], Options(same_start=True))
    assert found.verdict == "pass", found.sentence
    assert found.over == "steps" and found.first == 7 and found.likeness > 0.999
    assert found.from_zero == (("nemo",) if "nemo" in (reference, candidate) else ())
    openings = [f for f in found.findings if f.rule.startswith("opening")]
    assert [f.verdict for f in openings] == ["pass", "pass"] and all((f.value or 0) < 1e-6 for f in openings)


@pytest.mark.parametrize("every", [2, 5])
def test_means_over_a_logging_interval_meet_the_means_of_single_steps(every: int) -> None:
    ends = range(every, 20 * STEPS + 1, every)
    means = [float(np.mean([loss(n) for n in range(end - every + 1, end + 1)])) for end in ends]
    seldom = Run("seldom", Path("s"), {"train/loss": Curve(list(ends), means)})
    steps = list(range(1, 20 * STEPS + 1))
    often = Run("often", Path("o"), {"reduced_train_loss": Curve(steps, [loss(n) for n in steps])})
    for reference, candidate in ((often, seldom), (seldom, often)):
        found = compare([reference], candidate, Options(same_start=True))
        assert found.verdict == "pass" and found.noise < 1e-6 and found.likeness > 0.999
    rest = float(np.mean([loss(n) for n in range(2, every + 1)]))  # with logging_first_step
    gaps = Run("gaps", Path("g"), {"train/loss": Curve([1, *ends], [loss(1), rest, *means[1:]])})
    assert compare([often], gaps, Options(same_start=True)).verdict == "pass"


def test_one_step_off_would_be_seen(runs: dict[str, Run]) -> None:
    late = {tag: Curve([step + 1 for step in curve.steps], curve.values) for tag, curve in runs["hf"].curves.items()}
    found = compare([runs["herd"]], Run("late", Path("late"), late), Options(same_start=True))
    assert found.verdict == "fail"


def test_where_steps_hold_other_numbers_of_samples_the_samples_are_the_axis(
    tmp_path: Path, runs: dict[str, Run]
) -> None:
    other = open_run(megatron(tmp_path, batch=2 * BATCH), "other")
    assert axis_for({"nemo": runs["nemo"].curves, "other": other.curves}, "auto") == "samples"
    assert axis_for({"nemo": runs["nemo"].curves, "megatron": runs["megatron"].curves}, "auto") == "steps"
    assert axis_for({"hf": runs["hf"].curves, "other": other.curves}, "auto") == "steps"  # nothing that both say


@pytest.mark.parametrize(
    ("steps", "first"),
    [
        (range(40), 0), (range(1, 41), 1),
        (range(9, 400, 10), 0),  # Lightning with log_every_n_steps=10
        (range(10, 401, 10), 1), (range(0, 400, 10), 0), (range(500, 540), 1), ([1, *range(10, 200, 10)], 1),
    ],
)  # fmt: skip
def test_without_samples_the_steps_themselves_tell(steps: range, first: int) -> None:
    curves = {"train_loss": Curve(list(steps), np.ones(len(steps)).tolist())}
    assert counted_from(curves) == first


def test_a_resumed_run_of_nemo_is_told_by_its_samples() -> None:
    steps = list(range(500, 540))
    for ahead in (0, 1):
        samples = Curve(steps, [float((n + ahead) * BATCH) for n in steps])
        curves = {"reduced_train_loss": Curve(steps, [2.0] * 40), "consumed_samples": samples}
        assert counted_from(curves) == 1 - ahead
