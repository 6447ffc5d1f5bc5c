"""Which faults `herd compare` finds, and what it lets pass: real training runs of a tiny Llama, some with a planted fault.

python benchmarks/parity_faults.py [--folder DIR] [--json FILE] [--fixtures DIR] makes the demo text, trains each case
with our own trainer (0.4 million parameters, 400 steps of 512 tokens, one thread a process, two processes at a time,
fourteen minutes on two busy cores), compares each with its reference and prints what every rule said. Runs that are in DIR already are
not trained again. A fault is a patch in this file; package code knows nothing of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import llama.data.batches as batches
import llama.model.attention as attention
import llama.parallel.apply as apply
import llama.train.loop as loop
import llama.train.optim as optim
from llama import recipe as recipes
from llama.compare import Comparison, Options, compare, open_run
from llama.compare.rules import percent
from llama.run_folder import complete

STEPS, BATCH, LENGTH = 400, 8, 64
EOD = 2
Patch = contextlib.AbstractContextManager[None]


@contextlib.contextmanager
def patched(place: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`place.name` replaced by make(its old value)."""
    old = getattr(place, name)
    setattr(place, name, make(old))
    try:
        yield
    finally:
        setattr(place, name, old)


def gradients_too_large(factor: float = 1.02, after: int = 50) -> Patch:
    """Every gradient multiplied once the run is `after` steps old, before its norm is taken."""

    def make(old: Any) -> Any:
        def forward_backward(self: Any, parts: Any) -> torch.Tensor:
            loss: torch.Tensor = old(self, parts)
            if parts[0].cursor >= after * BATCH:
                for _, parameter in self.optimized_parameters():
                    parameter.grad.mul_(factor)
            return loss

        return forward_backward

    return patched(apply.ParallelLlama, "forward_backward", make)


def halves_swapped() -> Patch:
    """Rotary embedding takes the second half of each head for the first."""

    def make(old: Any) -> Any:
        def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return old(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), cos, sin)

        return rotate

    return patched(attention, "rotate", make)


def rounded_to_nearest() -> Patch:
    """bf16 weights take the nearest value instead of a random neighbour: small updates are lost."""
    return patched(optim, "stochastic_round", lambda old: lambda x, generator: x.to(torch.bfloat16))


def mask_shifted() -> Patch:
    """The mask of labels lies one token too early."""

    def make(old: Any) -> Any:
        def arrays(self: Any, numbers: list[int]) -> Any:
            tokens, labels, positions, documents = old(self, numbers)
            true = self.samples
            whole = torch.from_numpy(tokens).roll(-1, 1).numpy()
            labels = whole.copy()
            for row, number in enumerate(numbers):
                labels[row] = true[number][1:]
            masked = tokens == self.eod
            masked[:, :-1] = masked[:, 1:]
            labels[masked] = batches.IGNORED
            return tokens, labels, positions, documents

        return arrays

    return patched(batches.Batches, "_arrays", make)


def rank_reads_anothers() -> Patch:
    """Data rank 1 reads the samples of data rank 0."""

    def make(old: Any) -> Any:
        def sample_numbers(self: Any, cursor: int) -> list[list[int]]:
            own, self.data_rank = self.data_rank, 0
            try:
                return old(self, cursor)  # type: ignore[no-any-return]
            finally:
                self.data_rank = own

        return sample_numbers

    return patched(batches.Batches, "sample_numbers", make)


def everything_decays() -> Patch:
    """Weight decay reaches the norms' scales too."""

    def make(old: Any) -> Any:
        def build_optimizer(*args: Any) -> Any:
            optimizer = old(*args)
            for group in optimizer.param_groups:
                group["weight_decay"] = max(g["weight_decay"] for g in optimizer.param_groups)
            return optimizer

        return build_optimizer

    return patched(loop, "build_optimizer", make)


@dataclass(frozen=True)
class Run:
    """One training run."""

    changes: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    fault: Callable[[], Patch] | None = None
    start: str | None = None
    """The run whose last weights this one starts from."""


@dataclass(frozen=True)
class Case:
    """A comparison, and what it should say."""

    references: tuple[str, ...]
    candidate: str
    wanted: str
    what: str


LOW = {
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


def recipe_of(name: str, folder: Path) -> Any:
    """The recipe of a case."""
    run = RUNS[name]
    keys: dict[str, Any] = {
        "name": name, "run_dir": str(folder / name),
        "model": dict(vocab_size=1024, hidden_size=96, intermediate_size=256, num_layers=3, num_heads=4, num_kv_heads=2,
                      max_position=LENGTH, tie_embeddings=True, init_std=0.05),
        "data": {"train": "text", "seq_length": LENGTH, "split": "100,0,0", "eod": EOD},
        "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": BATCH // run.ranks, "precision": "fp32"},
        "optimizer": {"lr": 3e-3}, "schedule": {"kind": "cosine", "warmup_steps": 20, "min_lr": 3e-4},
        "checkpoint": {"interval": 0, "save_async": False},
    }  # fmt: skip
    if run.changes.get("parallel.tensor_parallel"):
        keys["train"]["micro_batch_size"] = BATCH
    for dotted, value in run.changes.items():
        section, key = dotted.split(".")
        keys.setdefault(section, {})[key] = value
    keys["data"]["train"] = str(folder / "data" / keys["data"]["train"])
    if run.start:
        keys["train"]["init_from"] = str(folder / f"{run.start}-exported")
        keys["data"]["seed"] = 99  # other text first than the run before
    return recipes.build(keys, name)


def work(name: str, folder: Path, rank: int, meeting: str) -> None:
    """One rank of a run, in a process of its own."""
    run = RUNS[name]
    os.environ.update(
        HERD_DEVICE="cpu", HERD_PREFLIGHT="0", RANK=str(rank), WORLD_SIZE=str(run.ranks), LOCAL_RANK=str(rank)
    )
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=run.ranks)
    with run.fault() if run.fault else contextlib.nullcontext():
        loop.train(recipe_of(name, folder))
    dist.barrier()
    os._exit(0)


def train_all(folder: Path) -> None:
    """Every run that is not there yet, two processes at a time."""
    context = multiprocessing.get_context("fork")  # torch is loaded once; nothing was computed in this process
    busy: list[tuple[str, list[Any], float]] = []
    with tempfile.TemporaryDirectory() as meetings:
        waiting = [name for name in RUNS if not complete(folder / name)]
        while waiting or busy:
            for name in list(waiting):
                run = RUNS[name]
                if sum(len(processes) for _, processes, _ in busy) + run.ranks > 2 or (
                    run.start and not complete(folder / run.start)
                ):
                    continue
                if run.start and not (folder / f"{run.start}-exported").exists():
                    if not busy:
                        give_weights(folder, run.start)
                    else:
                        continue
                waiting.remove(name)
                processes = [
                    context.Process(target=work, args=(name, folder, rank, f"{meetings}/{name}"))
                    for rank in range(run.ranks)
                ]
                for process in processes:
                    process.start()
                busy.append((name, processes, time.monotonic()))
            time.sleep(0.05)
            for job in list(busy):
                name, processes, began = job
                if all(process.exitcode is not None for process in processes):
                    busy.remove(job)
                    if any(process.exitcode for process in processes):
                        raise SystemExit(f"{name} failed: see {folder / name}.log")
                    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def give_weights(folder: Path, name: str) -> None:
    """Export a run's last weights, so that others start from them; in a process of its own, this one only forks."""
    source = "import sys; from llama import hf, recipe as r; hf.export(sys.argv[1], r.load(sys.argv[2]), sys.argv[3], 'float32')"
    checkpoint = complete(folder / name)[-1]
    command = [
        sys.executable,
        "-c",
        source,
        str(checkpoint),
        str(folder / name / "recipe.yaml"),
        str(folder / f"{name}-exported"),
    ]
    subprocess.run(command, check=True)


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
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="herd-parity-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        make_text(folder)
        train_all(folder)
        rows = judge(folder)
        if options.fixtures:
            write_fixtures(folder, options.fixtures)
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "model": "0.4 million parameters, 512 tokens a step, 400 steps (tails 600, continuations 200)",
        "seconds": round(time.monotonic() - began),
        "as_wanted": sum(row["verdict"] == row["wanted"] for row in rows),
        "cases": len(rows),
        "table": rows,
    }
    print(f"{figures['as_wanted']} of {figures['cases']} as wanted, {figures['seconds']} s")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
