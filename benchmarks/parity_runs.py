"""Training many small runs on few cores, for parity_faults.py: what a run is, its recipe, its processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_patches import EOD, Patch

import llama.train.loop as loop
from llama import recipe as recipes
from llama.run_folder import complete


@dataclass(frozen=True)
class Run:
    """One training run: keys of its recipe, `base` first, `changes` over them."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    fault: Callable[[], Patch] | None = None
    start: str | None = None
    """The run whose last weights this one starts from; with `-untied` behind it, as a model whose output is not tied."""
    base: Mapping[str, Any] = field(default_factory=dict)


def recipe_of(name: str, run: Run, folder: Path) -> Any:
    """The recipe of a run."""
    keys: dict[str, Any] = {
        "name": name, "run_dir": str(folder / name), "data": {"split": "100,0,0", "eod": EOD},
        "checkpoint": {"interval": 0, "save_async": False}, "train": {"precision": "fp32"},
    }  # fmt: skip
    for dotted, value in {**run.base, **run.changes}.items():
        section, key = dotted.split(".")
        keys.setdefault(section, {})[key] = value
    spread = run.ranks // keys.get("parallel", {}).get("tensor_parallel", 1)
    keys["train"].setdefault("micro_batch_size", keys["train"]["global_batch_size"] // spread)
    keys["data"]["train"] = str(folder / "data" / keys["data"]["train"])
    if run.start:
        keys["train"]["init_from"] = str(folder / f"{run.start}-exported")
    return recipes.build(keys, name)


def work(name: str, run: Run, folder: Path, rank: int, meeting: str) -> None:
    """One rank of a run, in a process of its own."""
    os.environ.update(
        HERD_DEVICE="cpu", HERD_PREFLIGHT="0", RANK=str(rank), WORLD_SIZE=str(run.ranks), LOCAL_RANK=str(rank)
    )
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=run.ranks)
    with run.fault() if run.fault else contextlib.nullcontext():
        loop.train(recipe_of(name, run, folder))
    dist.barrier()
    os._exit(0)


def train_all(runs: Mapping[str, Run], folder: Path) -> None:
    """Every run that is not there yet, two processes at a time."""
    context = multiprocessing.get_context("fork")  # torch is loaded once; nothing was computed in this process
    busy: list[tuple[str, list[Any], float]] = []
    with tempfile.TemporaryDirectory() as meetings:
        waiting = [name for name in runs if not complete(folder / name)]
        while waiting or busy:
            for name in list(waiting):
                run = runs[name]
                if sum(len(processes) for _, processes, _ in busy) + run.ranks > 2 or (
                    run.start and not complete(folder / trained(run.start))
                ):
                    continue
                if run.start and not (folder / f"{run.start}-exported").exists():
                    if not busy:
                        give_weights(folder, run.start)
                    else:
                        continue
                waiting.remove(name)
                processes = [
                    context.Process(target=work, args=(name, run, folder, rank, f"{meetings}/{name}"))
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


UNTIED = "-untied"


def trained(start: str) -> str:
    """The run that a start is made from."""
    return start.removesuffix(UNTIED)


def give_weights(folder: Path, start: str) -> None:
    """Export a run's last weights, so that others start from them; in a process of its own, this one only forks."""
    source = """
import json, pathlib, sys
from safetensors.torch import load_file, save_file
from llama import hf, recipe
checkpoint, keys, to, untie = sys.argv[1:]
hf.export(checkpoint, recipe.load(keys), to, "float32")
if untie == "True":
    file, config = pathlib.Path(to) / "model.safetensors", pathlib.Path(to) / "config.json"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
"""
    run = folder / trained(start)
    words = [complete(run)[-1], run / "recipe.yaml", folder / f"{start}-exported", start.endswith(UNTIED)]
    subprocess.run([sys.executable, "-c", source, *map(str, words)], check=True)
