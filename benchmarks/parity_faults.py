"""Which faults `herd compare` finds, and what it lets pass: real training runs of a tiny Llama, some with a planted fault.

python benchmarks/parity_faults.py [--folder DIR] [--json FILE] [--fixtures DIR] makes the demo text, trains each case
with our own trainer (0.4 million parameters, 400 steps of 512 tokens, one thread a process, two processes at a time,
fourteen minutes on two busy cores), compares each with its reference and prints what every rule said. Runs that are in DIR already are
not trained again. A fault is a patch in parity_patches.py; package code knows nothing of it.

The tolerances of `herd compare` were chosen on these runs. --held-out trains and judges others, on which nothing was
(parity_held_out.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parity_held_out
from parity_patches import (
    everything_decays,
    gradients_too_large,
    halves_swapped,
    mask_shifted,
    rank_reads_anothers,
    rounded_to_nearest,
)
from parity_runs import Run, train_all

from llama.compare import Comparison, Options, compare, open_run
from llama.compare.rules import percent

STEPS, BATCH, LENGTH = 400, 8, 64
BASE = {
    "model.vocab_size": 1024, "model.hidden_size": 96, "model.intermediate_size": 256, "model.num_layers": 3,
    "model.num_heads": 4, "model.num_kv_heads": 2, "model.max_position": LENGTH, "model.tie_embeddings": True,
    "model.init_std": 0.05, "data.train": "text", "data.seq_length": LENGTH, "train.steps": STEPS,
    "train.global_batch_size": BATCH, "optimizer.lr": 3e-3, "schedule.kind": "cosine", "schedule.warmup_steps": 20,
    "schedule.min_lr": 3e-4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A comparison, and what it should say."""

    references: tuple[str, ...]
    candidate: str
    wanted: str
    what: str


LOW = {
    "data.seed": 99,  # other text first than the run before
    "train.steps": 600,
    "optimizer.lr": 3e-5,
    "schedule.kind": "constant",
    "schedule.warmup_steps": 0,
    "schedule.min_lr": 0.0,
}
MASKED = {"data.train": "lines", "data.mask_eod_loss": True}
RUNS = {
    "reference": Run(),
    "seed_2": Run({"train.seed": 2}),
    "seed_3": Run({"train.seed": 3}),
    "seed_4": Run({"train.seed": 4}),
    "order_5": Run({"train.seed": 5, "data.seed": 5}),
    "bf16_mixed": Run({"train.precision": "bf16_mixed"}),
    "bf16_sr": Run({"train.precision": "bf16_sr"}),
    "masked": Run(MASKED),
    "masked_bf16": Run(MASKED | {"train.precision": "bf16_mixed"}),
    "mask_shifted": Run(MASKED, fault=mask_shifted),
    "gradients_2_percent": Run(fault=gradients_too_large),
    "no_decay_mask": Run(fault=everything_decays),
    "rope_swapped_from_scratch": Run(fault=halves_swapped),
    "tensor_2": Run({"parallel.tensor_parallel": 2}, ranks=2),
    "fsdp_2": Run(ranks=2),
    "rank_reads_anothers": Run(ranks=2, fault=rank_reads_anothers),
    "tail": Run(LOW | {"train.precision": "bf16_mixed"}, start="reference"),
    "tail_sr": Run(LOW | {"train.precision": "bf16_sr"}, start="reference"),
    "tail_nearest": Run(LOW | {"train.precision": "bf16_sr"}, start="reference", fault=rounded_to_nearest),
    "goes_on": Run(LOW | {"optimizer.lr": 3e-4, "train.steps": 200}, start="reference"),
    "goes_on_bf16": Run(LOW | {"optimizer.lr": 3e-4, "train.steps": 200, "train.precision": "bf16_mixed"}, start="reference"),
    "rope_swapped_goes_on": Run(LOW | {"optimizer.lr": 3e-4, "train.steps": 200}, start="reference", fault=halves_swapped),
}  # fmt: skip


CASES = (
    Case(("reference", "seed_2"), "seed_3", "pass", "a third seed of the weights, against two"),
    Case(("reference", "seed_2", "seed_3"), "seed_4", "pass", "a fourth seed, against three"),
    Case(("reference",), "tensor_2", "pass", "tensor parallel over 2 ranks against one process"),
    Case(("reference",), "fsdp_2", "pass", "FSDP over 2 ranks against one process"),
    Case(("reference",), "bf16_mixed", "pass", "bf16_mixed against fp32"),
    Case(("bf16_mixed",), "bf16_sr", "pass", "bf16_sr against bf16_mixed"),
    Case(("masked",), "masked_bf16", "pass", "masked labels, bf16_mixed against fp32"),
    Case(("tail",), "tail_sr", "pass", "a tail of low learning rate, bf16_sr against bf16_mixed"),
    Case(("goes_on",), "goes_on_bf16", "pass", "on from trained weights, bf16_mixed against fp32"),
    Case(("seed_2",), "reference", "undecided", "two seeds and nothing else: no band, so no blame and no praise"),
    Case(("seed_3", "seed_4"), "order_5", "undecided", "another seed of the order: batches differ, so pairing is lost"),
    Case(("reference",), "gradients_2_percent", "fail", "gradients 2 % too large after step 50"),
    Case(("goes_on",), "rope_swapped_goes_on", "fail", "RoPE halves swapped over trained weights"),
    Case(("reference",), "rope_swapped_from_scratch", "fail", "RoPE halves swapped from the first step on"),
    Case(("tail",), "tail_nearest", "fail", "bf16 weights without stochastic rounding, low learning rate"),
    Case(("masked",), "mask_shifted", "fail", "label mask shifted by one"),
    Case(("reference",), "rank_reads_anothers", "fail", "one of two data ranks reads the other's samples"),
    Case(("reference",), "no_decay_mask", "fail", "weight decay on norms too"),
)
FIXTURES = (
    "reference", "seed_2", "seed_3", "order_5", "tensor_2", "bf16_mixed", "bf16_sr", "gradients_2_percent", "no_decay_mask",
    "masked", "mask_shifted", "rank_reads_anothers", "goes_on", "rope_swapped_goes_on", "tail", "tail_sr", "tail_nearest",
)  # fmt: skip


def make_text(folder: Path) -> None:
    """The demo text as documents, and line by line: many short documents, for masks."""
    data = folder / "data"
    if (data / "lines.bin").exists():
        return
    herd = [sys.executable, "-m", "launch.cli", "prep"]
    run = dict(check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*herd, "demo-text", str(data), "--megabytes", "4", "--vocab-size", "1024"], **run)  # type: ignore[call-overload]
    lines = [
        line for row in (data / "text.jsonl").open() for line in json.loads(row)["text"].splitlines() if len(line) > 20
    ]
    (data / "lines.txt").write_text("\n".join(lines))
    for source, name, more in (("text.jsonl", "text", []), ("lines.txt", "lines", ["--text-documents", "line"])):
        command = [
            *herd,
            "tokenize",
            str(data / source),
            "--tokenizer",
            str(data / "tokenizer.model"),
            "--output",
            str(data / name),
        ]
        subprocess.run([*command, *more, "--overwrite"], **run)  # type: ignore[call-overload]


def judge(folder: Path) -> list[dict[str, Any]]:
    """Every case compared; a row each, printed as it comes."""
    rows = []
    for case in CASES:
        references, candidate = [open_run(folder / name) for name in case.references], open_run(folder / case.candidate)
        found = compare(references, candidate)
        rules = {
            f.rule: {"verdict": f.verdict, "value": f.value, "low": f.low, "high": f.high, "detectable": f.detectable}
            for f in found.findings
        }
        rows.append({
            "case": case.candidate, "what": case.what, "references": list(case.references), "wanted": case.wanted,
            "verdict": found.verdict, "pairing": round(found.pairing, 1), "same_start": found.same_start, "rules": rules,
            **({} if found.same_start else {"band": {what: band.half for what, band in found.band.items()}}),
        })  # fmt: skip
        said = ", ".join(in_short(found, rule) for rule in rules if rule != "finite")
        sign = "as wanted" if found.verdict == case.wanted else f"WANTED {case.wanted}"
        print(f"{case.what}: {found.verdict} ({sign})\n    {said}", flush=True)
    # A run of another precision claims no exact start: how the strict bounds of fp32 are needed for a symmetry.
    loose = compare(
        [open_run(folder / "reference")], open_run(folder / "rope_swapped_from_scratch"), Options(same_start=False)
    )
    print(f"RoPE halves swapped from the first step on, without the opening: {loose.verdict}", flush=True)
    return rows


def in_short(found: Comparison, rule: str) -> str:
    """What a rule said, in a few characters."""
    finding = next(f for f in found.findings if f.rule == rule)
    return f"{rule} {finding.verdict}" + ("" if finding.value is None else f" {percent(finding.value)}")


def write_fixtures(folder: Path, to: Path) -> None:
    """Curves of some runs as JSON, for tests."""
    tags = {"reduced_train_loss": 5, "gradient_norm": 4, "parameter_norm": 5}
    to.mkdir(parents=True, exist_ok=True)
    for name in FIXTURES:
        curves = open_run(folder / name).curves
        kept = {
            tag: {"steps": curves[tag].steps, "values": [float(f"{value:.{digits}g}") for value in curves[tag].values]}
            for tag, digits in tags.items()
        }
        (to / f"{name}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder when not given")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--fixtures", type=Path, help="also write curves of the runs here, for tests")
    parser.add_argument("--held-out", action="store_true", help="the set on which nothing was chosen")
    options = parser.parse_args()
    began = time.monotonic()
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory(prefix="herd-parity-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if options.held_out:
            parity_held_out.make_text(folder)
            train_all(parity_held_out.runs(), folder)
            found = parity_held_out.judge(folder)
            figures |= {"totals": parity_held_out.totals(found), **found}
            print("\n".join(f"{what}: {counts}" for what, counts in figures["totals"].items()))
        else:
            make_text(folder)
            train_all({name: replace(run, base=BASE) for name, run in RUNS.items()}, folder)
            rows = judge(folder)
            figures |= {
                "model": "0.4 million parameters, 512 tokens a step, 400 steps (tails 600, continuations 200)",
                "as_wanted": sum(row["verdict"] == row["wanted"] for row in rows),
                "cases": len(rows),
                "table": rows,
            }
            print(f"{figures['as_wanted']} of {figures['cases']} as wanted")
            if options.fixtures:
                write_fixtures(folder, options.fixtures)
    figures["seconds"] = round(time.monotonic() - began)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
