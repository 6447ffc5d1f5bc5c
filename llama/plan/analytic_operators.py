"""What the operators of a block make and let go: RMSNorm, rotation, and the collectives of sequence parallelism, one by one.

In bf16 norms and rotations have an fp32 middle, as llama/model computes them. A tensor that backward needs stays on the tape.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.plan.analytic_parts import Held, attention_widths
from llama.plan.analytic_tape import Tape


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
