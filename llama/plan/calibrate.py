"""Rates of this machine, measured with as many processes at work as a run has, and kept for plans.

    $HERD_CACHE/rates/HOST-4.json     of four processes, with the torch that they ran

Ranks of a machine share its memory, its caches and, on a CPU, perhaps its cores, so rates hold for one number of processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from data_prep.errors import UserError
from llama import node
from llama.plan.nodes import NodeType
from llama.plan.speed import Rates, Table
from llama.run_folder import write_json

ROOT = Path(__file__).resolve().parents[2]


def rates_folder() -> Path:
    """Where rates are kept: beside compiled graphs, under HERD_CACHE or the code's .cache."""
    cache = os.environ.get("HERD_CACHE")
    return (Path(cache) if cache else ROOT / ".cache") / "rates"


def rates_path(processes: int) -> Path:
    """The file of this machine's rates with so many processes."""
    return rates_folder() / f"{socket.gethostname()}-{processes}.json"


def calibrate(processes: int, seconds: float = 60) -> Rates:
    """Measure this machine in `processes` processes at the same time, in about `seconds`. Raises UserError when they fail.

    Twice, and of each rate the better one counts: whatever else a machine does for some seconds spoils one of them.
    """
    return better(_measured(processes, seconds / 2), _measured(processes, seconds / 2))


def better(one: Rates, other: Rates) -> Rates:
    """Of two measurements of a machine the faster figure each, but for small differences of large ones, which are averaged."""

    def fastest(a: dict[str, Table], b: dict[str, Table], choose: Callable[[float, float], float]) -> dict[str, Table]:
        found = {}
        for key in a.keys() | b.keys():
            first, second = dict(a.get(key, ())), dict(b.get(key, ()))
            both = {size: choose(first[size], second[size]) for size in first.keys() & second.keys()}
            found[key] = tuple(sorted((first | second | both).items()))
        return found

    operator = {
        kind: (seconds + other.operator[kind]) / 2 if kind == "selective" else min(seconds, other.operator[kind])
        for kind, seconds in one.operator.items()
    }
    return replace(
        one,
        products=fastest(one.products, other.products, max),
        attention=fastest(one.attention, other.attention, max),
        bandwidth=fastest(one.bandwidth, other.bandwidth, max),
        collectives=fastest(one.collectives, other.collectives, min),
        operator=operator,
        strain={kind: (factor + other.strain[kind]) / 2 for kind, factor in one.strain.items()},
        link=max(one.link, other.link),
        latency=min(one.latency, other.latency),
    )


def _measured(processes: int, seconds: float) -> Rates:
    with tempfile.TemporaryDirectory(prefix="herd-calibrate-") as folder:
        environment = os.environ | {
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }  # fmt: skip
        if processes > 1:  # as launch/train.py has it
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        command = [sys.executable, "-m", "llama.plan.calibration_run", folder, str(seconds)]
        ranks = []
        try:
            for rank in range(processes):
                with (Path(folder) / f"{rank}.log").open("w") as log:
                    mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    ranks.append(subprocess.Popen(command, env=mine, stdout=log, stderr=subprocess.STDOUT))
            while any(process.poll() is None for process in ranks):
                if any(process.poll() for process in ranks):
                    break  # the others would wait for it
                time.sleep(0.1)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        for rank, process in enumerate(ranks):
            if process.returncode > 0:
                lines = (Path(folder) / f"{rank}.log").read_text(errors="replace").strip().splitlines()
                raise UserError(f"calibration failed on rank {rank}: {lines[-1] if lines else 'it said nothing'}")
        for rank, process in enumerate(ranks):
            if process.returncode:
                raise UserError(f"calibration failed: rank {rank} was killed by signal {-process.returncode}")
        return Rates.from_json(json.loads((Path(folder) / "rates.json").read_text()))


def save_rates(rates: Rates) -> Path:
    """Keep rates for plans; the file. Raises UserError when it cannot be written."""
    path = rates_path(rates.processes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rates.to_json())
    except OSError as error:
        raise UserError(
            f"rates cannot be kept in {path.parent}: {error.strerror}; set HERD_CACHE to a folder that can be written"
        ) from None
    return path


def load_rates(processes: int) -> Rates:
    """What was measured on this machine with so many processes. Raises UserError naming the remedy when it was not."""
    path, remedy = (
        rates_path(processes),
        f"herd plan --calibrate --processes {processes} measures it in a minute or two",
    )
    try:
        rates = Rates.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        others = sorted(int(p.stem.rpartition("-")[2]) for p in path.parent.glob(f"{socket.gethostname()}-*.json"))
        known = f" (but with {', '.join(map(str, others))})" if others else ""
        raise UserError(f"this machine was not measured with {processes} processes{known}; {remedy}", 2) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as rates ({error}); {remedy}", 2) from None
    if rates.host != socket.gethostname():
        raise UserError(f"{path}: measured on {rates.host}, and this is {socket.gethostname()}; {remedy}", 2)
    if rates.torch != (here := metadata.version("torch")):
        raise UserError(f"{path}: measured with torch {rates.torch}, and this is {here}; {remedy}", 2)
    if rates.processes != processes:
        raise UserError(f"{path}: measured with {rates.processes} processes, not {processes}; {remedy}", 2)
    return rates


def this_node(processes: int) -> NodeType:
    """This machine as a node of `processes` ranks, with the rates that were measured. Raises UserError: see load_rates."""
    rates = load_rates(processes)
    whole = node.memory()[0]
    best = {dtype: max(rate for _, rate in table) for dtype, table in rates.products.items()}
    return NodeType(
        name="cpu", device=rates.device, ranks=processes, memory=whole // processes, flops=best["bfloat16"],
        flops_fp32=best["float32"], bandwidth=max(rate for _, rate in rates.bandwidth["float32"]), link=rates.link,
        network=rates.network, host_memory=whole, close=processes, mfu=1.0,
    )  # fmt: skip
