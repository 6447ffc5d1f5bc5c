"""A micro-batch walked through a stage, unit by unit in the order in which it runs, on a tape of what lives.

Between units stand FSDP2's gathering and scattering, with the buffers that torch holds on to and until when
(torch.distributed.fsdp, _fsdp_param_group.py and _fsdp_collectives.py of 2.13).
"""

from __future__ import annotations

from llama.plan.analytic_block import keeps_input, pieces
from llama.plan.analytic_operators import join, norm_backward, norm_forward, sizes, spread
from llama.plan.analytic_parts import Held, Stage, Unit
from llama.plan.analytic_tape import Piece, Tape
from llama.targets import HEAD


class Walk:
    """A step on one tape."""

    def __init__(self, tape: Tape, held: Held, later: bool, piped: bool = False):
        self.tape, self.held, self.sizes = tape, held, sizes(held)
        self.shard, self.sharded = held.layout.shard, held.sharded
        self.later, self.piped = later, piped
        self.moves = held.sharded and not piped  # a pipeline's stages stay gathered until the step ends
        self.blocks: dict[Unit, tuple[Piece, Piece]] = {}

    @property
    def weights(self) -> str:
        """Where gradients of weights go as they are made; see block_backward."""
        if self.sharded:
            return "added" if self.piped and self.later and self.held.compute == 4 else "gathered"
        return "added" if self.later else "gradients"

    def step(self, stage: Stage) -> None:
        """A micro-batch."""
        if self.later and self.sharded:  # what the one before it scattered last
            last = next((unit for unit in stage.units if unit.trains), None)
            self.tape.make("gathered", sent=last.total("", self.shard, trained=True) if last else 0)
        self.forward(stage)
        self.backward(stage)

    # FSDP

    def gather(self, unit: Unit, name: str, forward: bool) -> None:
        """The weights of a unit: cast, sent, and copied out of what came (torch's foreach_all_gather)."""
        if not self.moves or f"{name}.full" in self.tape.live:
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
        if not self.moves or self.shard == 1 or f"{name}.full" in self.tape.live or f"{name}.came" in self.tape.live:
            return
        tape, total = self.tape, unit.total("gathered", self.shard)
        if any(w.item != w.gathered for w in unit.weights):
            tape.make("gathered", cast=total // self.shard)
        tape.make("gathered", **{f"{name}.came": total})
        tape.free("cast")

    def scatter(self, unit: Unit, name: str) -> None:
        """After a unit's backward: its weights go, its gradients are summed over the ranks in fp32, and this rank's part
        joins its gradients. What was sent is freed when the next unit comes here."""
        tape = self.tape
        if not self.sharded:
            return
        if self.piped:
            self.accumulate(unit, name)
            return
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
        waits = self.later or own != part
        tape.make("gathered" if waits else "gradients", **{f"{name}.own": part})
        tape.free("divided", f"{name}.gradients")
        if waits:
            tape.free(f"{name}.own")
            if not self.later:
                tape.make("gradients", **{f"{name}.own": own})

    def accumulate(self, unit: Unit, name: str) -> None:
        """In a pipeline gradients wait for the step's end, whole and in fp32."""
        if self.held.compute == 2 and unit.trains:
            if not self.later:
                self.tape.make("gathered", **{f"{name}.sum": unit.total("", 1, trained=True)})
            self.tape.free(f"{name}.gradients")

    # Order of a micro-batch

    def names(self, stage: Stage) -> list[tuple[str, Unit]]:
        return [(f"{stage.index}.{i}", unit) for i, unit in enumerate(stage.units)]

    def piece(self, unit: Unit) -> tuple[Piece, Piece]:
        if unit not in self.blocks:
            self.blocks[unit] = pieces(self.held, unit, self.sizes, self.weights)
        return self.blocks[unit]

    def forward(self, stage: Stage) -> None:
        """Leaves what backward needs, and the stage's output under `less` when a later stage has it."""
        tape, s, held, reshard = self.tape, self.sizes, self.held, self.held.recipe.parallel.reshard
        tape.make(rope=held.tokens * held.recipe.model.head_size * 4)  # cosines and sines of half a head, fp32
        own = False  # the input of a later stage lies in a buffer of the pipeline's
        for name, unit in self.names(stage):
            self.gather(unit, name, forward=True)
            if unit.kind in ("embed", "root"):
                self.embedding()
                own = True
                if unit.kind == "embed" and reshard:
                    tape.free(f"{name}.full")
            elif unit.kind == "block":
                tape.run(self.piece(unit)[0])
                if own and not keeps_input(held):
                    self.less(s.hidden)
                own = True
                if reshard:
                    tape.free(f"{name}.full")
            else:
                self.output(unit)
        if stage.units[0].kind == "root":
            self.output(stage.units[0])
        if stage.last and held.compute == 2 and own:  # the norm keeps a copy of its own
            self.less(s.hidden)
        tape.free(self.came)

    def less(self, size: int) -> None:
        """An activation goes that a block's piece made."""
        self.tape.run(Piece((0,) * 5, (0, 0, 0, 0, -size)))

    def embedding(self) -> None:
        """Ids to hidden states; over tensor ranks those of other ranks' rows are zero until they are summed."""
        tape, s = self.tape, self.sizes
        if s.tensor > 1:
            tape.make(found=s.whole, mine=s.whole)
            tape.free("found")
            join(tape, s, "mine", "joined")
            tape.make(x=s.hidden)
            tape.free("joined")
        else:
            tape.make(x=s.hidden)

    def output(self, unit: Unit) -> None:
        """Norm, logits and loss, a chunk of tokens at a time; both gradients are formed on the spot."""
        tape, s, held = self.tape, self.sizes, self.held
        linear = next(linear for linear in unit.linears if linear.name == HEAD)
        norm = next(w for w in unit.weights if w.norm)
        norm_forward(tape, s, "n", norm.trained, linear.input_gradient)
        spread(tape, s, "n.out", "n.in")
        rows, wide = linear.out, 4 * linear.out * linear.width
        if linear.input_gradient:
            tape.make(dhidden=s.whole)
        if linear.trained:
            tape.make(dtable=wide)
        chunk = min(held.recipe.train.loss_chunk, held.tokens)
        tape.make(numbers=34 * chunk)  # labels' places, masks, peaks, sums: a few numbers a token
        logits = 4 * chunk * rows
        narrow = logits if s.item == 4 else logits // 2
        tape.make(logits=narrow)
        if s.item == 2:
            tape.make(wide=logits)
            tape.free("logits")
            tape.make(dlogits=narrow)
            tape.free("wide")
        if linear.input_gradient:
            tape.make(part=s.item * chunk * linear.width)
            tape.free("part")
        if linear.trained and s.item == 2:
            tape.make(part=rows * linear.width * 2)
            tape.free("part")
        tape.free("logits", "dlogits")
        if linear.trained and s.item == 2:
            tape.make(saved=wide // 2)
        tape.free("n.in", "numbers")
        if s.item == 2:
            tape.free("dtable")
        elif linear.trained:
            tape.rename("dtable", "saved")

    def output_backward(self, unit: Unit, name: str) -> None:
        tape, s = self.tape, self.sizes
        linear = next(linear for linear in unit.linears if linear.name == HEAD)
        norm = next(w for w in unit.weights if w.norm)
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
        if norm.trained and self.weights == "gradients":
            tape.make("gradients", **{f"{name}.norm": norm.size * s.item})

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
        tape, s, held = self.tape, self.sizes, self.held
        order = self.names(stage)
        if stage.units[0].kind == "root":
            self.output_backward(stage.units[0], order[0][0])
            order = [*order[1:][::-1], order[0]]
        else:
            order = order[::-1]
        if stage.last and held.compute == 4:
            self.less(s.hidden)
        if not stage.last:
            self.less(
                s.hidden
            )  # the gradient that comes in lies in a buffer of the pipeline's; the first block counts it
        for i, (name, unit) in enumerate(order):
            if unit.kind != "root":
                self.gather(unit, name, forward=False)
            if i + 1 < len(order) and unit.kind != "root":
                self.fetch(order[i + 1][1], order[i + 1][0])
            if unit.kind == "head":
                self.output_backward(unit, name)
            elif unit.kind == "block":
                tape.run(self.piece(unit)[1])
                if keeps_input(held) and (stage.first or i + 1 < len(order)):
                    self.less(s.hidden)
                if self.sharded and unit.trains and self.weights == "gathered":
                    size = unit.total("gathered", 1, trained=True)
                    # The walk counts them by name, the block's own tape by sum.
                    tape.run(Piece((0,) * 5, (0, 0, 0, -size, 0)))
                    tape.make("gathered", **{f"{name}.gradients": size})
            elif unit.trains:
                tape.make(g=s.whole)
                self.gradient(name, unit.weights[0].size * s.item)
                tape.free("g")
                if self.weights == "added":
                    tape.free(f"{name}.gradients")
            self.scatter(unit, name)
        # What the pipeline held beside: the output, in place of the gradient that was taken off above.
        tape.free("sent", "rope")
