"""Intervals hold what they promise on series whose points hang together; equivalence is shown, never assumed."""

from __future__ import annotations

import numpy as np
import pytest

from llama.compare.statistics import (
    Estimate,
    autocorrelation_time,
    mean,
    noise,
    slope,
    smooth,
    t_quantile,
)
from tests.unit.llama.compare.series import wandering


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_the_autocorrelation_time_of_a_known_process_is_found(memory: float) -> None:
    found = np.mean([autocorrelation_time(wandering(4000, memory, seed)) for seed in range(10)])
    assert found == pytest.approx((1 + memory) / (1 - memory), rel=0.15)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_intervals_of_a_mean_and_of_a_slope_hold_the_truth_as_often_as_they_say(memory: float) -> None:
    x, held = np.linspace(0, 1, 200), np.zeros(2)
    for seed in range(300):
        series = wandering(200, memory, seed)
        for i, estimate in enumerate((mean(series), slope(x, series + 3 * x))):
            held[i] += abs(estimate.value - 3 * i) <= estimate.half(0.95)  # the 90 % interval of a two-sided test
    assert (held / 300 > (0.86 if memory < 0.9 else 0.80)).all(), held / 300


def test_unequal_runs_are_rarely_shown_equal() -> None:
    tolerance, passed = 0.3, 0
    for seed in range(300):
        passed += mean(wandering(200, 0.5, seed) + tolerance).judge(tolerance, 0.95) == "pass"
    assert passed / 300 < 0.09


def test_a_verdict_is_shown_in_either_direction_or_not_given() -> None:
    assert Estimate(0.1, 0.1, 50).judge(0.5, 0.95) == "pass"
    assert Estimate(-0.9, 0.1, 50).judge(0.5, 0.95) == "fail"
    assert Estimate(0.45, 0.1, 50).judge(0.5, 0.95) == "undecided"
    assert Estimate(0.0, 0.1, 2).judge(0.5, 0.95) == "undecided"  # two points prove nothing
    assert Estimate(0.0, 0.0, 50).judge(0.5, 0.95) == "pass"


def test_the_data_said_to_be_missing_would_decide() -> None:
    undecided = Estimate(0.2, 0.3, 50)
    times = undecided.more(0.5, 0.95)
    assert Estimate(0.2, 0.3 / (1.02 * times) ** 0.5, 50 * times).judge(0.5, 0.95) == "pass"
    assert Estimate(0.2, 0.3 / (0.8 * times) ** 0.5, 50 * times).judge(0.5, 0.95) == "undecided"


def test_an_effect_called_detectable_is_found_four_times_in_five() -> None:
    error, tolerance = 0.1, 0.5
    effect = Estimate(0.0, error, 60).detectable(tolerance, 0.95)
    draws = np.random.default_rng(0).normal(effect, error, 2000)
    found = np.mean([Estimate(value, error, 60).judge(tolerance, 0.95) == "fail" for value in draws])
    assert found == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("probability", "freedom", "value"), [(0.95, 3, 2.353), (0.975, 4, 2.776), (0.95, 30, 1.697), (0.8, 10, 0.879)]
)
def test_quantiles_of_t_are_those_of_the_tables(probability: float, freedom: float, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, rel=6e-3)


def test_noise_is_told_from_trend_and_smoothing_keeps_a_line() -> None:
    x = np.arange(2000.0)
    assert noise(5 - x / 100) == pytest.approx(0, abs=1e-9)
    assert noise(5 - x / 100 + wandering(2000, 0, 1)) == pytest.approx(1, rel=0.05)
    assert smooth(x, 11)[100:-100] == pytest.approx(x[100:-100])
