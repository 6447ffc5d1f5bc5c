"""Seconds of a training step, from what a rank does in it (counts.py) and how fast a machine does that.

Products and attention run at measured or assumed FLOP/s, or wait for memory (Williams et al. 2009, roofline); what else is
computed moves bytes. Collectives that nobody measured take what recursive halving and doubling take (Thakur, Rabenseifner
and Gropp 2005): log2(n) latencies and (n-1)/n of the bytes for a gathering or a scattering, twice both for an all-reduce.
Over several nodes rings go through all of a node's ranks and out by its network (as NCCL's do), so that nearly all bytes
come in both over the links and over the network, and the slower of them counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from llama.config import Recipe
from llama.flops import products, trained_flops_per_token
from llama.layout import Layout
from llama.plan.counts import Collective, Counts, Product
from llama.plan.nodes import NodeType

Table = tuple[tuple[float, float], ...]
"""(size, value), sizes ascending."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
FUSED = 0.4
"""Of the bytes and calls of single operators, what is left when blocks are compiled into one graph each. Assumed."""
ATTENTION = 0.65
"""Of the rate of products, what attention reaches on accelerators. Assumed: FlashAttention-2 on an H100 makes 300 to 370 of
989 TFLOP/s (Shah et al. 2024, FlashAttention-3, figures 5 and 6), products half of them and more."""
REACHED = 0.8
"""Of a link's published rate, what collectives reach. NCCL's maintainers say 370 of an H100's 450 GB/s
(github.com/NVIDIA/nccl-tests/issues/212); 350 to 360 are measured (github.com/NVIDIA/nccl/issues/1281). Assumed of others."""
LAUNCH = 6e-6
"""Seconds in which Python launches an operator on an accelerator, its backward included. Assumed."""
RUNTIME = 1 << 30
"""Bytes of an accelerator that its runtime and the communication library keep. Assumed."""
FILE_SYSTEM = 1e9
"""Bytes a second that a node writes to a shared file system. Assumed."""


@dataclass(frozen=True)
class Rates:
    """How fast one rank works while all of its node do the same."""

    source: str
    """Where they come from, in words."""
    device: str
    """cpu, cuda or neuron."""
    products: dict[str, Table]
    """By type: FLOPs of one matrix product, FLOP/s."""
    attention: dict[str, Table]
    """By kind and type, as in `attention_backward bfloat16`: FLOPs of one head in full, FLOP/s of causal attention."""
    bandwidth: dict[str, Table]
    """Bytes that an operator reads and writes, bytes/s: by type, and of the optimizers, `update` and `update_sr`, the one
    that rounds stochastically."""
    operator: dict[str, float]
    """Seconds that a call of an operator costs at least, its part of Python and autograd included: `plain`, under FSDP
    (`sharded`), and under tensor parallelism, where it is one on DTensors first (`tensor`). Beside these, what selective
    checkpointing takes to decide on it (`selective`)."""
    strain: dict[str, float]
    """By kind of operators: what a whole step takes, as a multiple of what its parts take apart. Caches are cold there,
    memory is fresh, and ranks wait for each other."""
    collectives: dict[str, Table]
    """By kind and ranks, as in `all_reduce 4`: bytes of a call, seconds. What is missing is reckoned from the links."""
    link: float
    """Bytes/s in one direction from a rank to its peers in the node."""
    network: float
    """Bytes/s from a node to others; 0: unknown, as to peers in the node."""
    latency: float
    """Seconds of one hop of a collective."""
    reading: float
    """Seconds in which a rank reads a byte of token files."""
    base: int
    """Bytes that a rank takes before it has a model: code on a CPU, the runtime on an accelerator."""
    overlaps: bool
    """Whether weights are gathered and gradients scattered while the device computes."""
    share: float = 1.0
    """Cores that a rank has for each of its threads when all ranks are busy: below 1, one that waits leaves its to others."""
    host: str = ""
    """Machine that this was measured on; empty: published peaks."""
    torch: str = ""
    """Version that this was measured with."""
    processes: int = 0
    """How many were busy at the same time."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> Rates:
        """Raises TypeError, KeyError or ValueError when these are no rates."""

        def table(rows: Any) -> Table:
            return tuple((float(size), float(value)) for size, value in rows)

        known = {field.name for field in fields(Rates)}
        if set(found) != known:
            raise ValueError(f"keys {sorted(set(found) ^ known)}")
        tables = {
            name: {key: table(rows) for key, rows in found[name].items()}
            for name in ("products", "attention", "bandwidth", "collectives")
        }
        return Rates(**found | tables)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on; they add up to `total`."""

    products: float
    attention: float
    others: float
    """All other operators."""
    tensor: float
    """Communication of tensor and sequence parallelism."""
    data: float
    """Weights gathered, gradients scattered and summed over the data ranks."""
    pipeline: float
    """Hidden states and their gradients from stage to stage."""
    reduction: float
    """The step's one sum over all ranks."""
    overlapped: float
    """Of `data`, what happens while the device computes; not part of the total."""
    bubble: float
    """Waiting for other stages."""
    loading: float

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.others

    @property
    def communication(self) -> float:
        """All that is sent, also while the device computes."""
        return self.tensor + self.data + self.pipeline + self.reduction

    @property
    def total(self) -> float:
        return self.compute + self.communication - self.overlapped + self.bubble + self.loading


@dataclass(frozen=True)
class RunCost:
    """What a run takes."""

    tokens_per_second: float
    days: float
    """Of all its steps; checkpoints that training waits for included."""
    node_hours: float
    mfu_full: float
    """Model FLOPs against the peak, attention counted in full; recomputation does not count."""
    mfu_causal: float
    """The same with the half of attention's matrix that is needed."""
    checkpoint_bytes: int
    checkpoint_seconds: float
    """To write one."""


def rates_of(node: NodeType, mfu: float | None = None) -> Rates:
    """Rates of a published node type, with products at `mfu` of the peak (node.mfu when not given)."""
    share = node.mfu if mfu is None else mfu
    # Kernels for CUDA leave out the half of attention that is masked, but counts have it in full.
    attends = ATTENTION * (2.0 if node.device == "cuda" else 1.0)
    peaks = {"bfloat16": node.flops * share, "float16": node.flops * share, "float32": node.flops_fp32 * share}
    return Rates(
        source=f"{node.name}, products at {share:.0%} of the published peak", device=node.device,
        products={dtype: ((1.0, rate),) for dtype, rate in peaks.items()},
        attention={
            f"{kind} {dtype}": ((1.0, rate * attends),)
            for dtype, rate in peaks.items() for kind in ("attention", "attention_backward")
        },
        bandwidth=dict.fromkeys((*peaks, "update", "update_sr"), ((1.0, node.bandwidth),)),
        operator=dict.fromkeys(("plain", "sharded", "tensor", "selective"), LAUNCH),
        strain=dict.fromkeys(("plain", "sharded", "tensor"), 1.0), collectives={}, link=node.link, network=node.network,
        latency=node.latency, reading=0.0, base=RUNTIME, overlaps=True,
    )  # fmt: skip


def step_time(
    counts: Counts, recipe: Recipe, layout: Layout, rates: Rates, nodes: int = 1, ranks_per_node: int | None = None
) -> StepTime:
    """Seconds of a step of `layout` on `nodes`, as long as the rank of `counts` takes: give the slowest stage's."""
    per_node = ranks_per_node or max(1, layout.world // nodes)
    compiled = FUSED if recipe.train.compile or rates.device == "neuron" else 1.0
    kind = _operators(recipe, layout)
    call, strain = rates.operator[kind], rates.strain[kind]
    multiplied = strain * sum(product_seconds(p, rates) for p in counts.products if p.kind == "mm")
    attention = strain * sum(product_seconds(p, rates) for p in counts.products if p.kind != "mm")
    updating = update_seconds(counts, recipe, rates)
    if recipe.train.activation_checkpointing == "selective" and compiled == 1.0:  # a graph has it decided once
        call += rates.operator.get("selective", 0.0)
    launching = counts.operators * compiled * call
    moved = max(0, counts.moved - _updated(counts, recipe, rates)[1]) * compiled
    dtype = "float32" if recipe.train.precision == "fp32" else "bfloat16"
    moving = moved / at(rates.bandwidth[dtype], counts.moved / max(1, counts.operators))
    # An accelerator gets its work ahead of time, and waits only when to launch it takes longer than to do it.
    waited = max(moving, launching - multiplied - attention - updating)
    others = updating + strain * (moving + launching if rates.device == "cpu" else waited)

    spent = {"tp": 0.0, "dp_shard": 0.0, "dp_replicate": 0.0, "pp": 0.0, "world": 0.0}
    passed = {"send": 0.0, "recv": 0.0}
    for collective in counts.collectives:
        seconds = strain * collective.calls * collective_seconds(collective, layout, rates, per_node)
        if collective.kind in passed:
            passed[collective.kind] += seconds
        else:
            spent[collective.axis] += seconds
    pipeline = spent["pp"] + max(passed.values())  # a rank sends and receives at the same time
    data = spent["dp_shard"] + spent["dp_replicate"]
    compute = multiplied + attention + others

    overlapped = 0.0
    if rates.overlaps and data:
        # The first weights and the last gradients have nothing to hide behind; of each block's there is one such.
        units = max(1.0, recipe.model.num_layers / layout.pipeline)
        overlapped = min(data * (1 - 1 / units), compute)
    work = compute - updating + spent["tp"] + data - overlapped
    waiting = max(0.0, work) * bubble(recipe, layout, rates.share)
    rest = compute + spent["tp"] + data + pipeline + spent["world"] - overlapped + waiting
    tokens = recipe.tokens_per_step / layout.data
    read = tokens * 4 * rates.reading
    loading = max(0.0, read - rest) if recipe.data.prefetch else read
    return StepTime(
        products=multiplied, attention=attention, others=others, tensor=spent["tp"], data=data, pipeline=pipeline,
        reduction=spent["world"], overlapped=overlapped, bubble=waiting, loading=loading,
    )  # fmt: skip


def product_seconds(product: Product, rates: Rates) -> float:
    """Seconds of all calls: at the rate of their size, or as memory lets them."""
    if not product.calls:
        return 0.0
    size = product.flops / product.calls
    dtype = product.dtype if product.dtype in rates.products else "float32"
    if product.kind != "mm":
        return product.flops / at(rates.attention[f"{product.kind} {dtype}"], size / math.prod(product.shape[:2]))
    batch, m, k, n = product.shape
    moved = batch * (m * k + k * n + m * n) * BYTES[dtype]
    return product.calls * max(size / at(rates.products[dtype], size), moved / at(rates.bandwidth[dtype], moved))


def update_seconds(counts: Counts, recipe: Recipe, rates: Rates) -> float:
    """Seconds of the optimizer's step, which is no part of a pipeline's round."""
    kind, moved = _updated(counts, recipe, rates)
    return moved / at(rates.bandwidth[kind], moved) if moved else 0.0


def _updated(counts: Counts, recipe: Recipe, rates: Rates) -> tuple[str, int]:
    """Which of Rates.bandwidth the optimizer's step has, and the bytes it moves, told by those of its moments."""
    moments = counts.memory.optimizer
    if recipe.train.precision == "bf16_sr" and rates.device != "neuron":
        # Counted: 184 bytes a weight with moments in fp32, 324 with both in bf16, one operator after another.
        return "update_sr", moments * (81 if recipe.optimizer.state_dtype == "bfloat16" else 23)
    return "update", moments * 7 // 2  # weights and both moments read and written, gradients read


def _operators(recipe: Recipe, layout: Layout) -> str:
    """Which of Rates.operator a recipe's are."""
    if layout.tensor > 1:
        return "tensor"
    return "sharded" if layout.data > 1 or recipe.train.precision == "bf16_mixed" else "plain"


def bubble(recipe: Recipe, layout: Layout, share: float = 1.0) -> float:
    """Seconds that a rank waits for other stages, as a multiple of its own work.

    (p-1)/m for GPipe (Huang et al. 2019) and 1F1B, over the stages of a rank when they are interleaved (Narayanan et al.
    2021), a third of that where backward of weights fills the holes (ZB-H1 of Qi et al. 2023, all three parts of a step
    as long), none in a V of twice as many micro-batches as ranks. With `share` below 1 ranks share cores, and while some
    wait the others are faster: a rank's speed is the measured one with all busy.
    """
    ranks, schedule = layout.pipeline, recipe.parallel.pipeline_schedule
    if ranks == 1:
        return 0.0
    rounds = layout.accumulation * recipe.parallel.rank_stages
    filled = {"interleaved_zero_bubble": 1 / 3, "zbv_zero_bubble": 0.0}.get(schedule, 1.0)
    # As the pipeline fills, 1, 2, ... p-1 ranks are busy; as it drains, p-1, ... 1: in p-1 rounds more than there is work.
    busy = [min(i, ranks, rounds, rounds + ranks - i) for i in range(1, rounds + ranks)]
    taken = sum(max(share, count / ranks) for count in busy)
    return max(0.0, taken - rounds) / rounds * filled


def collective_seconds(collective: Collective, layout: Layout, rates: Rates, per_node: int) -> float:
    """Seconds of one call."""
    if collective.ranks < 2 and collective.kind not in ("send", "recv"):
        return 0.0
    inside, across = place(collective, layout, per_node)
    if (across == 1 or not rates.network) and (seconds := _measured(collective, rates)) is not None:
        return seconds
    if collective.kind in ("send", "recv"):
        return rates.latency + collective.bytes / (REACHED * (rates.link if across == 1 else rates.network / per_node))
    # A group has its share of the node's way out: as many groups are under way as the node has ranks for.
    speed = rates.link if across == 1 else min(rates.link, rates.network * inside / per_node)
    hops = math.ceil(math.log2(max(1, inside))) + math.ceil(math.log2(max(1, across)))
    sent = (collective.ranks - 1) / collective.ranks * collective.bytes
    once = {"all_reduce": 2, "broadcast": 2}.get(collective.kind, 1)
    return once * (hops * rates.latency + sent / (REACHED * speed))


def place(collective: Collective, layout: Layout, per_node: int) -> tuple[int, int]:
    """How many ranks of the group are in one node, and on how many nodes it is. Ranks are numbered node by node."""
    strides = {
        "tp": 1, "cp": layout.tensor, "dp_shard": layout.tensor * layout.context,
        "dp_replicate": layout.tensor * layout.context * layout.shard,
        "pp": layout.world // layout.pipeline, "world": 1,
    }  # fmt: skip
    ranks = max(collective.ranks, 2) if collective.kind in ("send", "recv") else collective.ranks
    inside = max(1, min(ranks, per_node // strides[collective.axis]))
    return inside, -(-ranks // inside)


def _measured(collective: Collective, rates: Rates) -> float | None:
    """From what was measured of this kind in a group of this size, or else of another size; None: neither was."""
    kind = "send" if collective.kind == "recv" else collective.kind
    if (table := rates.collectives.get(f"{kind} {collective.ranks}")) is not None:
        return _seconds_at(table, collective.bytes)
    others = {int(key.split()[1]): table for key, table in rates.collectives.items() if key.split()[0] == kind}
    if not others:
        return None
    ranks = min(others, key=lambda n: abs(math.log(n / max(2, collective.ranks))))
    if kind == "send":
        return _seconds_at(others[ranks], collective.bytes)
    # Per rank the same share of the bytes goes through the same links.
    factor = (collective.ranks - 1) / collective.ranks * ranks / (ranks - 1)
    return _seconds_at(others[ranks], collective.bytes) * factor


def _seconds_at(table: Table, size: float) -> float:
    """Like `at`, but more than the largest message takes as much longer as it is larger."""
    return at(table, size) * max(1.0, size / table[-1][0])


def at(table: Sequence[tuple[float, float]], size: float) -> float:
    """The value at `size`, straight between the two nearest points in logarithms; that of the last one beyond."""
    if size <= table[0][0]:
        return table[0][1]
    for (low, a), (high, b) in itertools.pairwise(table):
        if size <= high:
            part = math.log(size / low) / math.log(high / low)
            return a * (b / a) ** part
    return table[-1][1]


def run_cost(
    seconds: float, recipe: Recipe, nodes: int, ranks: int, peak: float, file_system: float = FILE_SYSTEM
) -> RunCost:
    """Cost of the recipe's steps at `seconds` each.

    Args:
        ranks: of all nodes.
        peak: FLOP/s of one rank that utilisation is held against.
        file_system: bytes/s that one node writes.
    """
    tokens = recipe.tokens_per_step / seconds
    size = checkpoint_bytes(recipe)
    writing = size / (nodes * file_system)
    steps, saving = recipe.train.steps, recipe.checkpoint
    saves = (steps // saving.interval if saving.interval else 0) + 1
    waits = 0.0 if saving.save_async else saves * writing
    whole = steps * seconds + waits
    full, causal = (tokens * trained_flops_per_token(recipe, half) / (peak * ranks) for half in (False, True))
    return RunCost(tokens, whole / 86400, nodes * whole / 3600, full, causal, size, writing)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint: what is trained with both moments of its optimizer; of a run without adapters all weights."""
    model, lora, train = recipe.model, recipe.lora, recipe.train
    parts = [part for part in products(recipe) if not isinstance(part, str)]
    trained = sum(part.weights for part in parts if part.own_gradient)
    whole = sum(part.weights for part in parts)
    if not model.tie_embeddings:  # a tied one is the output's
        table = model.padded_vocab_size * model.hidden_size
        whole += table
        trained += 0 if lora.rank or "embed.weight" in _frozen(recipe) else table
    sr = train.precision == "bf16_sr"
    weight, state = (2, 2 if recipe.optimizer.state_dtype == "bfloat16" else 4) if sr else (4, 4)
    return (trained if lora.rank else whole) * weight + 2 * trained * state


def _frozen(recipe: Recipe) -> set[str]:
    from llama.freeze import frozen

    return set(frozen(recipe.train.freeze, recipe.model))
