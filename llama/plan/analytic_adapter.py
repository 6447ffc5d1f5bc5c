"""What frozen linears hold beside their product: adapters (llama/model/lora.py) and weights that are unpacked (nf4.py)."""

from __future__ import annotations

from llama.plan.analytic_operators import Sizes
from llama.plan.analytic_parts import Held, Linear
from llama.plan.analytic_tape import Tape

KEPT = ("casts", "keep", "dropped", "low", "sum")


def unpack(tape: Tape, held: Held, s: Sizes, linear: Linear) -> None:
    """A quantised weight is made anew for each product. NF4 looks pairs of fp32 levels up by bytes as int32; int8 is
    scaled as it is."""
    kind, size = held.recipe.lora.quantize, linear.out * linear.width
    if kind == "nf4":
        tape.make(codes=2 * size, levels=4 * size)
        tape.free("codes")
    if kind:
        tape.make(matrix=s.item * size)
        tape.free("levels", "matrix")


def forward(tape: Tape, held: Held, s: Sizes, linear: Linear) -> None:
    """s·(x Aᵀ) Bᵀ joins the linear's output, which is on the tape. Kept: A and B as they are computed with, the dropped
    input, its product with A; for DoRA the sum that the lengths scale."""
    at, lora, tokens, e = linear.name, held.recipe.lora, held.tokens, s.item
    unpack(tape, held, s, linear)
    if not linear.adapter:
        return
    x, out, rank = e * tokens * linear.width, e * tokens * linear.out, linear.adapter
    if lora.dropout:  # a hash of each token and column, in int32
        tape.make(hash=3 * 4 * tokens * linear.width)
        tape.free("hash")
        tape.make(**{f"{at}.keep": x, f"{at}.dropped": x})
    casts = e * rank * (linear.width + linear.out) if held.weights != e else 0
    tape.make(**{f"{at}.casts": casts, f"{at}.low": e * tokens * rank})
    if lora.dora:
        tape.make(added=out)
        tape.make(**{f"{at}.sum": out})
        tape.free("added")
    tape.make(result=out)
    tape.free("result")  # it takes the output's place


def backward(tape: Tape, held: Held, s: Sizes, linear: Linear, weights: str) -> None:
    """Gradients of A and B, and the input's through them."""
    at, lora, tokens, e = linear.name, held.recipe.lora, held.tokens, s.item
    if linear.input_gradient:
        unpack(tape, held, s, linear)
    if not linear.adapter:
        return
    x, out, rank = e * tokens * linear.width, e * tokens * linear.out, linear.adapter
    if lora.dora:
        tape.make(scaled=out)
    tape.make(dlow=e * tokens * rank)
    own = held.weights * rank * (linear.width + linear.out) + (held.weights * linear.out if lora.dora else 0)
    if weights == "added":
        tape.make(own=own)
        tape.free("own")
    else:
        tape.make("gathered" if weights == "gathered" else "gradients", **{f"w.{at}.adapter": own})
    if linear.input_gradient:
        tape.make(through=x)
        if lora.dropout:
            tape.make(undropped=x)
    tape.free("scaled", "dlow", "through", "undropped", *(f"{at}.{name}" for name in KEPT))
