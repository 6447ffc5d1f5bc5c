"""`herd lab` where there can be no lab: one line, with what would help. tests/slurm/test_the_lab.py starts real ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from launch import lab


@pytest.mark.parametrize("verb", ["up", "status"])
def test_who_is_not_root_is_told_the_command(verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HERD_LAB", str(tmp_path / "lab"))
    monkeypatch.setattr("sys.argv", ["herd", "lab", verb])
    with pytest.raises(UserError, match=f"sudo .*bin/herd lab {verb}"):
        CliRunner().invoke(lab.command, [verb], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_wheel_has_no_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab, "SCRIPT", tmp_path / "lab.sh")
    assert "git clone" in str(lab.trouble())


def test_a_machine_without_slurm_and_apt_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool, path=None: None if tool in ("apt-get", "slurmd") else f"/{tool}")
    assert (
        lab.trouble() == "no slurmd and no apt-get to install them: install Slurm and munge with your package manager"
    )


def test_an_installation_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package slurmctld\n")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab, "missing", lambda: ["slurmctld"])
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr(subprocess, "run", fails)
    assert lab.trouble() == "Slurm could not be installed: E: Unable to locate package slurmctld"


def test_a_place_that_is_someone_else_s_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "lab").symlink_to(tmp_path / "target")
    (tmp_path / "target/file").touch()
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "target").stat().st_uid)
    with pytest.raises(UserError, match="HERD_LAB"), lab._cleared(tmp_path / "lab"):
        pass
    assert (tmp_path / "target/file").exists()
