"""What a rank holds, from the recipe alone: its stages of the pipeline, their units as FSDP gathers them, every weight's local size.

A unit is what `fully_shard` was called on (llama/parallel/fsdp.py): the embedding, each block, norm and output together.
Formulas need no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from llama.config import Model, Recipe
from llama.freeze import frozen
from llama.layout import Layout, layout
from llama.targets import HEAD, HF_MODULES, ROW_PARALLEL, adapted, linear_shape

NF4_BLOCK, NESTED = 64, 256  # as in llama/model/nf4.py, which needs torch
BATCH_BYTES = 8 + 8 + 4 + 4
"""Of a token of a batch: itself, its label, position and document."""


@dataclass(frozen=True)
class Weight:
    """A parameter as this rank's tensor group cuts it, before FSDP shards its rows."""

    rows: int
    columns: int
    """1 for a vector."""
    item: int
    """Bytes of an element where it is held."""
    gathered: int
    """Bytes of an element where it is computed with."""
    trained: bool
    whole: bool = False
    """Every tensor rank has all of it though its input is cut, so that its gradient is a sum over them."""

    norm: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def shard(self, ranks: int, rank: int) -> int:
        """Elements that FSDP leaves on shard `rank`: rows are dealt in pieces of ⌈rows / ranks⌉, the last ones short."""
        piece = -(-self.rows // ranks)
        return max(0, min(piece, self.rows - piece * rank)) * self.columns

    def padded(self, ranks: int) -> int:
        """Elements of a piece as collectives carry it."""
        return -(-self.rows // ranks) * self.columns


@dataclass(frozen=True)
class Linear:
    """A linear of a block (or the output projection) as this rank computes it."""

    name: str
    """Inside its block, such as attention.q; or head."""
    out: int
    width: int
    trained: bool
    input_gradient: bool
    adapter: int = 0
    """Rank of its adapter."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What FSDP gathers and scatters at once. Blocks that are alike are one object, and are told apart by that."""

    kind: str
    """embed, block, head (with the norm before it), or root: tied ends with the norm."""
    weights: tuple[Weight, ...]
    linears: tuple[Linear, ...] = ()
    attention_backward: bool = True
    buffers: int = 0
    """Bytes of what is no parameter, which every rank has whole: scales of scales, keys of dropout."""

    def total(self, what: str, ranks: int = 1, trained: bool = False) -> int:
        """Bytes over all weights: `item` held, `gathered` computed with, 4 reduced; rows padded to `ranks` pieces."""
        return sum(
            w.padded(ranks) * ranks * (getattr(w, what) if what else 4)
            for w in self.weights
            if w.trained or not trained
        )

    @cached_property
    def trains(self) -> bool:
        return any(w.trained for w in self.weights)


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline on this rank; without one the whole network."""

    index: int
    units: tuple[Unit, ...]
    first: bool
    last: bool

    @property
    def blocks(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.kind == "block")


@dataclass(frozen=True)
class Held:
    """A rank's part of the run."""

    recipe: Recipe
    layout: Layout
    rank: int
    stage_rank: int
    shard_rank: int
    stages: tuple[Stage, ...]
    sharded: bool
    """Whether FSDP wraps it; over one data rank only where it is what casts."""
    compute: int
    """Bytes of an element of the activations."""
    weights: int
    """Bytes of an element of trained weights as they are held."""
    moments: int
    """Bytes of an element of each of AdamW's two moments."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.recipe.train.micro_batch_size * self.recipe.data.seq_length

    @property
    def stream(self) -> int:
        """Tokens of a micro-batch that this rank holds between the blocks: sequence parallelism cuts them."""
        cut = self.layout.tensor if self.recipe.parallel.sequence_parallel else 1
        return self.tokens // cut

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for stage in self.stages for unit in stage.units)


def held(recipe: Recipe, world: int, rank: int) -> Held:
    """What `rank` of `world` holds. Raises ValueError as llama.layout.layout does."""
    lay, t, lora = layout(recipe, world), recipe.train, recipe.lora
    assert 0 <= rank < world, f"rank {rank} of {world}"
    # Axes, outermost first: pp, dp_replicate, dp_shard, cp, tp (llama/parallel/mesh.py).
    inner = lay.context * lay.tensor
    shard_rank, stage_rank = rank // inner % lay.shard, rank // (world // lay.pipeline)
    weights = 2 if t.precision == "bf16_sr" else 4
    compute = 4 if t.precision == "fp32" else 2
    base = compute if lora.rank else weights
    sharded = lay.data > 1 or compute != base
    moments = 2 if t.precision == "bf16_sr" and recipe.optimizer.state_dtype == "bfloat16" else 4
    builder = _Builder(recipe, lay.tensor, base, weights, compute if sharded else base)
    stages = tuple(builder.stage(i) for i in rank_stages(stage_rank, recipe))
    return Held(recipe, lay, rank, stage_rank, shard_rank, stages, sharded, compute, weights, moments)


def rank_stages(stage_rank: int, recipe: Recipe) -> list[int]:
    """Stages on a pipeline rank: looped round the ranks, or laid as a V (llama/parallel/pipeline.py)."""
    p = recipe.parallel
    if p.pipeline_parallel == 1:
        return [0]
    if p.pipeline_schedule == "zbv_zero_bubble":
        return [stage_rank, 2 * p.pipeline_parallel - 1 - stage_rank]
    return [stage_rank + p.pipeline_parallel * i for i in range(p.rank_stages)]


class _Builder:
    """Makes stages; blocks that are alike are one object."""

    def __init__(self, recipe: Recipe, tensor: int, base: int, weights: int, gathered: int):
        self.recipe, self.model, self.lora, self.tensor = recipe, recipe.model, recipe.lora, tensor
        self.base, self.own, self.gathered = base, weights, gathered
        self.still = set(frozen(recipe.train.freeze, recipe.model)) if recipe.train.freeze else set[str]()
        targets = adapted(self.lora.targets, self.model.num_layers) if self.lora.rank else []
        self.targets = set(targets)
        self.blocks: dict[tuple[object, ...], Unit] = {}

    def trained(self, name: str) -> bool:
        tied = name == "head.weight" and self.model.tie_embeddings
        return not self.lora.rank and ("embed.weight" if tied else name) not in self.still

    def stage(self, index: int) -> Stage:
        p, model = self.recipe.parallel, self.model
        size, extra = divmod(model.num_layers, p.stages)
        start = index * size + min(index, extra)
        layers = range(start, start + size + (index < extra))
        first, last = index == 0, index == p.stages - 1
        # A later stage's input asks for a gradient, whatever is trained before it.
        below = self.trained("embed.weight") if first else True
        blocks = []
        for i in layers:
            block, below = self.block(i, below)
            blocks.append(block)
        embed, norm, head = self.ends(below)
        if first and last and model.tie_embeddings:  # a shared weight must sit in one group, the root's
            root = Unit("root", (*embed.weights, *norm), head.linears)
            return Stage(index, (root, *blocks), first, last)
        tail = Unit("head", (*norm, *head.weights), head.linears, buffers=head.buffers)
        return Stage(index, ((embed,) if first else ()) + tuple(blocks) + ((tail,) if last else ()), first, last)

    def ends(self, below: bool) -> tuple[Unit, tuple[Weight, ...], Unit]:
        """Embedding, final norm, output projection."""
        model = self.model
        rows = model.padded_vocab_size // self.tensor
        table = Weight(rows, model.hidden_size, self.base, self.gathered, self.trained("embed.weight"))
        norm = self.norm("norm.weight")
        below = below or norm.trained
        trained, rank = self.trained("head.weight"), self.lora.rank if HEAD in self.targets else 0
        output = Weight(rows, model.hidden_size, self.base, self.gathered, trained)
        linear = Linear(HEAD, rows, model.hidden_size, trained, below, rank)
        buffers = 4 if rank and self.lora.dropout else 0
        head = Unit("head", (output, *self.adapter(linear, row=False)), (linear,), buffers=buffers)
        return Unit("embed", (table,)), (norm,), head

    def norm(self, name: str) -> Weight:
        return Weight(self.model.hidden_size, 1, self.base, self.gathered, self.trained(name), whole=True, norm=True)

    def block(self, layer: int, below: bool) -> tuple[Unit, bool]:
        """Block `layer`, and whether what it gives needs a gradient."""
        at = f"layers.{layer}"
        names = [f"{at}.{part}.weight" for part in ("attention_norm", *HF_MODULES, "mlp_norm")]
        targets = tuple(f"{at}.{part}" in self.targets for part in HF_MODULES)
        key = (below, tuple(self.trained(name) for name in names), targets)
        after = below or any(key[1]) or any(targets)  # type: ignore[arg-type]
        if key in self.blocks:
            return self.blocks[key], after
        first, second = self.norm(names[0]), self.norm(names[-1])
        weights, linears, needs = [first], [], below or first.trained
        inside, attention = needs, False
        for part, target in zip(HF_MODULES, targets, strict=True):
            if part == "mlp.gate":  # the residual joins here
                below = below or inside
                needs = inside = below or second.trained
                weights.append(second)
            out, width = linear_shape(f"{at}.{part}", self.model)
            row = part in ROW_PARALLEL
            out, width = (out, width // self.tensor) if row else (out // self.tensor, width)
            trained = self.trained(f"{at}.{part}.weight")
            linear = Linear(part, out, width, trained, inside if row else needs, self.lora.rank if target else 0)
            inside = inside or trained or target
            if part == "attention.v":
                attention = inside
            weights += [*self.matrix(linear, trained), *self.adapter(linear, row)]
            linears.append(linear)
        buffers = sum(self.buffers(f"{at}.{part}", target) for part, target in zip(HF_MODULES, targets, strict=True))
        unit = self.blocks[key] = Unit("block", tuple(weights), tuple(linears), attention, buffers)
        return unit, after

    def matrix(self, linear: Linear, trained: bool) -> Iterator[Weight]:
        """The weight, or its bytes and scales where it is quantised."""
        lora, out, width = self.lora, linear.out, linear.width
        if lora.quantize is None:
            yield Weight(out, width, self.base, self.gathered, trained)
        elif lora.quantize == "int8":
            yield Weight(out, width, 1, 1, False)
            yield Weight(out, 1, 4, 4, False)
        else:
            item = 1 if lora.double_quantization else 4
            yield Weight(out, width // 2, 1, 1, False)
            yield Weight(out, width // NF4_BLOCK, item, item, False)

    def buffers(self, name: str, target: bool) -> int:
        """Bytes of a linear's buffers: fp32 scales of its scales and their mean, and the key of its adapter's dropout."""
        lora, size = self.lora, 4 if target and self.lora.dropout else 0
        if lora.quantize == "nf4" and lora.double_quantization:
            out, width = linear_shape(name, self.model)
            size += 4 * -(-out * (width // NF4_BLOCK) // NESTED) + 4
        return size

    def adapter(self, linear: Linear, row: bool) -> Iterator[Weight]:
        """A, B and DoRA's lengths, in the type of trained weights, which FSDP does not cast."""
        if not linear.adapter:
            return
        rank, item = linear.adapter, self.own
        yield Weight(rank, linear.width, item, item, True, whole=not row)
        yield Weight(linear.out, rank, item, item, True, whole=row)
        if self.lora.dora:
            yield Weight(linear.out, 1, item, item, True, whole=row)


def attention_widths(model: Model, tensor: int) -> tuple[int, int, int]:
    """Query heads of this rank, their width, and the width of its keys."""
    heads = model.num_heads // tensor
    return heads, heads * model.head_size, model.kv_heads // tensor * model.head_size
