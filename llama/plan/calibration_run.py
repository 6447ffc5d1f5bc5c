"""One of the processes that measure a machine together: `python -m llama.plan.calibration_run FOLDER SECONDS`.

All of them do the same at the same time, as ranks of a run do: memory, caches and perhaps cores are shared. Operators are
timed one by one where they stand, in forward and backward of small networks, so that caches and fresh memory are as in a
run. Of many turns the median counts: what else the machine does for a moment is left out.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from llama.config import Model, Recipe
from llama.device import Device, find_device
from llama.layout import Layout, layout
from llama.model.llama import Llama
from llama.parallel.mesh import build_mesh
from llama.plan.counts import Counts
from llama.plan.dry import Rehearsal
from llama.plan.dry_memory import Live
from llama.plan.dry_tally import Counting, Tally, _look_at
from llama.plan.speed import Rates, Table, collective_seconds, step_time, update_seconds
from llama.run_folder import write_json
from llama.train.optim import StochasticAdamW

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBES = ((32, 64, 256), (128, 128, 1024), (512, 512, 4096), (1024, 512, 8192))
"""Tokens, width and vocabulary of the networks."""
GLANCE = 0.01
"""Seconds for a measurement below which small networks and messages alone are looked at: only to see that all works."""
MOST_STRAIN = 1.5
"""What is more was no network's step, but something else that the machine had to do."""
MESSAGES = (1 << 10, 16 << 10, 128 << 10, 1 << 20, 8 << 20, 32 << 20)
"""Bytes of a collective's larger side."""


class Bench:
    """Times things while the other ranks do the same."""

    def __init__(self, device: Device, window: float):
        self.device, self.window, self.world = device, window, dist.get_world_size()
        self.at = device.torch()
        most = None if window > GLANCE else 2
        self.probes, self.messages = PROBES[:most], MESSAGES[:most]

    def mean(self, value: float, most: bool = False) -> float:
        """Over the ranks; `most`: their greatest."""
        total = torch.tensor([value], dtype=torch.float32, device=self.at)
        dist.all_reduce(total, dist.ReduceOp.MAX if most else dist.ReduceOp.SUM)
        return float(total) / (1 if most else self.world)

    def start(self) -> None:
        """Begin together."""
        dist.barrier()

    def alone(self, body: Callable[[], Any]) -> float:
        """Seconds of what needs no other rank; all do it for as long."""
        body()
        self.start()
        times: list[float] = []
        started = time.perf_counter()
        while (now := time.perf_counter()) - started < self.window or len(times) < 3:
            body()
            self.device.synchronize()
            times.append(time.perf_counter() - now)
        return self.mean(statistics.median(times))

    def together(self, body: Callable[[], Any], part: float = 1.0) -> float:
        """Seconds of what all ranks do with each other, so as often: the median of some turns."""
        body()
        started = time.perf_counter()
        body()
        self.device.synchronize()
        once = self.mean(time.perf_counter() - started, most=True)
        calls = max(1, min(60, int(self.window * part / 5 / max(once, 1e-6))))
        times = []
        for _ in range(5):
            self.start()
            started = time.perf_counter()
            for _ in range(calls):
                body()
            self.device.synchronize()
            times.append((time.perf_counter() - started) / calls)
        return self.mean(statistics.median(times))


def shape(tokens: int, width: int, vocabulary: int, layers: int = 2) -> Model:
    heads = max(8, width // 64)
    return Model(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4 // 8 * 8, num_layers=layers, num_heads=heads,
        num_kv_heads=heads // 2, max_position=max(64, tokens),
    )  # fmt: skip


class Timed(Counting):
    """Counts operators, and adds up their work and seconds by what they are: a CPU's kernels have run when they return."""

    def __init__(self) -> None:
        alone: Any = SimpleNamespace(everyone=False)  # nobody to tell anything
        super().__init__(alone, Live(), None)
        self.spent: dict[tuple[str, ...], list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - started
        operator = self._operators.get(func) or self._operators.setdefault(func, _look_at(func))
        whole, self.tally = self.tally, Tally()
        self._count(operator, func, args, kwargs or {}, out)
        one, self.tally = self.tally, whole
        whole.products.update(one.products)
        whole.other.update(one.other)
        for product in one.product_list():
            size = product.flops if product.kind == "mm" else product.flops / math.prod(product.shape[:2])
            self._add((product.kind, product.dtype, str(round(math.log2(size)))), product.flops, seconds)
        if one.other["moved"]:
            self._add(("others",), one.other["moved"], seconds)
        return out

    def _add(self, key: tuple[str, ...], work: float, seconds: float) -> None:
        entry = self.spent.setdefault(key, [0.0, 0.0])
        entry[0] += work
        entry[1] += seconds


@dataclass
class Network:
    """What forward and backward of a small network gave."""

    tally: Tally
    spent: dict[tuple[str, ...], tuple[float, float]]
    """By kind of operator: work (FLOPs, or bytes) and seconds."""
    overhead: float
    """Seconds of a call beside its kernel."""


def network(bench: Bench, dtype: torch.dtype, tokens: int, width: int, vocabulary: int) -> Network:
    """Run a small network on one sequence for a while, watched operator by operator and unwatched in turn."""
    with torch.device(bench.at):
        model = Llama(shape(tokens, width, vocabulary)).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        ids = torch.randint(0, vocabulary, (1, tokens))

    def body() -> None:
        model(ids, labels=ids).sum().backward()

    body()
    bench.start()
    rounds: list[Timed] = []
    plain: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < 6 * bench.window or len(rounds) < 3:
        now = time.perf_counter()
        body()
        plain.append(time.perf_counter() - now)
        with Timed() as timed:
            body()
        rounds.append(timed)
    spent = {
        key: (work, bench.mean(statistics.median(timed.spent[key][1] for timed in rounds)))
        for key, (work, _) in rounds[0].spent.items()
    }
    tally = rounds[0].tally
    left = bench.mean(statistics.median(plain)) - sum(seconds for _, seconds in spent.values())
    return Network(tally, spent, max(0.0, left) / tally.other["operators"])


def tables(networks: Sequence[Network], kind: str, dtype: str) -> Table:
    """FLOP/s by FLOPs of a product, or of a head's attention, over all networks."""
    sizes: dict[int, list[float]] = {}
    for found in networks:
        for key, (work, seconds) in found.spent.items():
            if key[:2] == (kind, dtype):
                entry = sizes.setdefault(int(key[2]), [0.0, 0.0])
                entry[0] += work
                entry[1] += seconds
    return tuple((2.0**size, work / seconds) for size, (work, seconds) in sorted(sizes.items()))


def moves(networks: Sequence[Network]) -> Table:
    """Bytes/s by what an operator moves on the mean."""
    rows = [
        (n.tally.other["moved"] / n.tally.other["operators"], n.spent["others",][0] / n.spent["others",][1])
        for n in networks
    ]
    return tuple(sorted(rows))


def updates(bench: Bench, rows: int = 2048, width: int = 1024) -> dict[str, Table]:
    """Bytes/s of the optimizers, AdamW and the one that rounds stochastically."""
    found: dict[str, Table] = {}
    kind = {"fused": True} if bench.device.fused_adamw else {"foreach": True}
    for name, dtype in (("update", torch.float32), ("update_sr", torch.bfloat16)):
        weight = torch.nn.Parameter(torch.randn(rows, width, device=bench.at).to(dtype))
        weight.grad = torch.randn_like(weight)
        if name == "update":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight], **kind)  # type: ignore[arg-type]
        else:
            groups = [{"params": [weight], "weight_decay": 0.1}]
            optimizer = StochasticAdamW(groups, 1e-3, (0.9, 0.95), 1e-8, torch.float32, {weight: "w"}, 0)
        optimizer.step()
        alone: Any = SimpleNamespace(everyone=False)  # nobody to tell anything
        with Counting(alone, Live(), None) as counting:
            optimizer.step()
        moved = counting.tally.other["moved"]
        found[name] = ((float(moved), moved / bench.alone(optimizer.step)),)
    return found


def collectives(bench: Bench) -> dict[str, Table]:
    """Seconds by kind and number of ranks; all groups of a size talk at the same time, as they do in a run."""
    found: dict[str, Table] = {}
    world, rank = bench.world, dist.get_rank()
    for ranks in (n for n in range(2, world + 1) if world % n == 0):
        group = None
        for first in range(0, world, ranks):
            made = dist.new_group(list(range(first, first + ranks)))
            group = made if first <= rank < first + ranks else group
        for kind in ("all_gather", "reduce_scatter", "all_reduce", "send"):
            if kind == "send" and ranks > 2:
                continue
            rows: list[tuple[float, float]] = []
            for size in reversed(bench.messages):
                seconds = bench.together(_message(kind, size, ranks, group, bench), 0.7)
                # A small message takes no longer than a large one: what seems so is another process that was in the way.
                rows.append((float(size), min([seconds, *(later for _, later in rows)])))
            found[f"{kind} {ranks}"] = tuple(reversed(rows))
    return found


def _message(kind: str, size: int, ranks: int, group: Any, bench: Bench) -> Callable[[], Any]:
    whole = torch.zeros(size // 4, device=bench.at)
    part = torch.zeros(size // 4 // ranks, device=bench.at)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    peer, other = dist.get_rank() ^ 1, torch.empty_like(whole)

    def exchange() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, whole, peer), dist.P2POp(dist.irecv, other, peer)]):
            work.wait()

    return exchange


def small(probe: tuple[int, int, int], train: Mapping[str, Any], **parallel: Any) -> Recipe:
    """A recipe for one sequence a rank on a network as in PROBES."""
    return Recipe.model_validate(
        {
            "name": "small", "model": shape(*probe).model_dump(), "data": {"seq_length": probe[0]},
            "train": {"steps": 1, "global_batch_size": dist.get_world_size(), "precision": "bf16_mixed", **train},
            "parallel": parallel,
        }
    )  # fmt: skip


def whole_step(bench: Bench, recipe: Recipe, part: float) -> tuple[Layout, Counts, float]:
    """A step of the trainer under a layout: what this rank does in it, and its seconds."""
    laid = layout(recipe, bench.world)
    rehearsal = Rehearsal(recipe, build_mesh(laid, bench.device.type), bench.device, None)
    rehearsal.step(laid.accumulation)
    tally, memory = rehearsal.step(laid.accumulation)
    batches = [rehearsal._batch() for _ in range(laid.accumulation)]
    seconds = bench.together(lambda: rehearsal.trainer.step(iter([batches])), part)  # type: ignore[arg-type]
    return laid, tally.counts(memory), seconds


def overhead(bench: Bench, rates: Rates, checkpointing: str = "none", **parallel: Any) -> float:
    """Seconds of an operator in a network in which there is nothing to do but to call operators, apart from what ranks
    tell each other."""
    recipe = small(PROBES[0], {"activation_checkpointing": checkpointing}, **parallel)
    laid, counts, seconds = whole_step(bench, recipe, 3.0)
    told = sum(c.calls * collective_seconds(c, laid, rates, bench.world) for c in counts.collectives)
    return max(0.0, seconds - told) / counts.operators


def strain(bench: Bench, rates: Rates, **parallel: Any) -> float:
    """What whole steps of a larger network take, as a multiple of what their parts take apart."""
    taken = planned = 0.0
    for precision in ("fp32", "bf16_mixed"):
        recipe = small(bench.probes[min(2, len(bench.probes) - 1)], {"precision": precision}, **parallel)
        laid, counts, seconds = whole_step(bench, recipe, 40.0)
        updating = update_seconds(counts, recipe, rates)
        taken += seconds - updating
        planned += step_time(counts, recipe, laid, rates, ranks_per_node=bench.world).total - updating
    return min(MOST_STRAIN, max(1.0, taken / planned))


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(device: Device, window: float) -> Rates:
    """All rates. Collective."""
    bench = Bench(device, window)
    network(bench, torch.float32, *PROBES[0])  # brings the code in
    rates = Rates(
        source="", device=device.type, products={}, attention={}, bandwidth={}, operator={},
        strain=dict.fromkeys(("plain", "sharded", "tensor"), 1.0), collectives={}, link=1e9, network=0.0, latency=50e-6,
        reading=0.0, base=round(bench.mean(resident(), most=True)), overlaps=device.type != "cpu",
        share=min(1.0, (os.cpu_count() or 1) / bench.world), host=socket.gethostname(), torch=metadata.version("torch"),
        processes=bench.world,
    )  # fmt: skip
    for name, dtype in DTYPES.items():
        networks = [network(bench, dtype, *probe) for probe in bench.probes]
        rates.products[name] = tables(networks, "mm", name)
        for kind in ("attention", "attention_backward"):
            rates.attention[f"{kind} {name}"] = tables(networks, kind, name)
        rates.bandwidth[name] = moves(networks)
        rates.operator["plain"] = networks[0].overhead
    rates.bandwidth.update(updates(bench))
    rates.collectives.update(collectives(bench))
    if bench.world > 1:
        (_, first), (large, last) = rates.collectives[f"all_gather {bench.world}"][:: len(bench.messages) - 1]
        part = (bench.world - 1) / bench.world
        rates = replace(rates, link=part * large / last, latency=first / math.ceil(math.log2(bench.world)))
    rates.operator["sharded"] = rates.operator["tensor"] = overhead(bench, rates)
    rates.operator["selective"] = max(0.0, overhead(bench, rates, "selective") - rates.operator["sharded"])
    if (ranks := math.gcd(bench.world, 4)) > 1:  # the tiny network has four key/value heads
        rates.operator["tensor"] = overhead(bench, rates, tensor_parallel=ranks)
    rates.strain.update(dict.fromkeys(rates.strain, strain(bench, rates)))
    if ranks > 1:
        rates.strain["tensor"] = strain(bench, rates, tensor_parallel=ranks)
    words = f"measured on {rates.host} with {bench.world} process{'es' * (bench.world > 1)}"
    return replace(rates, source=words)


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    device = find_device()
    if device.type != "cpu":
        torch.get_device_module(device.type).set_device(device.torch())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(device.communication, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rates = measure(device, seconds / 600)
    if rank == 0:
        write_json(folder / "rates.json", rates.to_json(), sync=False)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
