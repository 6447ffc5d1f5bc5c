"""Which steps are not taken: a loss or gradient that is not finite, or far above what it was lately.

All ranks judge the same summed numbers, so they agree without asking each other.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from data_prep.errors import UserError
from llama.checkpoint_format import TrainState
from llama.config import Guard


class StepGuard:
    """Judges each step before it is taken, counts the skipped ones, and ends the run after too many in a row."""

    def __init__(self, config: Guard, state: TrainState):
        self.config, self.state = config, state
        self.losses: deque[float] = deque(state.recent_losses, config.window)
        self.norms: deque[float] = deque(state.recent_norms, config.window)

    def objection(self, loss: float, norm: float, tokens: float) -> str | None:
        """Why the step must not be taken; None when it may. Keeps the count and what is recent in the run's state."""
        if not tokens:
            reason = "no token of this batch is trained"
        elif not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        else:
            reason = self._spike("loss", loss, self.losses, self.config.loss_spike) or self._spike(
                "gradient norm", norm, self.norms, self.config.gradient_spike
            )
        if reason:
            self.state.skipped_steps += 1
            self.state.skipped_in_a_row += 1
            return reason
        self.losses.append(loss)
        self.norms.append(norm)
        self.state.recent_losses, self.state.recent_norms = list(self.losses), list(self.norms)
        self.state.skipped_in_a_row = 0
        return None

    def _spike(self, what: str, value: float, recent: deque[float], factor: float | None) -> str:
        if factor is None or len(recent) < max(1, self.config.window // 4):
            return ""
        usual = median(recent)
        return (
            f"the {what} {value:.4g} is above {factor:g} × its recent median {usual:.4g}"
            if value > factor * usual
            else ""
        )

    def check(self, step: int, reason: str) -> None:
        """Raise UserError when this was one skipped step too many."""
        if self.state.skipped_in_a_row >= self.config.max_skips:
            raise UserError(
                f"stopped at step {step}: {self.state.skipped_in_a_row} steps in a row were skipped, the last because {reason}; "
                "look at the data of these steps, lower optimizer.lr or lengthen schedule.warmup_steps "
                "(train.guard.max_skips sets the limit)"
            )
