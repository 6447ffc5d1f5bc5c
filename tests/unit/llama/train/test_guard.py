"""The guard's judgement of a step: what it objects to, what it remembers, when it gives up."""

from __future__ import annotations

import math

import pytest

from data_prep.errors import UserError
from llama.checkpoint_format import TrainState
from llama.config import Guard
from llama.train.guard import StepGuard


def test_without_spike_limits_only_numbers_that_are_not_finite_are_refused() -> None:
    guard = StepGuard(Guard(), TrainState())
    for loss, norm in ((3.0, 1.0), (1e30, 1e30), (0.0, 0.0)):
        assert guard.objection(loss, norm, 10) is None
    assert guard.objection(math.nan, 1.0, 10) == "the loss is nan"
    assert guard.objection(3.0, math.inf, 10) == "the gradient norm is inf"


def test_a_batch_without_trained_tokens_is_skipped_and_counted() -> None:
    state = TrainState()
    guard = StepGuard(Guard(max_skips=2), state)
    for _ in range(2):
        reason = guard.objection(0.0, 0.0, 0)
        assert reason is not None and "no token" in reason
    assert (state.skipped_steps, state.skipped_in_a_row) == (2, 2)
    with pytest.raises(UserError, match="2 steps in a row"):
        guard.check(7, reason)


def test_spikes_are_measured_against_the_median_once_a_quarter_of_the_window_is_filled() -> None:
    guard = StepGuard(Guard(loss_spike=2.0, gradient_spike=5.0, window=8), TrainState())
    assert guard.objection(2.0, 1.0, 10) is None
    assert guard.objection(9.0, 1.0, 10) is None  # one value is no median yet
    assert guard.objection(2.0, 1.0, 10) is None
    reason = guard.objection(4.1, 1.0, 10)
    assert reason is not None and "the loss 4.1 is above 2 × its recent median 2" in reason
    reason = guard.objection(2.0, 5.1, 10)
    assert reason is not None and "gradient norm" in reason
    assert guard.objection(3.9, 4.9, 10) is None


def test_refused_values_do_not_shift_the_median() -> None:
    state = TrainState()
    guard = StepGuard(Guard(loss_spike=2.0, window=4), state)
    guard.objection(1.0, 1.0, 10)
    for _ in range(20):
        assert guard.objection(100.0, 1.0, 10) is not None
    assert state.recent_losses == [1.0]


def test_the_run_ends_after_max_skips_in_a_row_and_a_taken_step_starts_the_count_again() -> None:
    state = TrainState()
    guard = StepGuard(Guard(max_skips=3), state)
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan):
        if reason := guard.objection(loss, 1.0, 10):
            guard.check(5, reason)
    assert state.skipped_steps == 4
    reason = guard.objection(math.nan, 1.0, 10)
    assert reason is not None
    with pytest.raises(UserError, match=r"stopped at step 6: 3 steps in a row .* the loss is nan") as error:
        guard.check(6, reason)
    assert error.value.code == 1 and "\n" not in str(error.value)


def test_a_guard_made_from_saved_state_judges_as_the_one_before() -> None:
    config, state = Guard(loss_spike=1.5, window=8), TrainState()
    first = StepGuard(config, state)
    for loss in (5.0, 4.0, 3.0, math.nan):
        first.objection(loss, 1.0, 10)
    second = StepGuard(config, TrainState(**vars(state)))
    assert second.objection(7.0, 1.0, 10) == first.objection(7.0, 1.0, 10) is not None
    assert second.state.skipped_in_a_row == 2
