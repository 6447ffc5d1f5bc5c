"""Faults that were planted into real runs, and where they showed: what a comparison of given noise would have found.

Measured by benchmarks/parity_faults.py on three tiny Llamas, those of the held-out set among them (up to 0.7 million
parameters, up to 600 steps; benchmarks/results/parity_faults-CPU.json and parity_held_out-CPU.json, to which a test holds this
table). An effect is the smallest of the three; they differ by a factor of two mostly, of fifty for the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama.compare.rules import Finding, percent


@dataclass(frozen=True)
class Fault:
    """A planted fault."""

    name: str
    """Its run in the benchmark."""
    what: str
    effects: tuple[tuple[str, float], ...]
    """Rules that it shows in, with the size of its effect there, as a share: at least."""


LOSS, NORM = "opening, loss", "opening, gradient norm"
FAULTS = (
    Fault("gradients_2_percent", "gradients 2 % too large after step 50",
          (("gradient norm", 0.017),)),
    Fault("rope_swapped_goes_on", "RoPE halves swapped over trained weights",
          ((LOSS, 0.0096), (NORM, 0.048), ("final gap", 0.0027))),
    Fault("tail_nearest", "bf16 weights without stochastic rounding, low learning rate",
          (("final gap", 0.0055),)),
    Fault("mask_shifted", "label mask shifted by one",
          ((LOSS, 0.00041), (NORM, 0.0072), ("final gap", 0.001))),
    Fault("rank_reads_anothers", "one of two data ranks reads the other's samples",
          ((LOSS, 0.013), ("final gap", 0.066), ("gradient norm", 0.16))),
    Fault("no_decay_mask", "weight decay on norms too",
          (("gradient norm", 0.013), ("final gap", 0.0014))),
)  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """Whether a comparison would have found a fault."""

    fault: Fault
    rule: str
    """The one that would have seen it best."""
    effect: float
    detectable: float
    found: bool

    @property
    def says(self) -> str:
        seen = f"{self.rule}: {percent(self.effect)} or more when planted, {percent(self.detectable)} is enough here"
        return f"{'would have found' if self.found else 'would have missed'}: {self.fault.what} ({seen})"


def within_reach(findings: Sequence[Finding]) -> list[Reach]:
    """Each planted fault with the rule that would have seen it best at these findings' noise."""
    limits = {f.rule: f.detectable for f in findings if f.decisive and f.detectable and f.verdict != "absent"}
    reach = []
    for fault in FAULTS:
        seen = [(effect / limits[rule], rule, effect) for rule, effect in fault.effects if rule in limits]
        if seen:
            ratio, rule, effect = max(seen)
            reach.append(Reach(fault, rule, effect, limits[rule], ratio >= 1))
    return reach
