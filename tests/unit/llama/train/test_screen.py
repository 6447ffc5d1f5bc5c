"""A log gets plain lines; a terminal a bar that is gone when the run ends, under the lines that stay."""

from __future__ import annotations

import io
import re
import sys

import pytest

from llama.train.screen import Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_plain_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(True, 0, 100)
    screen.say("hello [bold]")
    screen.step(7, "loss 3.0", "0:01:00")
    screen.close()
    assert capsys.readouterr().out == "hello [bold]\nstep   7/100  loss 3.0  left 0:01:00\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(False, 0, 100)
    screen.say("hello")
    screen.step(7, "loss 3.0", "0:01:00")
    screen.close()
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_a_line_every_twentieth_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen(True, 0, 100)
    screen.say("checkpoint [here]")
    for step in range(1, 11):
        screen.step(step, f"loss {step}", "0:01:00")
    screen.close()
    shown = terminal.getvalue()
    assert "checkpoint [here]" in shown and "10/100" in shown
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    kept = [line for line in lines if line.startswith("step") and "━" not in line]
    assert [line.split()[1] for line in kept] == ["5/100", "10/100"]
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor comes back"
