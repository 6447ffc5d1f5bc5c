"""What a block holds while it runs forward and backward: its operators one by one, with the tensors that each makes.

As Korthikanti et al. 2022, section 4.1, count a layer's activations, for this network and the operators that a CPU has for it
(a GPU's own RMSNorm keeps less). A tensor is kept for backward until its `free`.
"""

from __future__ import annotations

from llama.plan import analytic_adapter as adapter
from llama.plan.analytic_operators import (
    Sizes,
    join,
    norm_backward,
    norm_forward,
    rotate_backward,
    rotate_forward,
    spread,
)
from llama.plan.analytic_parts import Held, Linear, Unit
from llama.plan.analytic_tape import Piece, Tape


def block_forward(tape: Tape, held: Held, unit: Unit, s: Sizes, until_kept: bool = False) -> None:
    """x to `out`; what stays on the tape beside it is kept for backward. `until_kept`: as recomputation has it, up to the
    last tensor that backward needs."""
    q, k, v, o, gate, up, down = unit.linears
    first, second = (w.trained for w in unit.weights if w.norm)

    def product(linear: Linear, name: str, size: int) -> None:
        tape.make(**{name: size})
        adapter.forward(tape, held, s, linear)

    norm_forward(tape, s, "n1", first, q.input_gradient)
    spread(tape, s, "n1.out", "n1.in")
    product(q, "q", s.query)
    product(k, "k", s.key)
    product(v, "v", s.key)
    if not any(map(_needs_input, (q, k, v))):
        tape.free("n1.in")
    rotate_forward(tape, s, "q", s.query)
    rotate_forward(tape, s, "k", s.key)
    tape.free("q", "k")
    tape.make(attention=s.query, scores=s.scores)
    if not unit.attention_backward:
        tape.free("q.turned", "k.turned", "v", "scores")
    product(o, "o", s.whole)
    if not (unit.attention_backward or _needs_input(o)):
        tape.free("attention")
    join(tape, s, "o", "o.joined")
    tape.make(x1=s.hidden)
    tape.free("o.joined")
    norm_forward(tape, s, "n2", second, gate.input_gradient)
    spread(tape, s, "n2.out", "n2.in")
    product(gate, "gate", s.middle)
    tape.make(silu=s.middle)
    product(up, "up", s.middle)
    tape.make(h=s.middle)
    if not any(map(_needs_input, (gate, up))):
        tape.free("n2.in")
    if not down.input_gradient:
        tape.free("gate", "silu", "up")
    if until_kept:
        adapter.forward(tape, held, s, down)
        if s.item == 2:
            tape.free("x1")
        return
    product(down, "down", s.whole)
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
    first, second = (w.trained for w in unit.weights if w.norm)

    def norm(at: str, gradient: str, trained: bool, needed: bool) -> None:
        if not needed:
            tape.free(gradient)
            return
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
        adapter.backward(tape, held, s, of, weights)
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
    norm("n2", "dn.joined", second, gate.input_gradient)
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
    norm("n1", "dn.joined", first, q.input_gradient)
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
    if held.recipe.train.compile:  # a compiler keeps of these what backward reads: the ranks' sum, not its parts
        kept -= {"down", "down.joined"} if s.tensor == 1 else {"o", "down", "down.joined"}
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
    tape.free(*(name for name in tuple(tape.live) if not name.startswith("w.")))
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
