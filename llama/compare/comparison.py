"""What was found of one candidate, and its verdict in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama.compare.rules import Band, Finding
from llama.compare.statistics import Series

EXIT = {"pass": 0, "fail": 1, "undecided": 3}
"""Exit codes of verdicts; 2 is wrong use."""


@dataclass(frozen=True)
class Comparison:
    """What was found of one candidate."""

    candidate: str
    references: tuple[str, ...]
    verdict: str
    """pass, fail or undecided."""
    sentence: str
    findings: tuple[Finding, ...]
    over: str
    first: float
    last: float
    """The part of the axis that was judged."""
    points: int
    pairing: float
    """How many times smaller the noise of the gap is than that of two unrelated curves; 1 when pairing does not help."""
    likeness: float
    """Correlation of the two curves' noise from point to point."""
    same_start: bool
    noise: float
    """Noise of the gap from point to point, as a share of the loss."""
    band: Mapping[str, Band]
    """By statistic; empty with one reference."""
    x: Series
    reference_loss: Series
    candidate_loss: Series
    norms: NDArray[np.float64] | None
    """x, gradient norm of the reference and of the candidate, (3, n)."""
    spread: Series | None
    """Half the distance between the lowest and the highest reference at each x."""
    parted: bool = False
    """Whether a pair of one start is judged as seeds are, because rounding has led them as far apart."""
    recipes: tuple[str, ...] = ()
    """Keys in which the recipes of our own run folders differ, with both values."""
    from_zero: tuple[str, ...] = ()
    """Runs that number their first step 0; 1 was added."""

    @property
    def pair(self) -> bool:
        """Whether the tolerances alone judge."""
        return self.same_start and not self.parted

    @property
    def exit_code(self) -> int:
        return EXIT[self.verdict]


def sentence(c: Comparison) -> str:
    """The verdict for people."""
    against = " and ".join(c.references)
    counted = [finding for finding in c.findings if finding.decisive and finding.verdict == c.verdict]
    span = f"{c.over} {c.first:,.0f} to {c.last:,.0f}"
    if c.verdict == "fail":
        why = "; ".join(f.says for f in counted)
        return f"{c.candidate} differs from {against} ({span}): {why}"
    if c.verdict == "undecided":
        why = "; ".join(f.says for f in counted)
        return f"{c.candidate} against {against} is undecided ({span}): {why}{more_in_words(c, counted)}"
    gap = next((f for f in counted if f.rule == "final gap"), None)
    shown = f"; {gap.says}" if gap else ""
    return f"{c.candidate} equals {against} by every rule that counts ({span}){shown}"


def more_in_words(c: Comparison, undecided: Sequence[Finding]) -> str:
    """How much longer the run would have to be, or what else would decide."""
    seeds = "further seeds with --reference, of the same batches if the candidate's are"
    if not c.pair and any(f.more is None for f in undecided):
        return f"; give {seeds}" + ("" if c.same_start else ", or --same-start if the runs have one")
    wanted = [f.more for f in undecided if f.more is not None]
    if not wanted:
        return ""
    times = max(wanted)
    if times > 20:
        chance = "" if c.band else f": {seeds}, would tell how much of it is chance"
        return f"; no length within reason decides, the gap lies on the edge of the tolerance{chance}"
    longer = max(times - 1, 0.1) * (c.last - c.first)
    return f"; about {longer:,.0f} more {c.over} would decide, if it goes on like this"
