"""Which validation is the best so far, and whether waiting for a better one is over (early stopping, Prechelt 1998)."""

from __future__ import annotations

import math

from llama.checkpoint_format import TrainState
from llama.config import Validation


def judge(state: TrainState, loss: float, validation: Validation) -> bool:
    """Note the loss of a validation in `state`; whether it is the lowest so far. One that is no number never is."""
    finite = math.isfinite(loss)
    best = finite and (state.best_loss is None or loss < state.best_loss)
    if best:
        state.best_loss, state.best_step = loss, state.step
    # Many small gains add up: they are compared with the last loss that counted, not with the one before.
    if finite and (state.awaited_loss is None or loss < state.awaited_loss - validation.min_improvement):
        state.awaited_loss, state.validations_waited = loss, 0
    else:
        state.validations_waited += 1
    return best


def given_up(state: TrainState, validation: Validation) -> str | None:
    """Why no further step is taken; None: go on."""
    if validation.patience is None or state.validations_waited < validation.patience:
        return None
    by = f" by more than {validation.min_improvement:g}" if validation.min_improvement else ""
    best = "" if state.best_loss is None else f"; the lowest is {state.best_loss:.4f} of step {state.best_step}"
    times = "validation" if state.validations_waited == 1 else "validations in a row"
    return f"the validation loss has not fallen{by} in {state.validations_waited} {times} (validation.patience){best}"
