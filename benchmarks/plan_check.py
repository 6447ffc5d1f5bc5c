"""Plan against measured: memory and seconds of a step as `herd plan` foresees them, and as real processes have them.

    python benchmarks/plan_check.py                          # calibrates first, then all cases: about 22 minutes on 2 cores
    python benchmarks/plan_check.py --cases fsdp2 tp2_no_sp  # some

Each case trains a small Llama for a few steps in 1, 2 or 4 processes, started as `herd train` starts them. A step's time
is the median on the slowest rank. Every process notes its resident memory before it has a model, after a step of a tiny
one has brought all code in, and the most that it reached afterwards. What is in use is measured in a run of its own, in
which glibc gives every freed block of 64 KiB and more back at once (MALLOC_MMAP_THRESHOLD_); by default it keeps blocks
of up to 32 MiB, and a process grows by what lies between them too: that is `resident`, which no plan foresees. The plan is
counted dry and by formulas; both must say the same products and messages. Writes benchmarks/results/plan_check-CPU.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
SMALL = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=4, max_position=2048
)  # fmt: skip
WIDE = SMALL | dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_layers=6, num_heads=12)
TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=8, num_heads=8, num_kv_heads=4, max_position=2048
)
LORA = {"rank": 16, "targets": "all-linear"}
# name -> processes, what differs from one process in fp32 on four sequences of 512
CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "single": (1, {}),
    "single_tied_wide": (1, {"model": WIDE | {"tie_embeddings": True}}),
    "single_selective": (1, {"train": {"activation_checkpointing": "selective"}}),
    "single_full": (1, {"train": {"activation_checkpointing": "full"}, "data": {"seq_length": 1024}}),
    "single_bf16_mixed": (1, {"train": {"precision": "bf16_mixed"}}),
    "single_bf16_sr": (1, {"train": {"precision": "bf16_sr"}}),
    "single_lora": (1, {"lora": LORA}),
    "single_dora_int8": (1, {"lora": LORA | {"dora": True, "quantize": "int8"}}),
    "fsdp2": (2, {}),
    "fsdp2_bf16_mixed_full": (2, {"train": {"precision": "bf16_mixed", "activation_checkpointing": "full"}}),
    "fsdp2_lora_bf16_mixed": (2, {"train": {"precision": "bf16_mixed"}, "lora": LORA}),
    "tp2": (2, {"parallel": {"tensor_parallel": 2}}),
    "tp2_no_sp_selective": (
        2,
        {
            "parallel": {"tensor_parallel": 2, "sequence_parallel": False},
            "train": {"activation_checkpointing": "selective"},
        },
    ),
    "pp2_1f1b": (2, {"parallel": {"pipeline_parallel": 2}, "train": {"micro_batch_size": 1}}),
    "pp2_interleaved": (
        2,
        {
            "parallel": {"pipeline_parallel": 2, "pipeline_schedule": "interleaved_1f1b"},
            "train": {"micro_batch_size": 1},
        },
    ),
    "pp2_gpipe": (
        2,
        {"parallel": {"pipeline_parallel": 2, "pipeline_schedule": "gpipe"}, "train": {"micro_batch_size": 1}},
    ),
    "pp2_tp2": (4, {"parallel": {"pipeline_parallel": 2, "tensor_parallel": 2}, "train": {"micro_batch_size": 1}}),
    "fsdp2_tp2": (4, {"parallel": {"tensor_parallel": 2}}),
    "rep2_fsdp2": (4, {"parallel": {"replicate": 2}, "train": {"global_batch_size": 8, "micro_batch_size": 1}}),
}


def recipe(case: str, tiny: bool = False) -> Any:
    """The recipe of a case; `tiny`: of its warm-up."""
    from llama.config import Recipe

    changes = CASES[case][1]
    data = {"seq_length": 512} | changes.get("data", {})
    return Recipe.model_validate(
        {
            "name": "plan_check",
            "model": TINY | {"tie_embeddings": changes.get("model", {}).get("tie_embeddings", False)}
            if tiny
            else changes.get("model", SMALL),
            "data": {"seq_length": 64} if tiny else data,
            "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
            | changes.get("train", {}),
            "parallel": changes.get("parallel", {}),
            "lora": changes.get("lora", {}),
        }
    )


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def steps(config: Any, mesh: Any, device: Any, number: int) -> list[float]:
    """Seconds of each of the trainer's own steps on random tokens."""
    import torch
    import torch.distributed as dist

    from llama.checkpoint_format import TrainState
    from llama.data.batches import Batch
    from llama.parallel.apply import parallelize
    from llama.run_folder import RunFolder
    from llama.train.loop import Trainer
    from llama.train.optim import build_optimizer
    from llama.train.signals import StopRequest
    from llama.train.watchdog import Watchdog

    model = parallelize(config, mesh, device)
    trainer = Trainer(
        config, device, model, build_optimizer(model, config, device), SimpleNamespace(seconds=0.0), None, TrainState(),  # type: ignore[arg-type]
        StopRequest(), Watchdog(RunFolder(Path()), 0, 0, [], 0.0),
    )  # fmt: skip
    rows, length = config.train.micro_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(mesh.data_rank)
    positions = torch.arange(length, dtype=torch.int32).repeat(rows, 1)
    one_document = torch.zeros(rows, length, dtype=torch.int32)

    def batches() -> Any:
        while True:
            tokens = torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=generator)
            made = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, one_document, 0)
            yield [made] * mesh.layout.accumulation

    feed, times = batches(), []
    gc.collect()
    gc.disable()
    for _ in range(number):
        dist.barrier()
        started = time.perf_counter()
        trainer.step(feed)
        device.synchronize()
        times.append(time.perf_counter() - started)
    gc.enable()
    return times


def child(case: str, number: int, folder: Path) -> None:
    """One rank of a case; leaves what it measured in `folder`."""
    import torch.distributed as dist

    from llama.device import find_device
    from llama.layout import layout
    from llama.parallel.mesh import build_mesh

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = find_device()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    config = recipe(case)
    mesh = build_mesh(layout(config, world), device.type)
    steps(recipe(case, tiny=True), mesh, device, 2)
    gc.collect()
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far is forgotten
    times = steps(config, mesh, device, number)
    (folder / f"{rank}.json").write_text(json.dumps({"base": base, "growth": status("VmHWM") - base, "seconds": times}))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: str, number: int, exact: bool = False) -> list[dict[str, Any]]:
    """What each rank of a case measured; `exact`: with memory given back as soon as it is free."""
    world = CASES[case][0]
    with tempfile.TemporaryDirectory(prefix="plan_check-") as folder:
        environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}", "WORLD_SIZE": str(world)}
        if exact:
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        if world > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", case, str(number), folder],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]
        if max(abs(process.wait()) for process in ranks):
            raise SystemExit(f"case {case}: a process failed")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def work(counts: Any) -> tuple[list[str], list[str]]:
    """Products and messages, to be held against others; without the few bytes in which a pipeline's ranks first meet."""
    messages = (message for message in counts.collectives if message.bytes > 4)
    return sorted(map(str, counts.products)), sorted(map(str, messages))


def compare(case: str, ranks: list[dict[str, Any]], exact: list[dict[str, Any]], rates: Any) -> dict[str, Any]:
    """The plan of a case beside what its ranks measured; errors are those of the plan, as a share of the measured."""
    from llama.layout import layout
    from llama.plan.analytic import foresee
    from llama.plan.dry import count
    from llama.plan.speed import step_time

    config, world = recipe(case), CASES[case][0]
    laid = layout(config, world)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a count joins a process group
        dry = pool.starmap(count, [(config, world, rank) for rank in range(world)], chunksize=1)
    formulas = [foresee(config, world, rank) for rank in range(world)]
    steps = [step_time(counts, config, laid, rates) for counts in dry]
    slowest = max(steps, key=lambda step: step.total)
    # Of the rank on which the plan is furthest off.
    held = [(rank["growth"], d.memory.peak, f.memory.peak) for rank, d, f in zip(exact, dry, formulas, strict=True)]
    grown, by_dry, by_formulas = max(held, key=lambda h: abs(h[1] / h[0] - 1))
    seconds = max(statistics.median(rank["seconds"][2:]) for rank in ranks)
    equal = all(work(a) == work(b) for a, b in zip(dry, formulas, strict=True))
    return {
        "case": case, "processes": world, "changes": CASES[case][1], "equal": equal, "ranks": ranks, "exact": exact,
        "memory": {
            "resident": max(rank["growth"] for rank in ranks), "in_use": grown, "dry": by_dry, "foreseen": by_formulas,
            "error_dry": by_dry / grown - 1, "error_foreseen": by_formulas / grown - 1,
        },
        "seconds": {
            "measured": seconds, "plan": slowest.total, "error": slowest.total / seconds - 1, "parts": vars(slowest),
        },
    }  # fmt: skip


HEAD = f"{'':22}" + "".join(f"{word:>10}" for word in ("resident", "in use MB", "dry", "formulas"))
HEAD += f"{'dry %':>8}{'form. %':>8}{'step s':>10}{'plan':>8}{'%':>8}  equal"


def line(row: dict[str, Any]) -> str:
    """A case in the table."""
    m, s = row["memory"], row["seconds"]
    sizes = "".join(f"{m[key] / 1e6:10.0f}" for key in ("resident", "in_use", "dry", "foreseen"))
    errors = f"{m['error_dry']:8.1%}{m['error_foreseen']:8.1%}"
    return f"{row['case']:22}{sizes}{errors}{s['measured']:10.3f}{s['plan']:8.3f}{s['error']:8.1%}  {row['equal']}"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from llama.device import find_device

    return {
        "device": find_device().name, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--old-rates", action="store_true", help="those of an earlier calibration")
    parser.add_argument("--talk", action="store_true", help="print what a step's seconds are made of")
    parser.add_argument("--to", type=Path, default=HERE / "results" / "plan_check-CPU.json", help="result file")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    from llama.plan.calibrate import calibrate, load_rates, save_rates

    if options.child:
        child(options.child[0], int(options.child[1]), Path(options.child[2]))
        return
    results: list[dict[str, Any]] = []
    rates: dict[int, Any] = {}
    for case in sorted(options.cases, key=lambda case: CASES[case][0]):
        world = CASES[case][0]
        if world not in rates:  # shortly before it is needed: a virtual machine is not as fast at all hours
            rates[world] = load_rates(world) if options.old_rates else calibrate(world)
            save_rates(rates[world])
            print(f"{world} processes: {rates[world].source}\n{HEAD}", flush=True)
        exact = measure(case, 3, exact=True)
        timed = measure(case, options.steps)
        try:
            row = compare(case, timed, exact, rates[world])
        except Exception as error:
            print(f"{case}: no plan: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        results.append(row)
        print(line(row), flush=True)
        if options.talk:
            print("   ", {key: round(value, 4) for key, value in row["seconds"]["parts"].items()}, flush=True)
        kept = {str(world): found.to_json() for world, found in rates.items()}
        whole = {"machine": machine(), "command": sys.argv, "results": results, "rates": kept}
        options.to.parent.mkdir(parents=True, exist_ok=True)
        options.to.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"written to {options.to}")


if __name__ == "__main__":
    main()
