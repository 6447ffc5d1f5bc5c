"""`herd doctor`: what is this machine, or this allocation, and is it fit to train?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from data_prep.errors import UserError
from launch.doctor import facts as looking
from launch.doctor.facts import NodeFacts
from launch.doctor.rules import Finding, judge
from llama.node import gigabytes

START_SECONDS = 300.0
"""For all nodes to answer: loading torch from a busy file server takes a minute."""


@click.command(
    epilog="Example: herd doctor; from a login node: herd doctor --nodes 4 --partition gpu; in a job script: herd doctor"
)
@click.option("--nodes", "-N", type=click.IntRange(1), help="Ask Slurm for so many nodes and look at each.")
@click.option("--partition", "-p", help="Slurm's partition to ask in, with --nodes.")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs go."
)
@click.option("--quick", is_flag=True, help="Measure nothing and do not load torch: a second instead of ten.")
@click.option(
    "--acceptance", is_flag=True, help="Also train on this accelerator and on the CPU, compare, and write a report."
)
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path("acceptance"),
    show_default=True,
    help="Folder of that report.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything that was found, for a script.")
def command(
    nodes: int | None, partition: str | None, run_dir: Path, quick: bool, acceptance: bool, to: Path, as_json: bool
) -> None:
    """What this machine or allocation is, and whether it is fit: versions, devices, limits, disks, speeds.

    Inside a Slurm job of several nodes, or with --nodes, it looks at all of them at once and names the odd one out.
    With --acceptance it trains a small model on this machine's accelerator in the ways that a cluster would use it, compares
    the curves with the CPU's, and writes a report to attach to an issue; the same command goes on where it was stopped.
    Exit code 0: fit; 1: something is bad.
    """
    folders = [("run folder", run_dir.absolute()), ("temporary folder", Path(os.environ.get("TMPDIR", "/tmp")))]
    if cache := os.environ.get("HERD_CACHE"):
        folders.append(("compile cache", Path(cache).absolute()))
    if partition and not nodes:
        raise UserError("--partition goes with --nodes", 2)
    if acceptance and (nodes or quick or as_json):
        raise UserError(
            "--acceptance is for one machine, and shows what it does; leave out --nodes, --quick and --json", 2
        )
    alone = acceptance or "SLURM_STEP_ID" in os.environ
    several = nodes or (1 if alone else int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    if nodes or several > 1:
        found, silent = over_nodes(several, partition, folders, quick)
    else:
        found, silent = [looking.gather(folders, quick)], []
    findings = [
        *(Finding("bad", name, "it gave no answer", "look at it with: srun -w NODE hostname") for name in silent),
        *judge(found),
    ]
    if as_json:
        click.echo(
            json.dumps({"nodes": [asdict(n) for n in found], "findings": [asdict(f) for f in findings]}, indent=2)
        )
    else:
        show(found, findings)
    failed = acceptance and accept(to, found, findings)
    if failed or any(finding.level == "bad" for finding in findings):
        sys.exit(1)


def accept(folder: Path, found: Sequence[NodeFacts], findings: Sequence[Finding]) -> bool:
    """Train and compare on this machine; whether it failed."""
    from launch.doctor.acceptance import run
    from llama.device import find_device

    device = find_device().type
    count = len(os.sched_getaffinity(0)) if device == "cpu" else _devices(device)
    return bool(run(folder, device, count, found[0], findings))


def _devices(kind: str) -> int:
    import torch

    return int(torch.get_device_module(kind).device_count())


def over_nodes(
    count: int, partition: str | None, folders: Sequence[tuple[str, Path]], quick: bool
) -> tuple[list[NodeFacts], list[str]]:
    """Facts of all nodes, each from a task of srun, and the nodes that gave none. Raises UserError without Slurm."""
    if shutil.which("srun") is None:
        raise UserError("no srun here, so only this machine can be looked at; leave out --nodes", 2)
    asked = ["srun", f"--nodes={count}", "--ntasks-per-node=1", "--label", "--kill-on-bad-exit=0"]
    if partition:
        asked.append(f"--partition={partition}")
    told = [f"{what}={path}" for what, path in folders] + ["--quick"] * quick
    command = [*asked, sys.executable, "-m", "launch.doctor.facts", *told]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
            env=os.environ | {"PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the nodes gave no answer within {START_SECONDS:.0f} s; {_words(error.stderr)}") from None
    found = read_answers(done.stdout)
    if not found:
        raise UserError(f"srun gave no answer: {_words(done.stderr)}")
    names = _expected()
    return found, [name for name in names if name not in {facts.node for facts in found}]


def read_answers(text: str) -> list[NodeFacts]:
    """Facts from the labelled lines of srun; other lines, of a module system say, are passed over. By node's name."""
    found = []
    for line in text.splitlines():
        _, _, answer = line.partition(": ")
        if answer.startswith('{"node"'):
            found.append(NodeFacts.of_json(answer))
    return sorted(found, key=lambda facts: facts.node)


def _expected() -> list[str]:
    """The nodes of the job that this runs in; none from a login node."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    names = looking.ask("scontrol", "show", "hostnames", listed) if listed else None
    return (names or "").split()


def _words(said: str | bytes | None) -> str:
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def show(nodes: Sequence[NodeFacts], findings: Sequence[Finding]) -> None:
    """For people: what all nodes share once, what differs by node, then the findings."""
    first = nodes[0]
    click.echo(first.node if len(nodes) == 1 else f"{len(nodes)} nodes: {', '.join(facts.node for facts in nodes)}")
    for name, value in first.same.items():
        values = {facts.same.get(name, "none") for facts in nodes}
        click.echo(f"  {name:24} {value if len(values) == 1 else 'differs, see below'}")
    for facts in nodes:
        if len(nodes) > 1:
            click.echo(facts.node)
        for line in _own(facts):
            click.echo(f"  {line}")
    for finding in findings:
        place = f"{finding.node}: " if len(nodes) > 1 else ""
        click.echo(f"{finding.level.upper()}  {place}{finding.text}\n      {finding.remedy}")
    bad = sorted({finding.node for finding in findings if finding.level == "bad"})
    verdict = f"not fit: {', '.join(bad)}" if bad and len(nodes) > 1 else "not fit" if bad else "fit"
    click.echo(f"{verdict} ({len(findings)} findings)" if findings else verdict)


def _own(facts: NodeFacts) -> list[str]:
    limits = facts.limits
    lines = [
        f"{'memory':24} {gigabytes(limits.get('memory free', 0))} of {gigabytes(limits.get('memory', 0))} free"
        + (f", {gigabytes(limits['/dev/shm free'])} in /dev/shm" if "/dev/shm free" in limits else "")
    ]
    for gpu in facts.gpus:
        lines.append(
            f"{'GPU ' + gpu.get('index', '?'):24} {gpu.get('memory.used')} of {gpu.get('memory.total')} MiB, "
            f"{gpu.get('clocks.sm')} of {gpu.get('clocks.max.sm')} MHz, {gpu.get('temperature.gpu')} degrees"
        )
    for disk in facts.disks:
        speed = f", written at {disk.write / 1e6:,.0f} MB/s, {disk.files:,.0f} small files/s" if disk.write else ""
        free = f"{gigabytes(disk.free)} free" if disk.free is not None else "free space unknown"
        lines.append(f"{disk.what:24} {disk.path} ({disk.type or 'unknown'}): {disk.error or free + speed}")
    if "matrix products" in facts.speeds:
        flops = facts.speeds["matrix products"]
        shown = f"{flops / 1e12:,.0f} TFLOP/s" if flops > 1e12 else f"{flops / 1e9:,.0f} GFLOP/s"
        lines.append(f"{'matrix products':24} {shown}")
    if "memory" in facts.speeds:
        lines.append(f"{'memory copied':24} {facts.speeds['memory'] / 1e9:,.0f} GB/s")
    return lines
