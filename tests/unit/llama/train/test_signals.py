"""Signals become a flag, and what was there before comes back."""

from __future__ import annotations

import os
import signal

import pytest

from llama.train.signals import STOPS, StopRequest


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_signal_is_noted_by_name_and_does_not_end_the_process(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received and stop.name == number.name


def test_handlers_from_before_are_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(RuntimeError), StopRequest():
        assert [signal.getsignal(number) for number in STOPS] != before
        raise RuntimeError("whatever ends the run")
    assert [signal.getsignal(number) for number in STOPS] == before


def test_two_interrupts_ask_and_the_third_insists() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_handler_installed_outside_python_does_not_break_the_exit() -> None:
    stop = StopRequest().__enter__()
    before = dict(stop._before)
    stop._before = dict.fromkeys(before)  # signal.signal() says None of such a handler
    stop.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]
