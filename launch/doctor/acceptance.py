"""`herd doctor --acceptance`: does this accelerator train as a CPU does? Small real runs of both, compared, in one report.

The same recipe, weights and batches: first on the CPU in fp32, then on the device in each of the ways that a cluster
would use it. Each step is a `herd` command that stands in the report, and is not done again when the folder has it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from data_prep.errors import UserError
from launch.compare import write
from launch.doctor.facts import NodeFacts
from launch.doctor.rules import Finding

STEPS = 180
"""On a healthy CPU bf16_sr is undecided by the gradient norm after 120."""
SHOWN = (1, 2, 10, 60, 120, STEPS)
"""Steps whose losses stand in the report, so that it says something without the pictures."""
COMMON = (
    f"train.steps={STEPS}", "model.num_kv_heads=2", "checkpoint.interval=0", "checkpoint.at_end=false",
    "validation.interval=0", "log.interval=1", "optimizer.lr=1e-3", "schedule.min_lr=1e-4",
)  # fmt: skip
"""Gentle steps: at the demo's own rate bf16 and fp32 part by 1 % in 120 steps without a fault, at this one by 0.004 %."""
VERDICTS = {0: "pass", 1: "FAIL", 3: "undecided"}
"""By the exit code of herd compare."""


@dataclass(frozen=True)
class Way:
    """One way to train: processes and overrides."""

    name: str
    processes: int
    overrides: tuple[str, ...]


def ways(device: str, count: int) -> list[Way]:
    """How a device with `count` ranks is tried. One rank in fp32 comes first: what fails there is the device itself."""
    found = [Way("fp32", 1, ("train.precision=fp32",)), Way("bf16_mixed", 1, ("train.precision=bf16_mixed",))]
    found.append(Way("bf16_sr", 1, ("train.precision=bf16_sr",)))
    found.append(Way("compiled", 1, ("train.precision=bf16_mixed", "train.compile=true")))
    if count > 1:
        found.append(Way("fsdp", 2, ("train.precision=fp32",)))
        found.append(Way("tensor", 2, ("train.precision=fp32", "parallel.tensor_parallel=2")))
        if device != "neuron":  # which has no pipelines
            found.append(Way("pipeline", 2, ("train.precision=fp32", "parallel.pipeline_parallel=2")))
    return found


def run(folder: Path, device: str, count: int, facts: NodeFacts, findings: Sequence[Finding]) -> int:
    """Train, compare, write FOLDER/report.md and report.json; 1 when any way failed, else 0.

    device: cpu, cuda or neuron. count: ranks of this machine. Raises UserError when the reference cannot be trained.
    """
    data, lines = folder / "data", folder / "steps.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(lines)
    record.do("text", ["prep", "demo-text", str(data), "--megabytes", "1.8", "--vocab-size", "1024"])
    tokens = ["prep", "tokenize", str(data / "text.jsonl"), "--tokenizer", str(data / "tokenizer.model")]
    record.do("tokens", [*tokens, "--output", str(data / "text"), "--overwrite"])
    reference = _train(record, folder, data, Way("cpu", 1, ("train.precision=fp32",)), "cpu")
    if any(each["code"] for each in record.done.values()):
        bad = next(each for each in record.done.values() if each["code"])
        raise UserError(f"the CPU's own part failed: {bad['command']}: {bad['said']}; mend that first")
    results = []
    for way in ways(device, count):
        mine = _train(record, folder, data, way, device)
        trained = record.done[way.name]
        result: dict[str, Any] = {"way": way.name, "processes": way.processes, "overrides": list(way.overrides)}
        result |= {"seconds": trained["seconds"], "command": trained["command"]}
        if trained["code"]:
            result |= {"verdict": "FAIL", "text": f"it did not train: {trained['said']}"}
        else:
            told = ["compare", "--reference", str(reference), str(mine), "--same-start", "--json"]
            judged = record.do(f"compare-{way.name}", [*told, "--to", str(folder / f"{way.name}.png")], again=True)
            result |= {"verdict": VERDICTS.get(judged["code"], "FAIL"), "text": _sentence(judged)}
        click.echo(f"{way.name:12} {result['verdict']:10} {result['text']}")
        results.append(result)
    write_report(folder, device, facts, findings, record, results)
    click.echo(f"{overall(results)}; report: {folder / 'report.md'}")
    return int(any(result["verdict"] == "FAIL" for result in results))


class Record:
    """The commands that were run, kept in a file, so that an interrupted acceptance goes on."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, dict[str, dict[str, Any]]()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.done[entry["name"]] = entry

    def do(self, name: str, words: Sequence[str], again: bool = False, **environment: str) -> dict[str, Any]:
        """Run `herd WORDS` unless it was, successfully, with the same words."""
        shown = " ".join([*(f"{key}={value}" for key, value in environment.items()), "herd", shlex.join(words)])
        known = self.done.get(name)
        if known and known["command"] == shown and not known["code"] and not again:
            return known
        click.echo(shown, err=True)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *words],
            env=os.environ | _here() | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        entry = {
            "name": name, "command": shown, "code": done.returncode, "seconds": round(time.monotonic() - start, 1),
            "said": next((line for line in last if line.startswith("herd: ")), last[-1] if last else "nothing"),
            "out": done.stdout if name.startswith("compare-") else "",
        }  # fmt: skip
        self.done[name] = entry
        write(self.path, "".join(json.dumps(each) + "\n" for each in self.done.values()))
        return entry


def _here() -> Mapping[str, str]:
    """So that `python -m launch.cli` is this herd, wherever it is called."""
    root = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _train(record: Record, folder: Path, data: Path, way: Way, device: str) -> Path:
    """Train one way; its run folder."""
    into = folder / way.name
    keys = (f"data.train={data / 'text'}", f"run_dir={into}", f"name={way.name}", *COMMON, *way.overrides)
    record.do(way.name, ["train", "demo", "--processes", str(way.processes), *keys], HERD_DEVICE=device)
    return into


def _sentence(judged: Mapping[str, Any]) -> str:
    """The verdict of herd compare --json, in its words."""
    try:
        return str(json.loads(judged["out"])["comparisons"][0]["sentence"])
    except (ValueError, KeyError, IndexError, TypeError):
        return str(judged["said"])


def overall(results: Sequence[Mapping[str, Any]]) -> str:
    """How many ways passed, and which did not."""
    words = [
        f"{word}: {', '.join(r['way'] for r in results if r['verdict'] == word)}"
        for word in ("FAIL", "undecided")
        if any(r["verdict"] == word for r in results)
    ]
    passed = sum(r["verdict"] == "pass" for r in results)
    return "; ".join([f"{passed} of {len(results)} ways pass", *words])


def losses(folder: Path, names: Sequence[str]) -> list[str]:
    """A table of the losses at a few steps by way; those that did not train are left out."""
    from llama.compare.events import find_tag, read_run

    rows = ["| way |" + "".join(f" step {step} |" for step in SHOWN), "|---" * (len(SHOWN) + 1) + "|"]
    for name in names:
        try:
            curves = read_run(folder / name)
        except UserError:
            continue
        if tag := find_tag(curves, "loss"):
            found = dict(zip(*curves[tag], strict=True))
            rows.append(f"| {name} |" + "".join(f" {found[s]:.5f} |" if s in found else " – |" for s in SHOWN))
    return rows


def in_units(name: str, value: float) -> str:
    """A measured speed for people."""
    return f"{value / 1e9:,.0f} GFLOP/s" if name == "matrix products" else f"copied at {value / 1e9:,.0f} GB/s"


def write_report(
    folder: Path,
    device: str,
    facts: NodeFacts,
    findings: Sequence[Finding],
    record: Record,
    results: Sequence[Mapping[str, Any]],
) -> None:
    """FOLDER/report.md for people, report.json for scripts."""
    rows = [
        f"| {r['way']} | {r['processes']} | **{r['verdict']}** | {r['text']} | {r['seconds']:.0f} |" for r in results
    ]
    own = {name: value for name, value in facts.own.items() if name != "address"}  # nobody's business in an issue
    text = "\n".join(
        [
            f"# herd acceptance of `{device}` on {facts.node}: {overall(results)}",
            "",
            f"{STEPS} steps of the recipe `demo`, the same weights and batches as on one CPU process in fp32, "
            f"{time.strftime('%Y-%m-%d')}.",
            "`herd compare` says what its rules are (docs/compare.md). An undecided way is no fault: too few steps to tell.",
            "",
            "| way | processes | verdict | in words | seconds |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Losses",
            "",
            *losses(folder, ["cpu", *(str(r["way"]) for r in results)]),
            "",
            "## This machine",
            "",
            *(f"- {name}: {value}" for name, value in {**facts.same, **own}.items()),
            *(f"- {name}: {in_units(name, value)}" for name, value in facts.speeds.items()),
            *(f"- **{each.level}**: {each.text}. {each.remedy}" for each in findings),
            "",
            "## Commands",
            "",
            "```bash",
            *(each["command"].replace(str(folder), "acceptance") for each in record.done.values()),
            "```",
            "",
        ]
    )
    write(folder / "report.md", text)
    write(
        folder / "report.json",
        json.dumps({"device": device, "facts": facts.same, "speeds": facts.speeds, "results": list(results)}, indent=2),
    )
