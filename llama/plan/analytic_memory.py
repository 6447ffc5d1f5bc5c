"""What a rank holds at the worst moment of a step: the step walked through, unit by unit, in the order in which it runs.

The moments that can be worst are the forward and backward of each block, FSDP's gathering and scattering, the output's
logits, and the update. All blocks that are alike are worked out once.
"""

from __future__ import annotations

from llama.plan.analytic_block import join, keeps_input, norm_backward, norm_forward, pieces, sizes, spread
from llama.plan.analytic_parts import Held, Stage, Unit
from llama.plan.analytic_tape import PARTS, Piece, Tape
from llama.plan.counts import Memory
from llama.targets import HEAD

BATCH_BYTES = 8 + 8 + 4 + 4
"""Of a token of a batch: itself, its label, position and document."""


def step_memory(held: Held) -> Memory:
    """The worst moment of a step after the first, when the moments of AdamW are there."""
    tape = Tape()
    persistent(tape, held)
    walk = Walk(tape, held)
    walk.step()
    update(tape, held)
    return Memory(**dict(zip(PARTS, tape.most, strict=True)))


def local(held: Held, item: str | int, trained: bool = False) -> int:
    """Bytes of this rank's part of all weights, an element taking `item` bytes or that of the weight's field."""
    total = 0
    for unit in held.units:
        for w in unit.weights:
            if w.trained or not trained:
                size = item if isinstance(item, int) else getattr(w, item)
                total += size * (w.shard(held.layout.shard, held.shard_rank) if held.sharded else w.size)
    return total


def persistent(tape: Tape, held: Held) -> None:
    """What lives through the whole run."""
    tape.make("weights", weights=local(held, "item"))
    counters = 4 * sum(w.trained for unit in held.units for w in unit.weights)
    tape.make("optimizer", moments=2 * local(held, held.moments, trained=True) + counters)
    tape.make(batches=BATCH_BYTES * held.tokens * held.layout.accumulation)


def update(tape: Tape, held: Held) -> None:
    """AdamW's own tensors. The fused one makes none; ours for bf16 works on a parameter at a time in fp32: gradient, mean,
    root, new weight, noise, noisy, rounded, finite, and the result in bf16 (llama/train/optim.py)."""
    if held.recipe.train.precision == "bf16_sr":
        pieces = (w.shard(held.layout.shard, held.shard_rank) if held.sharded else w.size
                  for unit in held.units for w in unit.weights if w.trained)  # fmt: skip
        element = 8 * 4 - 1 + (4 if held.moments == 2 else 0)
        tape.make(update=element * max(pieces, default=0))
        tape.free("update")


class Walk:
    """A step on one tape."""

    def __init__(self, tape: Tape, held: Held):
        self.tape, self.held, self.sizes = tape, held, sizes(held)
        self.shard, self.sharded = held.layout.shard, held.sharded
        self.later = held.layout.accumulation > 1
        """The micro-batch that is walked is not the first: gradients are there."""
        self.blocks: dict[Unit, tuple[Piece, Piece]] = {}

    @property
    def weights(self) -> str:
        return "gathered" if self.sharded else "added" if self.later else "gradients"

    def step(self) -> None:
        """The worst micro-batch: the last, if there are several."""
        held, tape = self.held, self.tape
        if self.later:
            tape.make("gradients", gradients=self.all_gradients())
        stage = held.stages[0]
        head_size = held.recipe.model.head_size
        tape.make(rope=held.tokens * head_size * 4)
        self.forward(stage)
        self.backward(stage)

    def all_gradients(self) -> int:
        return local(self.held, self.held.weights, trained=True)

    # FSDP

    def gather(self, unit: Unit, name: str, forward: bool) -> None:
        """The weights of a unit: cast, sent, and copied out of what came (torch's foreach_all_gather)."""
        if not self.sharded or f"{name}.full" in self.tape.live:
            return
        tape, total = self.tape, unit.total("gathered", self.shard)
        casts = any(w.item != w.gathered for w in unit.weights)
        if self.shard == 1:
            if casts:
                tape.make("gathered", cast=max(w.size * w.gathered for w in unit.weights))
            tape.make("gathered", **{f"{name}.full": total})
            tape.free("cast")
            return
        if f"{name}.came" not in tape.live:
            self.fetch(unit, name)
        tape.make("gathered", **{f"{name}.full": total})
        if forward:  # what came stays until the next unit's is there
            tape.free(self.came)
            self.came = f"{name}.came"
        else:
            tape.free(f"{name}.came")

    came = ""

    def fetch(self, unit: Unit, name: str) -> None:
        """Its all-gather alone, as FSDP prefetches it in backward."""
        if not self.sharded or self.shard == 1 or f"{name}.full" in self.tape.live or f"{name}.came" in self.tape.live:
            return
        tape, total = self.tape, unit.total("gathered", self.shard)
        if any(w.item != w.gathered for w in unit.weights):
            tape.make("gathered", cast=total // self.shard)
        tape.make("gathered", **{f"{name}.came": total})
        tape.free("cast")

    def scatter(self, unit: Unit, name: str) -> None:
        """After a unit's backward: its weights go, its gradients are summed over the ranks in fp32, and this rank's part
        joins its gradients. What was sent is freed when the next unit comes here."""
        if not self.sharded:
            return
        tape = self.tape
        tape.free(f"{name}.full")
        if not unit.trains:
            return
        tape.free("sent")
        summed = unit.total("", self.shard, trained=True)
        tape.make("gathered", sent=summed)
        part = summed // self.shard
        own = sum(w.padded(self.shard) * w.item for w in unit.weights if w.trained)
        if self.shard == 1:
            tape.make("gathered", divided=summed)
        tape.make("gathered", summed=part)
        tape.free("divided", f"{name}.gradients")
        tape.free("summed")
        if not self.later:
            tape.make("gradients", **{f"{name}.own": own})

    # Order of a micro-batch

    def names(self, stage: Stage) -> list[tuple[str, Unit]]:
        return [(f"{stage.index}.{i}", unit) for i, unit in enumerate(stage.units)]

    def piece(self, unit: Unit) -> tuple[Piece, Piece]:
        if unit not in self.blocks:
            self.blocks[unit] = pieces(self.held, unit, self.sizes, self.weights)
        return self.blocks[unit]

    def forward(self, stage: Stage) -> None:
        tape, s, reshard = self.tape, self.sizes, self.held.recipe.parallel.reshard
        for name, unit in self.names(stage):
            self.gather(unit, name, forward=True)
            if unit.kind in ("embed", "root"):
                tape.make(x=s.hidden)
                if unit.kind == "embed" and reshard:
                    tape.free(f"{name}.full")
            elif unit.kind == "block":
                tape.run(self.piece(unit)[0])
                if not keeps_input(self.held):
                    tape.run(Piece((0,) * 5, (0, 0, 0, 0, -s.hidden)))
                if reshard:
                    tape.free(f"{name}.full")
            else:
                self.output(unit)
        if stage.units[0].kind == "root":
            self.output(stage.units[0])
        tape.free(self.came)

    def output(self, unit: Unit) -> None:
        """Norm, logits and loss, a chunk of tokens at a time; both gradients are formed on the spot."""
        tape, s, held = self.tape, self.sizes, self.held
        linear = next(linear for linear in unit.linears if linear.name == HEAD)
        norm = next(w for w in unit.weights if w.whole)
        norm_forward(tape, s, "n", norm.trained, linear.input_gradient)
        spread(tape, s, "n.out", "n.in")
        rows, wide = linear.out, 4 * linear.out * linear.width
        if linear.input_gradient:
            tape.make(dhidden=s.whole)
        if linear.trained:
            tape.make(dtable=wide)
        chunk = min(held.recipe.train.loss_chunk, held.tokens)
        logits = 4 * chunk * rows
        narrow = logits if s.item == 4 else logits // 2
        for i in range(2 if held.tokens > chunk else 1):
            tape.make(**{f"logits{i}": narrow})
            if s.item == 2:
                tape.make(**{f"wide{i}": logits})
                tape.free(f"logits{i}")
            if i:  # names of the chunk before live until they are given anew
                tape.free("wide0", "logits0", "dlogits")
            if s.item == 2:
                tape.make(dlogits=narrow)
                if linear.trained:
                    tape.make(part=rows * linear.width * 2)
                    tape.free("part")
        if linear.trained and s.item == 2:
            tape.make(saved=wide // 2)
        tape.free("wide0", "wide1", "logits0", "logits1", "dlogits", "n.in")
        if s.item == 2:
            tape.free("dtable")
        elif linear.trained:
            tape.rename("dtable", "saved")

    def output_backward(self, unit: Unit, name: str) -> None:
        tape, s = self.tape, self.sizes
        linear = next(linear for linear in unit.linears if linear.name == HEAD)
        norm = next(w for w in unit.weights if w.whole)
        if linear.input_gradient:
            tape.make(dh=s.whole)
        if linear.trained:
            self.gradient(name, linear.out * linear.width * s.item)
        tape.free("dhidden", "saved")
        if not self.sharded and self.later:
            tape.free(f"{name}.gradients")
        if linear.input_gradient:
            join(tape, s, "dh", "dh.joined")
            norm_backward(tape, s, "n", "dh.joined", norm.trained)
            tape.free("n.dx")  # every block counts the gradient that it is given

    def gradient(self, name: str, size: int) -> None:
        """The gradient of a table, before it is scattered or where it stays."""
        part = {"gathered": "gathered", "gradients": "gradients", "added": "activations"}[self.weights]
        tape = self.tape
        if f"{name}.gradients" in tape.live:
            tape.make(part, again=size)  # type: ignore[arg-type]
            tape.free("again")
        else:
            tape.make(part, **{f"{name}.gradients": size})  # type: ignore[arg-type]

    def backward(self, stage: Stage) -> None:
        tape, s = self.tape, self.sizes
        order = self.names(stage)
        root = stage.units[0].kind == "root"
        if root:
            self.output_backward(stage.units[0], order[0][0])
            order = [*order[1:][::-1], order[0]]
        else:
            order = order[::-1]
        for i, (name, unit) in enumerate(order):
            if unit.kind not in ("root",):
                self.gather(unit, name, forward=False)
            if i + 1 < len(order) and unit.kind != "root":
                self.fetch(order[i + 1][1], order[i + 1][0])
            if unit.kind == "head":
                self.output_backward(unit, name)
            elif unit.kind == "block":
                tape.run(self.piece(unit)[1])
                if keeps_input(self.held):
                    tape.run(Piece((0,) * 5, (0, 0, 0, 0, -s.hidden)))
                if self.sharded and unit.trains:
                    size = unit.total("gathered", 1, trained=True)
                    # The walk counts them by name, the block's own tape by sum.
                    tape.run(Piece((0,) * 5, (0, 0, 0, -size, 0)))
                    tape.make("gathered", **{f"{name}.gradients": size})
            elif unit.trains:
                table = unit.weights[0]
                tape.make(g=s.whole)
                self.gradient(name, table.size * s.item)
                tape.free("g")
            self.scatter(unit, name)
        tape.free("sent")
