"""`herd stop RUN`: a run saves and ends, and its job does not start it again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from data_prep.errors import UserError
from launch import slurm
from launch.standing import Facts, ask, find, gather, ids_of, judge, look
from llama.run_folder import RunFolder, now, write_json

PAUSE = 1.0
"""Seconds between two looks at a run that is ending."""


def jobs_of(run: RunFolder, queue: Sequence[slurm.Job]) -> list[slurm.Job]:
    """Live jobs of a run: the one that trains, and what herd submit chained to it, in the order they were submitted."""
    ids, folder = ids_of(run), str(run.path.absolute())
    mine = [line for line in queue if line.live and (line.run == folder or line.id in ids)]
    return sorted(mine, key=lambda line: int(line.id))


def ask_to_end(run: RunFolder, say: Callable[[str], None]) -> bool:
    """Tell whatever works on the run to save and end; False: nothing does."""
    queue = ask(ids_of(run))
    facts = gather(run, queue)
    found = jobs_of(run, queue or [])
    trains = next((line for line in found if line.step == "run" or line.id in facts.jobs), None)
    by_script = trains is not None and trains.step == "run"
    if facts.owner and not by_script and judge(facts, time.time()).active:
        if facts.owner.get("host") != socket.gethostname():
            where = f"process {facts.owner.get('pid')} on {facts.owner.get('host')}"
            raise UserError(f"{run.path}: trained by {where}, which no job script started; call herd stop there", 2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(facts.owner["pid"]), signal.SIGUSR1)
        say(f"process {facts.owner['pid']} is asked to save and end")
        return True
    if trains and run.path.is_dir():  # before any signal, or the job would take itself for one that should go on
        write_json(run.stop, {"job": trains.id, "time": now()})
    for line in reversed(found):  # the last of a chain first, so that none begins because another ended
        if line is trains and not line.waiting:
            slurm.cancel(line.address, "USR1")
            say(f"job {line.id} is asked to save and end")
        else:
            slurm.cancel(line.address)
            say(
                f"{line.step or 'run'} job {line.id} is cancelled ({'it waited' if line.waiting else 'it was at work'})"
            )
    return bool(found)


def wait(run: RunFolder, timeout: float | None, say: Callable[[str], None]) -> Facts:
    """Until the run has ended. UserError when that takes longer than `timeout` seconds."""
    began, told = time.monotonic(), ""
    while True:
        facts = look(run)
        if not judge(facts, time.time()).active:
            return facts
        text = f"waiting: step {facts.status.get('step', '?')}, {judge(facts, time.time()).text}"
        if text != told:
            say(text)
            told = text
        if timeout is not None and time.monotonic() - began > timeout:
            raise UserError(f"{run.path} has not ended after {timeout:.0f} s; it was asked to, and will after its step")
        time.sleep(PAUSE)


@click.command(short_help="A run saves and ends.")
@click.argument("run")
@click.option("--no-wait", is_flag=True, help="Ask, and do not wait for the end.")
@click.option("--timeout", type=float, help="Seconds to wait at most; until it has ended when not given.")
def command(run: str, no_wait: bool, timeout: float | None) -> None:
    """RUN (a run folder, or its name under runs/) finishes its step, saves and ends; its chained jobs are cancelled.

    The same command, or herd resume, goes on from there.

    \b
    herd stop runs/llama2_7b_gpu
    herd stop llama2_7b_gpu --no-wait
    """
    folder = find(run)
    if not ask_to_end(folder, click.echo):
        click.echo(f"{folder.path}: nothing is running; {_saved(folder)}")
        return
    if no_wait:
        return
    progress: dict[str, Any] = {"err": True, "nl": not sys.stderr.isatty()}

    def say(text: str) -> None:
        click.echo(f"\r\033[K{text}" if sys.stderr.isatty() else text, **progress)

    facts = wait(folder, timeout, say)
    if sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)
    click.echo(f"{folder.path}: {judge(facts, time.time()).text}; {_saved(folder)}")


def _saved(run: RunFolder) -> str:
    step = run.newest_step()
    return f"saved at step {step}" if step else "no checkpoint was saved"
