"""Signals become a flag, and what was there before comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama.train.signals import ASKED, STOPS, StopRequest


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


def test_the_end_of_the_job_s_time_stops_while_a_step_and_a_save_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_JOB_ENDS", str(time.time() + 100))
    stop = StopRequest.of_job()
    assert not stop.wanted(needed=90) and not stop.received
    assert stop.wanted(needed=110) and stop.name == "time limit"
    assert stop.wanted(needed=0), "once is enough"
    monkeypatch.setenv("HERD_JOB_ENDS", "")
    assert not StopRequest.of_job().wanted(needed=1e9)


def test_a_request_that_came_before_the_process_could_listen_is_heard(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.look(tmp_path)
    assert not stop.received
    (tmp_path / ASKED).touch()
    stop.look(tmp_path)
    assert stop.name == "SIGUSR1"


def test_a_process_that_is_still_starting_ends_at_once_at_sigterm_and_at_nothing_else() -> None:
    script = """
import os, signal
from llama.train.signals import StopRequest
with StopRequest() as stop:
    stop.working = False
    os.kill(os.getpid(), signal.SIGUSR1)
    print("heard", stop.name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 143 and done.stdout == "heard SIGUSR1\n"
