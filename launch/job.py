"""What slurm/job.sh asks between its steps: `open` before training, `after` once it ended. No torch, so that it is fast.

Slurm is spoken to by the shell script; this module only reads and writes the run folder and decides.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from data_prep.errors import UserError
from llama.run_folder import FINAL, LastWords, Lock, RunFolder, now, read_json, write_json

if TYPE_CHECKING:
    from llama.config import Recipe, Resilience


@click.group()
def command() -> None:
    """Steps of slurm/run.slurm; not for people."""


@command.command("open")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
def open_command(recipe: str, overrides: tuple[str, ...]) -> None:
    """Refuse what cannot run; make the run folder; print HERD_RUN and HERD_ATTEMPT for the job script."""
    from launch.train import check_inputs
    from llama import recipe as recipes

    resolved = recipes.load(recipe, overrides)
    nodes = os.environ.get("HERD_NODES", "").split()
    recipes.lay_out(resolved, len(nodes or ["here"]) * int(os.environ["HERD_RANKS_PER_NODE"]))
    check_inputs(resolved)
    check_model(resolved)
    run = RunFolder(Path(resolved.folder).absolute())
    Lock(run, 0).check()
    attempt = max(run.attempts(), default=0) + 1
    try:
        run.attempt(attempt).mkdir(parents=True, exist_ok=True)
        note_lost(run, attempt - 1)
        check_fruit(run, resolved.resilience)
        recipes.save(resolved, run.recipe)  # its limits hold for attempts that die before training begins, too
        write_json(run.job, job_facts(resolved, nodes, attempt, recipe, overrides))
        begin(run, attempt)
    except OSError as error:
        raise UserError(
            f"run folder {run.path} cannot be written: {error.strerror or error}; choose another run_dir=...", 2
        ) from None
    click.echo(f"HERD_RUN={run.path}")
    click.echo(f"HERD_ATTEMPT={attempt}")


def check_model(recipe: Recipe) -> None:
    """Refuse a run folder in which another model was trained."""
    import yaml

    old = RunFolder(Path(recipe.folder)).recipe
    try:
        model = yaml.safe_load(old.read_text(encoding="utf-8"))["model"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return
    if model != recipe.model.model_dump(mode="json"):
        raise UserError(
            f"run folder {recipe.folder} is of another model (see {old}); use that recipe, or another run_dir=...", 2
        )


def job_facts(recipe: Recipe, nodes: list[str], attempt: int, given: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What job.json says of the Slurm job that runs now."""
    env = os.environ
    ends = env.get("HERD_JOB_ENDS")
    # A shell recipe calls node.sh with what it stands for; what the user gave is kept by job.sh.
    words = env.get("HERD_GIVEN", "").split("\n") if env.get("HERD_GIVEN") else [given, *overrides]
    return {
        "job": env.get("SLURM_JOB_ID"),
        "restarts": int(env.get("SLURM_RESTART_COUNT", "0")),
        "name": recipe.name,
        "attempt": attempt,
        "nodes": nodes,
        "node_type": env.get("HERD_NODE_TYPE"),
        "ranks_per_node": int(env["HERD_RANKS_PER_NODE"]),
        "submit_dir": env.get("SLURM_SUBMIT_DIR"),
        "script": env.get("HERD_SCRIPT"),
        "recipe": words[0],
        "overrides": words[1:],
        "log": env.get("HERD_LOG"),
        "account": env.get("SLURM_JOB_ACCOUNT"),
        "qos": env.get("SLURM_JOB_QOS"),
        "partition": env.get("SLURM_JOB_PARTITION"),
        "ends": float(ends) if ends else None,
        "user": env.get("SLURM_JOB_USER"),
        "started": now(),
    }


def begin(run: RunFolder, attempt: int) -> None:
    """Record that an attempt begins, and from which checkpoint it can go on."""
    run.attempt(attempt).mkdir(parents=True, exist_ok=True)
    run.record("attempt", attempt, from_step=run.newest_step())


def note_lost(run: RunFolder, attempt: int) -> None:
    """Say of the attempt before, when nothing told its end, that it was lost: its node or the whole job was killed."""
    events = [event for event in run.history() if event.get("attempt") == attempt]
    if events and not any(event["event"] in ("end", "verdict", "lost") for event in events):
        run.record("lost", attempt, reason="it ended without a word: its first node was lost, or Slurm killed the job")


def fruitless(run: RunFolder) -> int:
    """Attempts of this job in a row, the newest first, that began at the checkpoint that is still the newest.

    Those that Slurm ended, by preemption say, are not counted: that was not for a fault of theirs.
    """
    step, count, history = run.newest_step(), 0, list(run.history())
    ended = {event["attempt"] for event in history if event["event"] == "verdict" and event.get("verdict") == "stop"}
    for event in reversed([event for event in history if event["event"] == "attempt"]):
        if event["attempt"] in ended:
            continue
        if event.get("from_step") != step or event.get("job") != os.environ.get("SLURM_JOB_ID"):
            break
        count += 1
    return count


def check_fruit(run: RunFolder, limits: Resilience) -> None:
    """Refuse another automatic start when those before came to nothing; a start by hand is always allowed."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) and fruitless(run) >= limits.fruitless_attempts:
        raise UserError(too_often(fruitless(run), run.newest_step(), "the last ones were lost"))


def too_often(count: int, step: int, reason: str) -> str:
    """Why there is no further attempt."""
    return (
        f"{count} attempts in a row got no further than step {step}: {reason}; mend that and submit again, or raise "
        "resilience.fruitless_attempts"
    )


@dataclass(frozen=True)
class Verdict:
    """What the job script is to do after an attempt."""

    verdict: Literal["done", "restart", "requeue", "stop", "fail"]
    reason: str
    exclude: tuple[str, ...] = ()
    """Nodes that the next attempt must not use."""
    code: int = 0


@dataclass(frozen=True)
class Facts:
    """What is known once an attempt's processes are gone."""

    code: int
    """Exit code of srun."""
    ending: bool
    """Whether Slurm itself is ending the job (scancel, preemption, time limit)."""
    lost: tuple[str, ...]
    """Nodes that no longer answer."""
    end: dict[str, Any]
    """The attempt's `end` event; empty when there is none."""
    words: list[LastWords]
    """The likely cause first."""
    earlier_suspects: frozenset[str]
    """Nodes whose ranks were silent in the hang before."""
    stopped_by_user: bool
    """`herd stop` was called for this job."""
    nodes: int
    """How many the job has."""
    requeues: int
    fruitless: int
    step: int
    """Of the newest checkpoint."""


def decide(facts: Facts, limits: Resilience) -> Verdict:
    """What comes after an attempt."""
    word = facts.words[0] if facts.words else None
    outcome = facts.end.get("outcome")
    if outcome == "finished":
        return Verdict("done", facts.end.get("reason") or "all steps are done")
    if facts.stopped_by_user:
        return Verdict("stop", "herd stop was called")
    if facts.ending:
        return Verdict("stop", "Slurm ends this job; if it was preempted or requeued, it goes on by itself")
    if facts.code == 0 and not outcome and not facts.words:
        return Verdict("done", "training ended without an error")  # and could not write its end
    if word is not None and word.kind in FINAL and not facts.lost:
        return Verdict("fail", word.text, code=2 if word.kind == "user" else 1)
    if outcome == "stopped":
        wish = Verdict("requeue", f"stopped by {facts.end.get('reason')}")
    elif facts.lost:
        wish = Verdict("requeue", f"{', '.join(facts.lost)} no longer answers", facts.lost)
    elif word is not None and word.kind == "node":
        bad = sorted({node for other in facts.words if other.kind == "node" for node in other.nodes})
        if 2 * len(bad) > facts.nodes:  # each node judges itself: what makes most of them bad is not theirs
            return Verdict("fail", f"{len(bad)} of {facts.nodes} nodes are unfit: {word.text}", code=1)
        wish = Verdict("requeue", word.text, tuple(bad))
    elif word is not None and word.kind == "hang" and word.nodes:
        again = tuple(sorted(facts.earlier_suspects & set(word.nodes)))
        wish = (
            Verdict("requeue", f"{word.text}, for the second time", again) if again else Verdict("restart", word.text)
        )
    else:
        wish = Verdict("restart", word.text if word else f"a process was killed (exit code {facts.code})")
    if facts.fruitless >= limits.fruitless_attempts:
        return Verdict("fail", too_often(facts.fruitless, facts.step, wish.reason), code=1)
    if wish.verdict == "requeue" and facts.requeues >= limits.max_requeues:
        return Verdict("fail", f"requeued {facts.requeues} times, resilience.max_requeues; last: {wish.reason}", code=1)
    return wish


@command.command("after")
@click.option("--code", type=int, required=True, help="Exit code of the training step.")
@click.option("--ending", is_flag=True, help="Slurm is ending the job.")
@click.option("--lost", default="", help="Nodes that do not answer, with commas.")
def after_command(code: int, ending: bool, lost: str) -> None:
    """Print what to do next: done, stop, restart ATTEMPT, requeue NODES, fail CODE."""
    from llama import recipe as recipes

    run, attempt = RunFolder(Path(os.environ["HERD_RUN"])), int(os.environ["HERD_ATTEMPT"])
    limits = recipes.load(str(run.recipe)).resilience
    events = list(run.history())
    ends = [event for event in events if event["event"] == "end" and event.get("attempt") == attempt]
    job = os.environ.get("SLURM_JOB_ID")
    facts = Facts(
        code=code,
        ending=ending,
        lost=tuple(lost.replace(",", " ").split()),
        end=ends[-1] if ends else {},
        words=run.last_words(attempt),
        earlier_suspects=suspects(run, attempt - 1),
        stopped_by_user=job is not None and read_json(run.stop).get("job") == job,
        nodes=len(read_json(run.job).get("nodes", [])),
        requeues=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        fruitless=fruitless(run),
        step=run.newest_step(),
    )
    verdict = decide(facts, limits)
    argument = {"requeue": ",".join(verdict.exclude), "fail": str(verdict.code)}.get(verdict.verdict, "")
    try:
        run.record("verdict", attempt, verdict=verdict.verdict, reason=verdict.reason, exclude=list(verdict.exclude))
        if verdict.verdict == "restart":
            begin(run, attempt + 1)
            argument = str(attempt + 1)
    except OSError as error:
        click.echo(f"herd: fail: run folder {run.path} cannot be written: {error.strerror or error}", err=True)
        click.echo("fail 1")
        return
    click.echo(f"herd: {verdict.verdict}: {verdict.reason}", err=True)
    click.echo(f"{verdict.verdict} {argument}".strip())


def suspects(run: RunFolder, attempt: int) -> frozenset[str]:
    """Nodes whose ranks were silent when an attempt hung."""
    words = run.last_words(attempt)
    return frozenset(words[0].nodes) if words and words[0].kind == "hang" else frozenset()


if __name__ == "__main__":
    try:
        command(standalone_mode=True)
    except UserError as error:
        click.echo(f"herd: {error}", err=True)
        sys.exit(error.code)
