"""Learning rates: warm-up, each kind's ends, and that a longer run changes nothing of a schedule with its own length."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from llama.train.schedule import learning_rate
from tests.dist.layouts import recipe

PEAK, FLOOR = 1e-2, 1e-4


def _rates(kind: str, steps: int = 100, **schedule: float) -> list[float]:
    keys = {f"schedule__{key}": value for key, value in schedule.items()}
    config = recipe(train__steps=steps, optimizer__lr=PEAK, schedule__kind=kind, schedule__min_lr=FLOOR, **keys)
    return [learning_rate(step, config) for step in range(steps + 20)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_rises_in_equal_steps_and_reaches_the_peak_right_after(kind: str) -> None:
    rates = _rates(kind, warmup_steps=10)
    assert rates[:10] == pytest.approx([PEAK * (i + 1) / 11 for i in range(10)])
    assert rates[10] == PEAK
    assert min(rates) > 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_reaches_the_floor_at_decay_steps_and_stays_there(kind: str) -> None:
    rates = _rates(kind, warmup_steps=10, decay_steps=60)
    assert rates[60:] == pytest.approx([FLOOR] * 60)
    assert all(a > b for a, b in pairwise(rates[10:61]))
    assert rates[35] == pytest.approx((PEAK + FLOOR) / 2)  # halfway both are at the mean


def test_cosine_is_half_a_cosine() -> None:
    rates = _rates("cosine", warmup_steps=10, decay_steps=60)
    assert rates[20] == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * 10 / 50)) / 2)


def test_without_decay_steps_the_whole_run_is_the_length() -> None:
    assert _rates("linear")[100] == pytest.approx(FLOOR)
    assert _rates("linear")[50] == pytest.approx((PEAK + FLOOR) / 2)


def test_wsd_is_flat_and_falls_over_its_last_steps_alone() -> None:
    rates = _rates("wsd", warmup_steps=10, decay_steps=20)
    assert set(rates[10:81]) == {PEAK}
    assert rates[90] == pytest.approx((PEAK + FLOOR) / 2)
    assert rates[100] == pytest.approx(FLOOR)


def test_wsd_can_be_prolonged_from_any_step_before_its_decay() -> None:
    assert _rates("wsd", steps=100, decay_steps=20)[:80] == _rates("wsd", steps=400, decay_steps=20)[:80]


def test_a_schedule_of_its_own_length_does_not_change_with_the_length_of_the_run() -> None:
    short, long = _rates("cosine", steps=80, decay_steps=60), _rates("cosine", steps=400, decay_steps=60)
    assert short == long[: len(short)]


def test_warm_up_as_long_as_the_decay_falls_to_the_floor_without_dividing_by_zero() -> None:
    rates = _rates("linear", warmup_steps=30, decay_steps=30)
    assert rates[30] == PEAK
    assert rates[31] == pytest.approx(FLOOR)


def test_a_share_of_the_run_is_that_many_steps_of_warm_up() -> None:
    assert _rates("cosine", warmup_share=0.05) == _rates("cosine", warmup_steps=5)
    with pytest.raises(ValueError, match="two ways"):
        _rates("cosine", warmup_share=0.05, warmup_steps=5)
