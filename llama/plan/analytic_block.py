"""What a block holds while it runs forward and backward: its operators one by one, with the tensors that each makes.

As Korthikanti et al. 2022, section 4.1, count a layer's activations, for this network and these operators: RMSNorm, rotation
and SwiGLU as llama/model has them, in bf16 with an fp32 middle. A tensor is kept for backward until its `free`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.plan.analytic_parts import Held, Linear, Unit, attention_widths
from llama.plan.analytic_tape import Piece, Tape


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of a block on this rank, for one micro-batch."""

    item: int
    """Of an element that is computed with."""
    hidden: int
    """The stream between the blocks, in `item`; under sequence parallelism a rank's part of it."""
    whole: int
    """The same over all tensor ranks' tokens."""
    row: int
    """One fp32 number for each token of the stream, such as RMSNorm's root."""
    query: int
    key: int
    scores: int
    """The logarithm of each query's partition, fp32 (flash attention, Dao et al. 2022)."""
    middle: int
    """What SwiGLU works on."""
    tensor: int
    """Tensor ranks."""
    sequence: bool

    @property
    def wide(self) -> int:
        """The stream in fp32."""
        return self.hidden * 4 // self.item


def sizes(held: Held) -> Sizes:
    model, tensor, e = held.recipe.model, held.layout.tensor, held.compute
    heads, query, key = attention_widths(model, tensor)
    tokens, stream = held.tokens, held.stream
    return Sizes(
        e, e * stream * model.hidden_size, e * tokens * model.hidden_size, 4 * stream, e * tokens * query,
        e * tokens * key, 4 * tokens * heads, e * tokens * model.intermediate_size // tensor, tensor,
        held.recipe.parallel.sequence_parallel and tensor > 1,
    )  # fmt: skip


def norm_forward(tape: Tape, s: Sizes, at: str, trained: bool, needed: bool) -> None:
    """x to `at`.out. Kept: x in fp32, the normed x for the weight's gradient, the root."""
    if s.item == 2:
        tape.make(**{f"{at}.x": s.wide})
    tape.make(**{f"{at}.square": s.wide, f"{at}.root": s.row})
    tape.free(f"{at}.square")
    tape.make(**{f"{at}.normed": s.wide})
    if s.item == 2:
        tape.make(**{f"{at}.scaled": s.wide})
    tape.make(**{f"{at}.out": s.hidden})
    tape.free(f"{at}.scaled")
    if not trained:
        tape.free(f"{at}.normed")
    if not needed:
        tape.free(f"{at}.x", f"{at}.root")


def norm_backward(tape: Tape, s: Sizes, at: str, gradient: str, trained: bool) -> None:
    """The gradient called `gradient` goes; `at`.dx comes."""
    wide = s.wide
    if s.item == 2:
        tape.make(**{f"{at}.g": wide})
        tape.free(gradient)
    else:
        tape.rename(gradient, f"{at}.g")
    tape.make(**{f"{at}.dnormed": wide})
    if trained:
        tape.make(**{f"{at}.product": wide})
    tape.free(f"{at}.product", f"{at}.normed", f"{at}.g")
    # Through x · root, and through the root: the mean of squares spreads over the whole row.
    tape.make(**{f"{at}.d1": wide, f"{at}.d2": wide})
    tape.free(f"{at}.dnormed", f"{at}.d2")
    tape.make(**{f"{at}.d2": wide, f"{at}.d3": wide, f"{at}.d4": wide, f"{at}.d5": wide})
    tape.free(f"{at}.d2", f"{at}.d3", f"{at}.d4", f"{at}.root")
    tape.make(**{f"{at}.sum": wide})
    tape.free(f"{at}.d1", f"{at}.d5", f"{at}.x")
    if s.item == 2:
        tape.make(**{f"{at}.dx": s.hidden})
        tape.free(f"{at}.sum")
    else:
        tape.rename(f"{at}.sum", f"{at}.dx")


def spread(tape: Tape, s: Sizes, old: str, new: str) -> None:
    """Sequence parallelism's all-gather of the stream (Korthikanti et al. 2022, section 4.2.2): what came over the links
    is put in order by a copy."""
    if s.sequence:
        tape.make(came=s.whole)
        tape.make(**{new: s.whole})
        tape.free("came", old)
    else:
        tape.rename(old, new)


def join(tape: Tape, s: Sizes, old: str, new: str) -> None:
    """Sum of the tensor ranks' parts: a reduce-scatter along the sequence, or an all-reduce."""
    if s.tensor == 1:
        tape.rename(old, new)
    elif s.sequence:
        tape.make(ordered=s.whole)
        tape.make(**{new: s.hidden})
        tape.free("ordered", old)
    else:
        tape.make(**{new: s.whole})
        tape.free(old)


def rotate_forward(tape: Tape, s: Sizes, of: str, size: int) -> None:
    """`of` to `of`.turned: four half products in fp32, joined. Nothing is kept but cosines and sines."""
    half = size * 4 // s.item // 2
    if s.item == 2:
        tape.make(wide=2 * half)
    tape.make(a=half, b=half, first=half)
    tape.free("a", "b")
    tape.make(a=half, b=half, second=half)
    tape.free("a", "b")
    if s.item == 2:
        tape.make(joined=2 * half)
        tape.free("first", "second")
    tape.make(**{f"{of}.turned": size})
    tape.free("first", "second", "joined", "wide")


def rotate_backward(tape: Tape, s: Sizes, of: str, size: int) -> None:
    """The gradient of `of`.turned to that of `of`, both called d`of`."""
    half = size * 4 // s.item // 2
    if s.item == 2:
        tape.make(wide=2 * half)
        tape.free(f"d{of}")
    else:
        tape.rename(f"d{of}", "wide")
    tape.make(a=half, b=half, c=half, d=half)
    tape.free("a", "b", "c", "d", "wide")
    tape.make(**{f"d{of}": size})


def block_forward(tape: Tape, held: Held, unit: Unit, s: Sizes, until_kept: bool = False) -> None:
    """x to `out`; what stays on the tape beside it is kept for backward. `until_kept`: as recomputation has it, up to the
    last tensor that backward needs."""
    q, k, v, o, gate, up, down = unit.linears
    first, second = (
        w.trained for w in unit.weights if w.whole and w.columns == 1 and w.rows == held.recipe.model.hidden_size
    )
    norm_forward(tape, s, "n1", first, q.input_gradient)
    spread(tape, s, "n1.out", "n1.in")
    tape.make(q=s.query, k=s.key, v=s.key)
    if not any(map(_needs_input, (q, k, v))):
        tape.free("n1.in")
    rotate_forward(tape, s, "q", s.query)
    rotate_forward(tape, s, "k", s.key)
    tape.free("q", "k")
    tape.make(attention=s.query, scores=s.scores)
    if not unit.attention_backward:
        tape.free("q.turned", "k.turned", "v", "scores")
    tape.make(o=s.whole)
    if not (unit.attention_backward or _needs_input(o)):
        tape.free("attention")
    join(tape, s, "o", "o.joined")
    tape.make(x1=s.hidden)
    tape.free("o.joined")
    norm_forward(tape, s, "n2", second, gate.input_gradient)
    spread(tape, s, "n2.out", "n2.in")
    tape.make(gate=s.middle, silu=s.middle, up=s.middle, h=s.middle)
    if not any(map(_needs_input, (gate, up))):
        tape.free("n2.in")
    if not down.input_gradient:
        tape.free("gate", "silu", "up")
    if until_kept:
        if s.item == 2:
            tape.free("x1")
        return
    tape.make(down=s.whole)
    if not _needs_input(down):
        tape.free("h")
    join(tape, s, "down", "down.joined")
    tape.make(out=s.hidden)
    tape.free("down.joined")
    if s.item == 2 or not gate.input_gradient:  # in fp32 the norm keeps its input as it is
        tape.free("x1")


def _needs_input(linear: Linear) -> bool:
    return linear.trained or bool(linear.adapter)


def block_backward(tape: Tape, held: Held, unit: Unit, s: Sizes, weights: str) -> None:
    """From what `block_forward` kept and the gradient `g` of its output to `g` of its input. `weights`: where gradients of
    weights go: gathered (FSDP scatters them later), gradients (the first ones stay) or added (to those that are there)."""
    q, k, v, o, gate, up, down = unit.linears
    first, second = (
        w.trained for w in unit.weights if w.whole and w.columns == 1 and w.rows == held.recipe.model.hidden_size
    )

    def norm(at: str, gradient: str, trained: bool) -> None:
        norm_backward(tape, s, at, gradient, trained)
        if trained and weights != "added":
            tape.make(
                "gathered" if weights == "gathered" else "gradients",
                **{f"w.{at}": s.item * held.recipe.model.hidden_size},
            )

    def linear(of: Linear, gradient: str, into: str, size: int) -> None:
        """Gradients of the weight, then of the input."""
        matrix = of.out * of.width * s.item
        name = f"w.{of.name}"
        if of.trained:
            tape.make(
                "gathered" if weights == "gathered" else "gradients" if weights == "gradients" else "activations",
                **{name: matrix},
            )
        if of.input_gradient:
            tape.make(**{into: size})
        if weights == "added":
            tape.free(name)
        tape.free(gradient)

    # Feed-forward.
    tape.make(g2=0)
    if s.sequence:
        tape.make(came=s.whole)
        tape.make(gfull=s.whole)
        tape.free("came")
    else:
        tape.make(gfull=0)  # the residual's own
    linear(down, "gfull", "dh", s.middle)
    tape.free("h")
    tape.make(dup=s.middle, dsilu=s.middle)
    tape.free("dh", "silu", "up")
    linear(up, "dup", "d1", s.whole)
    tape.make(dgate=s.middle)
    tape.free("dsilu", "gate")
    linear(gate, "dgate", "d2", s.whole)
    tape.make(dn=s.whole)
    tape.free("d1", "d2", "n2.in")
    join(tape, s, "dn", "dn.joined")
    norm("n2", "dn.joined", second)
    tape.make(g1=s.hidden)
    tape.free("g", "n2.dx", "x1", "g2")
    # Attention.
    if s.sequence:
        tape.make(came=s.whole)
        tape.make(gfull=s.whole)
        tape.free("came")
    else:
        tape.make(gfull=0)
    linear(o, "gfull", "dattention", s.query)
    tape.make(dq=s.query, dk=s.key, dv=s.key)
    tape.free("dattention", "attention", "scores", "q.turned", "k.turned", "v")
    rotate_backward(tape, s, "k", s.key)
    rotate_backward(tape, s, "q", s.query)
    linear(v, "dv", "d1", s.whole)
    linear(k, "dk", "d2", s.whole)
    tape.make(d12=s.whole)
    tape.free("d1", "d2")
    linear(q, "dq", "d3", s.whole)
    tape.make(dn=s.whole)
    tape.free("d12", "d3", "n1.in")
    join(tape, s, "dn", "dn.joined")
    norm("n1", "dn.joined", first)
    tape.make(g=s.hidden)
    tape.free("g1", "n1.dx")


KEPT = frozenset({"q", "k", "v", "attention", "scores", "o", "gate", "up", "down"})
"""Results of matrix products and attention, which selective checkpointing keeps (llama/parallel/remat.py)."""
JOINED = frozenset({"o.joined", "down.joined"})
"""What came over the links, which it keeps too."""


def pieces(held: Held, unit: Unit, s: Sizes, weights: str) -> tuple[Piece, Piece]:
    """A block's forward, which leaves what it keeps and its output; its backward, which takes what was kept and the block's
    input away and counts the gradient that it is given."""
    mode = held.recipe.train.activation_checkpointing
    kept = KEPT | JOINED if s.tensor > 1 else KEPT
    tape = Tape()
    if mode == "selective":
        tape.held = kept
    block_forward(tape, held, unit, s)
    if mode != "none":
        tape.free(*(name for name in tuple(tape.live) if name != "out"))
    forward = tape.piece()

    tape.free("out")
    before = tuple(tape.now)
    tape.most, tape.peak = before, tape.total
    tape.make(g=s.hidden)
    if mode != "none":
        block_forward(tape, held, unit, s, until_kept=True)
        tape.held = frozenset()
    block_backward(tape, held, unit, s, weights)
    tape.free("g", "x1", *KEPT, *JOINED)
    most, left = (tuple(a - b for a, b in zip(x, before, strict=True)) for x in (tape.most, tape.now))
    return forward, Piece(most, left)


def input_piece(s: Sizes) -> Piece:
    """A block's backward of its input alone (zero bubble, Qi et al. 2023). It frees nothing that forward kept and leaves
    the gradients that products and norms were given, for the backward of the weights."""
    tape = Tape()
    tape.make(g=s.hidden, dh=s.middle, dup=s.middle, dsilu=s.middle)
    tape.free("dh")
    tape.make(dgate=s.middle, dn2=s.whole)
    tape.free("dsilu")
    tape.make(wide=5 * s.wide)
    tape.free("wide")
    tape.make(g1=s.hidden, dattention=s.query, dq=s.query, dk=s.key, dv=s.key)
    tape.free("g1", "dattention")
    tape.make(dn1=s.whole, wide=5 * s.wide)
    tape.free("wide")
    return tape.piece()


def keeps_input(held: Held) -> bool:
    """Whether a block's input lives until its backward: fp32 norms keep it, and what is computed again starts from it. In
    bf16 the norm keeps an fp32 copy of its own."""
    return held.compute == 4 or held.recipe.train.activation_checkpointing != "none"
