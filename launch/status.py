"""`herd status [RUN]`: how runs stand, in words: one at length, or all in a table."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from launch import slurm
from launch.standing import Facts, State, ask, find, first_line, gather, is_run, judge, look, runs
from llama import run_folder
from llama.run_folder import RunFolder


@dataclass(frozen=True)
class Row:
    """A line of the table: a run, or a job that has no run folder yet."""

    name: str
    state: State
    facts: Facts = field(default_factory=Facts)
    run: RunFolder | None = None

    def figures(self, now: float) -> dict[str, Any]:
        """Everything that is shown, for --json and for the table."""
        status, job, line = self.facts.status, self.facts.job, self.facts.line
        left = status.get("seconds_left")
        if left is not None and self.state.word == "training":
            left = max(0.0, left - (now - float(status.get("epoch") or now)))
        nodes = self.facts.last("start").get("nodes") or job.get("nodes") or []
        best = self.run.best() if self.run else None
        return {
            "run": self.name,
            "folder": str(self.run.path.absolute()) if self.run else None,
            "state": self.state.word,
            "text": self.state.text,
            "job": (line.id if line and line.live else None) or job.get("job") or (line.id if line else None),
            "attempt": self.facts.attempt or None,
            "step": self.facts.last("end").get("step") or status.get("step"),  # not every step is written down
            "steps": status.get("steps"),
            "checkpoint": self.run.newest_step() if self.run else None,
            "best_step": best[0] if best else None,
            "best_validation_loss": best[1] if best else None,
            "loss": status.get("loss"),
            "validation_loss": status.get("validation_loss"),
            "tokens_per_second": status.get("tokens_per_second"),
            "mfu": status.get("mfu"),
            "seconds_left": left if self.state.word in ("training", "silent", "ending") else None,
            "skipped_steps": status.get("skipped_steps"),
            "nodes": nodes,
            "bad_nodes": bad_nodes(self.facts.events),
        }


def bad_nodes(events: Iterable[dict[str, Any]]) -> list[str]:
    """Nodes that verdicts of the newest job shut out."""
    verdicts = [event for event in events if event["event"] == "verdict"]
    job = verdicts[-1].get("job") if verdicts else None
    return sorted({str(node) for event in verdicts if event.get("job") == job for node in event.get("exclude") or []})


def rows(queue: Sequence[slurm.Job] | None, now: float) -> list[Row]:
    """All runs under ./runs and of this user's jobs, those at work first."""
    folders = {path.resolve(): path for path in runs(Path("runs"))}
    known = {str(run_folder.read_json(RunFolder(path).job).get("job")) for path in folders}
    strangers = []
    for line in queue or []:
        if line.step == "run" and line.run and (line.live or Path(line.run).is_dir()):
            folders.setdefault(Path(line.run).resolve(), Path(line.run))
        elif line.live and line.step and line.id not in known:
            found = _folder_of(line)
            if found is not None:
                folders.setdefault(found.resolve(), found)
            else:
                strangers.append(line)
    found_rows = []
    for path in folders.values():
        run = RunFolder(path)
        facts = gather(run, queue)
        if facts.line or is_run(path):
            found_rows.append(Row(_short(path), judge(facts, now), facts, run))
    for line in queue or []:
        if line.live and line.step and (line.step != "run" or line in strangers):
            found_rows.append(
                Row(f"{line.step} job {line.id} {line.name}".rstrip(), _job_state(line), Facts(line=line))
            )
    return sorted(found_rows, key=lambda row: (not row.state.active, row.name))


def _folder_of(line: slurm.Job) -> Path | None:
    """The run folder whose job.json names this job, under the folder where it was submitted."""
    for path in runs(Path(line.folder) / "runs"):
        if str(run_folder.read_json(RunFolder(path).job).get("job")) == line.id:
            return path
    return None


def _job_state(line: slurm.Job) -> State:
    if line.waiting:
        return State("waiting", f"waiting in the queue: {line.why()}")
    return State(
        "starting" if line.step == "run" else "training", {"run": "starting"}.get(line.step, f"{line.step} at work")
    )


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def _count(value: float | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    return (f"{days}d " if days else "") + f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


COLUMNS = ("run", "state", "job", "attempt", "step", "loss", "tokens/s", "mfu", "left", "bad nodes")
COLOURS = {
    "training": "green", "finished": "green", "failed": "red", "lost": "red", "silent": "red", "restarting": "yellow",
}  # fmt: skip


def _cells(figures: dict[str, Any]) -> list[str]:
    step, steps = figures["step"], figures["steps"]
    return [
        figures["run"],
        figures["text"],
        str(figures["job"] or ""),
        str(figures["attempt"] or ""),
        f"{step}/{steps}" if step is not None and steps else str(step or ""),
        "" if figures["loss"] is None else f"{figures['loss']:.4f}",
        _count(figures["tokens_per_second"]),
        "" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
        _clock(figures["seconds_left"]),
        ",".join(figures["bad_nodes"]),
    ]


def _show_table(found: Sequence[Row], now: float) -> None:
    cells = [_cells(row.figures(now)) for row in found]
    used = [i for i in range(len(COLUMNS)) if i < 2 or any(line[i] for line in cells)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for i in used:
            table.add_column(COLUMNS[i], overflow="fold")
        for row, line in zip(found, cells, strict=True):
            style = COLOURS.get(row.state.word, "")
            table.add_row(*(Text(line[i], style=style if i == 1 else "") for i in used))
        Console(highlight=False).print(table)
        return
    table_lines = [list(COLUMNS), *cells]
    widths = [max(len(line[i]) for line in table_lines) for i in range(len(COLUMNS))]
    for line in table_lines:
        click.echo("  ".join(line[i].ljust(widths[i]) for i in used).rstrip())


def _show_run(row: Row, now: float, events: int) -> None:
    """One run at length."""
    facts, run = row.facts, row.run
    assert run is not None
    figures = row.figures(now)
    lines = [("state", row.state.text)]
    if row.state.word in ("failed", "lost", "stopped"):
        full = str(facts.last("verdict").get("reason") or (facts.words[0].text if facts.words else "")).strip()
        lines += [("", text) for text in full.splitlines()[1:10]]
    where = f"{facts.job.get('node_type', '')} × {facts.job.get('ranks_per_node')} ranks" if facts.job else "local"
    nodes = figures["nodes"]
    if figures["job"]:
        lines.append(("job", f"{figures['job']} on {', '.join(nodes[:8])}{' …' if len(nodes) > 8 else ''} ({where})"))
    if facts.line and facts.line.live and facts.line.ends:
        lines.append(
            ("time limit", f"{datetime.fromtimestamp(facts.line.ends):%F %T}, in {_clock(facts.line.ends - now)}")
        )
    if facts.line and facts.line.waiting and facts.line.start:
        lines.append(("may start", f"{datetime.fromtimestamp(facts.line.start):%F %T}"))
    cells = dict(zip(COLUMNS, _cells(figures), strict=True))
    lines += [(name, cells[name]) for name in ("attempt", "step", "loss", "tokens/s", "mfu", "left", "bad nodes")]
    validation = figures["validation_loss"]
    lines.append(("validation", "" if validation is None else f"{validation:.4f}"))
    if figures["best_step"]:
        kept = "" if run.checkpoint(figures["best_step"]).is_dir() else ", not kept"
        lines.append(("best", f"{figures['best_validation_loss']:.4f} at step {figures['best_step']}{kept}"))
    lines.append(("skipped", f"{figures['skipped_steps']} steps" if figures["skipped_steps"] else ""))
    lines.append(("checkpoint", f"step {figures['checkpoint']}" if figures["checkpoint"] else "none yet"))
    lines.append(("logs", str(run.attempt(facts.attempt)) if run.attempt(facts.attempt).is_dir() else ""))
    lines.append(("job's log", str(facts.job.get("log") or "")))
    for name, value in lines:
        if value:
            click.echo(f"{name:<11} {value}")
    ends = [
        (event.get("attempt"), event.get("verdict") or event.get("outcome") or "lost", first_line(event.get("reason")))
        for event in facts.events
        if event["event"] in ("verdict", "lost") or (event["event"] == "end" and facts.local)
    ]
    if ends:
        click.echo("\nattempts")
        for number, what, why in ends[-events:]:
            click.echo(f"  {number:>4}  {what:<8} {why}".rstrip())
    if facts.events:
        click.echo("\nlast events")
        for event in facts.events[-events:]:
            rest = {key: value for key, value in event.items() if key not in ("time", "event", "attempt", "job")}
            told = "  ".join(f"{key} {_plain(value)}" for key, value in rest.items() if value not in (None, [], ""))
            click.echo(f"  {event.get('time', '')[:19].replace('T', ' ')}  {event['event']:<10} {told}".rstrip())


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return first_line(json.dumps(value) if isinstance(value, dict) else value)


@click.command(short_help="How runs stand: state, step, loss, speed, time left, bad nodes.")
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="JSON for programs: one object for RUN, else a list.")
@click.option("--events", default=10, show_default=True, type=click.IntRange(1), help="Events shown of RUN.")
def command(run: str | None, as_json: bool, events: int) -> None:
    """How RUN stands (a run folder, or its name under runs/); without RUN all runs here and all of your jobs.

    \b
    herd status
    herd status runs/llama2_7b_gpu
    herd status llama2_7b_gpu --json
    """
    now = time.time()
    if run is None:
        found = rows(ask(), now)
        if as_json:
            click.echo(json.dumps([row.figures(now) for row in found], indent=1))
        elif found:
            _show_table(found, now)
        else:
            click.echo("no runs under ./runs, and no job of yours in the queue")
        return
    folder = find(run)
    facts = look(folder)
    row = Row(_short(folder.path), judge(facts, now), facts, folder)
    if as_json:
        click.echo(json.dumps(row.figures(now), indent=1))
    else:
        click.echo(f"{'run':<11} {row.name}")
        _show_run(row, now, events)
