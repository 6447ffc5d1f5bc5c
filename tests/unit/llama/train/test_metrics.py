"""What a run records, read back with TensorBoard's own reader, and the lines people see."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama.config import Recipe
from llama.device import find_device, measure_flops
from llama.model.llama import flops_per_token
from llama.run_folder import RunFolder
from llama.train.evaluate import Evaluation, Figures
from llama.train.journal import Journal
from llama.train.metrics import Metrics, StepReport, clock, si
from tests.dist.layouts import recipe

TAGS = {
    "reduced_train_loss", "val_loss", "lr", "gradient_norm", "parameter_norm", "global_step", "consumed_samples",
    "consumed_tokens", "throughput", "tokens_per_second_per_device", "mfu_full", "mfu_causal", "step_time", "data_time",
    "memory_peak",
}  # fmt: skip


def _report(step: int, **changes: Any) -> StepReport:
    report = StepReport(
        step=step, loss=5.0 - step, gradient_norm=1.0, lr=1e-3, consumed_samples=8 * step,
        consumed_tokens=256 * step, skipped_steps=0, data_time=0.0, trained_tokens=256 * step,
    )  # fmt: skip
    return replace(report, **changes)


def _metrics(config: Recipe, folder: Path, first_step: int = 0, peak: float = 1e12, **options: Any) -> Metrics:
    device = replace(find_device("cpu"), peak_flops=peak)
    journal = Journal(RunFolder(folder), 1, options.get("writes", True))
    return Metrics(config, device, options.get("world", 1), journal, first_step)


def _read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_promised_tag_is_recorded_at_its_step(tmp_path: Path) -> None:
    metrics = _metrics(recipe(), tmp_path)
    for step in (1, 2, 3):
        metrics.step(_report(step), parameter_norm=7.0)
    metrics.validation(2, Evaluation(Figures(9.0, 2)))
    metrics.close()
    points = _read(tmp_path)
    assert set(points) >= TAGS
    assert points["reduced_train_loss"] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert points["val_loss"] == [(2, 4.5)]
    assert points["consumed_samples"] == [(1, 8.0), (2, 16.0), (3, 24.0)]
    assert points["consumed_tokens"][-1] == (3, 768.0)
    assert points["parameter_norm"][0] == (1, 7.0)


def test_speed_and_utilisation_follow_from_the_step_time(tmp_path: Path) -> None:
    config = recipe()
    metrics = _metrics(config, tmp_path, peak=1e9, world=4)
    metrics.step(_report(1), 1.0)
    metrics.close()
    values = {tag: points[0][1] for tag, points in _read(tmp_path).items()}
    tokens = config.tokens_per_step / values["step_time"] / 4
    assert values["tokens_per_second_per_device"] == pytest.approx(tokens, rel=1e-5)
    assert values["throughput"] == pytest.approx(8 / values["step_time"], rel=1e-5)
    for tag, causal in (("mfu_full", False), ("mfu_causal", True)):
        assert values[tag] == pytest.approx(tokens * flops_per_token(config.model, 32, causal) / 1e9, rel=1e-5)
    assert values["mfu_full"] > values["mfu_causal"] > 0
    assert values["memory_peak"] > 10e6


@pytest.mark.parametrize("saved_at", [0, 4])
def test_a_resumed_run_leaves_one_point_a_step(tmp_path: Path, saved_at: int) -> None:
    config = recipe(train__steps=10)
    first = _metrics(config, tmp_path)
    for step in range(1, 7):  # steps after saved_at are lost with the process
        first.step(_report(step, loss=1.0), 1.0)
    first.close()
    second = _metrics(config, tmp_path, first_step=saved_at)
    for step in range(saved_at + 1, 9):
        second.step(_report(step, loss=2.0), 1.0)
    second.close()
    expected = [(step, 1.0 if step <= saved_at else 2.0) for step in range(1, 9)]
    assert _read(tmp_path)["reduced_train_loss"] == expected


def test_lines_and_points_come_at_the_interval_and_at_the_last_step(tmp_path: Path, capsys: Any) -> None:
    metrics = _metrics(recipe(train__steps=5, log__interval=2), tmp_path)
    for step in range(1, 6):
        metrics.step(_report(step), 1.0)
    metrics.close()
    assert [step for step, _ in _read(tmp_path)["lr"]] == [2, 4, 5]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 2", "step 4", "step 5"]
    assert "loss 3.0000" in lines[0] and "mfu" in lines[0]


def test_a_skipped_step_is_told_whatever_the_interval(tmp_path: Path, capsys: Any) -> None:
    metrics = _metrics(recipe(train__steps=50, log__interval=25), tmp_path)
    metrics.step(_report(3, loss=math.nan, skipped="the loss is nan", skipped_steps=1), None)
    assert capsys.readouterr().out == "step 3: skipped, because the loss is nan (1 skipped so far)\n"
    metrics.close()


def test_other_ranks_and_runs_without_tensorboard_write_nothing(tmp_path: Path, capsys: Any) -> None:
    silent = _metrics(recipe(), tmp_path, writes=False)
    silent.step(_report(1), 1.0)
    silent.validation(1, Evaluation(Figures(2.0, 1)))
    silent.close()
    assert capsys.readouterr().out == ""
    plain = _metrics(recipe(log__tensorboard=False), tmp_path)
    plain.step(_report(1), 1.0)
    plain.close()
    assert not (tmp_path / "tensorboard").exists()


def test_without_a_published_peak_utilisation_is_relative_to_a_measured_one_and_says_so(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    metrics = Metrics(recipe(log__tensorboard=False), find_device("cpu"), 1, Journal(RunFolder(tmp_path), 1, True), 0)
    assert 1e8 < metrics.peak < 1e14
    assert "float32 matrix products measured just now" in metrics.peak_in_words
    assert "published bf16 peak" in _metrics(recipe(log__tensorboard=False), tmp_path).peak_in_words


def test_the_measured_peak_is_of_the_type_that_is_computed_in() -> None:
    device = find_device("cpu")
    assert measure_flops(device, torch.float32, 0.02) > 1e8
    assert measure_flops(device, torch.bfloat16, 0.02) > 1e8


def test_numbers_for_people() -> None:
    assert [si(x) for x in (0, 999, 1234567, 8.03e9, 2e15)] == ["0", "999", "1.23M", "8.03G", "2P"]
    assert [clock(x) for x in (0, 59.6, 3661, 90000, -3)] == ["0:00:00", "0:01:00", "1:01:01", "25:00:00", "0:00:00"]
