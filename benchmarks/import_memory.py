"""Memory that importing a Hugging Face checkpoint takes on each rank: streamed boxes beside loading the file whole.

python benchmarks/import_memory.py [--hidden 1024] [--layers 12] [--json FILE] writes a random model, imports it on four
gloo processes as fsdp4 and as fsdp2_tp2, checks some parameters against the file, and prints a table. Anonymous memory
(RssAnon) is what a process owns; total RSS also counts pages of mapped files, which the kernel takes back at need.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llama import hf
from llama.config import Model, Recipe
from llama.device import find_device
from llama.hf.weights import find_tensors
from llama.model.llama import Llama
from llama.parallel.apply import ParallelLlama, parallelize
from llama.parallel.mesh import Mesh, build_mesh
from llama.parallel.shards import Box, local_part
from llama.recipe import build, lay_out

PROCESSES = 4
LAYOUTS = {"fsdp4": {"tensor_parallel": 1}, "fsdp2_tp2": {"tensor_parallel": 2}}
MIB = 1 << 20
Read = Callable[[str, Box], torch.Tensor]


def memory() -> tuple[int, int]:
    """Bytes of anonymous memory and of all resident memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024


class Peak:
    """Highest memory inside a `with` block over that before it, in bytes; a thread looks every half millisecond."""

    def __enter__(self) -> Peak:
        self.before = self.highest = memory()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def look(self) -> None:
        now = memory()
        self.highest = (max(self.highest[0], now[0]), max(self.highest[1], now[1]))

    def _watch(self) -> None:
        while not self.ended.wait(0.0005):
            self.look()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
        self.look()
        self.anonymous, self.total = (high - low for high, low in zip(self.highest, self.before, strict=True))


def recipe_of(model: Model, layout: str) -> Recipe:
    keys = {
        "name": "import",
        "model": model.model_dump(),
        "data": {"seq_length": 32},
        "train": {"steps": 1, "global_batch_size": 4, "precision": "fp32"},
        "parallel": LAYOUTS[layout],
    }
    return build(keys, "benchmark")


def read_whole(folder: Path) -> Read:
    """What a naive import does: the whole checkpoint in every process's own memory, in the file's type."""
    from safetensors.torch import load_file

    tensors = {name: t.clone() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return lambda name, box: tensors[hf.hf_name(name)][box]


def watched(read: Read, peak: Peak) -> Read:
    """`read` with a look at the memory while its result is held."""

    def reading(name: str, box: Box) -> torch.Tensor:
        part = read(name, box)
        peak.look()
        return part

    return reading


def matches(model: ParallelLlama, folder: Path) -> bool:
    """Whether some parameters, gathered, are the file's. Collective."""
    from safetensors import safe_open

    entries, equal = find_tensors(folder), True
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and not name.startswith("layers.1."):
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        there = hf.hf_name(name)
        with safe_open(entries[there].file, framework="pt") as file:
            expected = file.get_tensor(there)
        equal &= torch.equal(whole[: len(expected)], expected.float())
    return equal


def import_once(rank: int, folder: Path, store: str, layout: str, whole: bool, answer: Connection) -> None:
    """One rank's import; sends what it measured."""
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(
        logging.ERROR
    )  # gathering for the check is not fast; no matter
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=PROCESSES)
    config, device = hf.model_config(folder), find_device("cpu")
    recipe = recipe_of(config, layout)
    mesh: Mesh = build_mesh(lay_out(recipe, PROCESSES), device.type)
    tiny = config.model_copy(update={"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "vocab_size": 256})
    parallelize(recipe_of(tiny, layout), mesh, device)  # so that modules imported on first use count as the baseline
    dist.barrier()
    start = time.perf_counter()
    with Peak() as peak:
        read = read_whole(folder) if whole else hf.checkpoint_reader(folder, config)
        model = parallelize(recipe, mesh, device, watched(read, peak))
        del read
    seconds = time.perf_counter() - start
    shard = sum(part.numel() * part.element_size() for _, p in model.named_parameters() for part in [local_part(p)[0]])
    dist.barrier()
    answer.send(
        {
            "rank": rank,
            "shard_bytes": shard,
            "peak_anonymous_bytes": peak.anonymous,
            "peak_total_bytes": peak.total,
            "seconds": round(seconds, 3),
            "equal": matches(model, folder),
        }
    )
    dist.barrier()
    dist.destroy_process_group()


def measure(folder: Path, layout: str, whole: bool) -> list[dict[str, Any]]:
    """Import in fresh processes; one report a rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as aside:
        pipes = [context.Pipe(duplex=False) for _ in range(PROCESSES)]
        processes = [
            context.Process(target=import_once, args=(rank, folder, f"{aside}/store", layout, whole, pipes[rank][1]))
            for rank in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()  # so that a process that dies is an EOFError here, not silence
        reports = [receiver.recv() for receiver, _ in pipes]
        for process in processes:
            process.join()
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--json", type=Path, help="where to write the result; nowhere when not given")
    wanted = parser.parse_args()
    config = Model(
        vocab_size=wanted.vocabulary,
        hidden_size=wanted.hidden,
        intermediate_size=wanted.hidden * 11 // 4,
        num_layers=wanted.layers,
        num_heads=16,
        num_kv_heads=8,
    )
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "model"
        model = Llama(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.02)
        hf.save_model(model, folder, "bfloat16", max_shard_size=200_000_000)
        sizes = [parameter.numel() * 2 for parameter in model.parameters()]
        del model
        report: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "model": config.model_dump(exclude_defaults=True),
            "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "largest_tensor_bytes": max(sizes),
            "weights": "bfloat16 in the file, float32 in memory",
            "runs": [],
        }
        megabytes = {key: report[f"{key}_bytes"] / MIB for key in ("checkpoint", "largest_tensor")}
        print(
            f"checkpoint {megabytes['checkpoint']:.0f} MiB, largest tensor {megabytes['largest_tensor']:.0f} MiB (bf16)"
        )
        print(
            f"{'layout':10} {'import':9} {'rank':>4} {'shard fp32':>11} {'anonymous':>10} {'with files':>11} {'s':>6}  equal"
        )
        for layout in LAYOUTS:
            for whole in (False, True):
                ranks = measure(folder, layout, whole)
                report["runs"].append({"layout": layout, "import": "whole" if whole else "streamed", "ranks": ranks})
                for r in ranks:
                    print(
                        f"{layout:10} {'whole' if whole else 'streamed':9} {r['rank']:4} {r['shard_bytes'] / MIB:11.1f} "
                        f"{r['peak_anonymous_bytes'] / MIB:10.1f} {r['peak_total_bytes'] / MIB:11.1f} "
                        f"{r['seconds']:6.2f}  {r['equal']}"
                    )
    if wanted.json:
        wanted.json.parent.mkdir(parents=True, exist_ok=True)
        wanted.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
