"""The rules by which two runs count as equal: what each looks at, what it found, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llama.compare.align import Line
from llama.compare.statistics import FEWEST, Estimate, Judgement, Series, mean, slope, t_quantile

Verdict = Literal["pass", "fail", "undecided", "absent"]


@dataclass(frozen=True)
class Options:
    """What a person may choose; the defaults decide `herd compare`."""

    start: float | None = None
    """Points before this place on the axis are not judged; the first tenth of the common range when not given."""
    tolerance: float = 0.005
    """Largest gap of the losses that counts as none, as a share of the reference's loss."""
    drift_tolerance: float = 0.01
    """Largest growth of the gap over the last half that counts as none, as a share of the loss."""
    norm_tolerance: float = 0.01
    """The same for the level of the gradient norm."""
    parameter_tolerance: float = 0.02
    """The same for the norm of the weights at the end."""
    rtol: float = 0.05
    """Pointwise rule: a point agrees within this share of the reference."""
    share: float = 0.95
    """Pointwise rule: the share of points that must agree."""
    confidence: float = 0.95
    """Of each one-sided test."""
    decide: Literal["noise", "pointwise", "both"] = "noise"
    """Which rules the verdict follows; all are shown."""
    same_start: bool | None = None
    """Whether the runs have the same first weights and the same batches in the same order; read from the recipes of our
    own run folders when not given."""


@dataclass(frozen=True)
class Finding:
    """What one rule says."""

    rule: str
    verdict: Verdict
    says: str
    """In words, numbers included."""
    value: float | None = None
    """What was measured, as a share of the reference."""
    low: float | None = None
    high: float | None = None
    """Its interval."""
    tolerance: float | None = None
    detectable: float | None = None
    """The smallest effect that this comparison would have called a fault, in four of five cases."""
    decisive: bool = True
    """Whether the verdict follows it."""
    more: float | None = None
    """How many times the data would decide, where it is undecided."""


OPENING = 10
"""Steps in which runs of one start have not diverged yet."""
OPENING_BOUNDS = {"bf16": (5e-3, 3e-2), "fp32": (1e-4, 1e-3)}
"""How far apart loss and gradient norm may be in the first steps of one run: where either run computes in bf16 the
bounds of tests/dist/test_bf16.py, where both say fp32 a hundred times what two layouts were measured to be."""
BLOCKS = 4
"""A band's noise is read off this many parts of each pair of references."""


def percent(value: float, sign: bool = False) -> str:
    """A share in per cent; with more digits below a hundredth of one."""
    digits = 2 if abs(value) >= 5e-5 or abs(value) < 5e-7 else 4
    return f"{value:{'+' if sign else ''}.{digits}%}"


def finite(runs: Sequence[tuple[str, str, Line]], over: str) -> Finding:
    """No point of loss or norm, in either run, is NaN or infinite. `runs`: name, tag, curve."""
    for name, tag, curve in runs:
        bad = np.flatnonzero(~np.isfinite(curve.y))
        if len(bad):
            place = {"steps": "step", "samples": "sample", "tokens": "token"}[over]
            what = f"{name}: {tag} is {curve.y[bad[0]]:g} at {place} {curve.x[bad[0]]:,.0f}"
            more = f", and at {len(bad) - 1:,} more points" if len(bad) > 1 else ""
            return Finding("finite", "fail", what + more)
    return Finding("finite", "pass", "every point is a finite number")


def pointwise(a: Series, b: Series, options: Options) -> Finding:
    """The field's rule: from some step on, points agree within rtol, all but a few (NxD's GPU against Trainium check)."""
    apart = np.abs(b - a) / np.abs(a)
    share = float((apart <= options.rtol).mean())
    says = (
        f"{share:.1%} of {len(a):,} points agree within {options.rtol:.0%} (wanted: {options.share:.0%}), "
        f"the farthest is {apart.max():.1%} off"
    )
    return Finding("pointwise", "pass" if share >= options.share else "fail", says, share, tolerance=options.share)


def opening(what: str, steps: Series, a: Series, b: Series, bound: float, claimed: bool) -> Finding:
    """The first steps of runs that claim the same weights and batches: nothing has diverged yet, so they must agree.

    Runs that log seldom are judged by their first point, when that is still an early one.
    """
    rule = f"opening, {what}"
    if not claimed:
        return Finding(rule, "absent", "not judged, as the runs do not claim the same first weights and batches")
    early = steps <= max(OPENING, steps[0] if len(steps) and steps[0] <= 2 * OPENING else 0)
    if not early.any():
        return Finding(rule, "absent", f"not judged, as neither run shows a {what} of its first {OPENING} steps")
    worst = float(np.abs(b[early] / a[early] - 1).max())
    says = f"up to step {steps[early][-1]:,.0f} the {what} is {percent(worst)} apart (with one start {percent(bound)} at most)"
    return Finding(rule, "pass" if worst <= bound else "fail", says, worst, tolerance=bound, detectable=bound)


def gap(a: Series, b: Series) -> Estimate:
    """Mean of the gap over the last quarter, as a share of the reference's loss there."""
    last = slice(len(a) * 3 // 4, None)
    return _share(mean((b - a)[last]), float(a[last].mean()))


def drift(x: Series, a: Series, b: Series) -> Estimate:
    """What the gap grows by over the last half at its own slope there, as a share of the reference's loss."""
    last = slice(len(a) // 2, None)
    span = float(x[-1] - x[last][0])
    return _share(slope(x[last] / span, (b - a)[last]), float(a[last].mean()))


def level(a: Series, b: Series) -> Estimate:
    """Mean of log(b / a): how many times as large one is as the other, 0 when alike."""
    return mean(np.log(b / a))


def last_level(a: Series, b: Series) -> Estimate:
    """The same over the last quarter, of curves that wander without noise: their trend is no error."""
    last = slice(len(a) * 3 // 4, None)
    ratio = np.log(b[last] / a[last])
    at = np.arange(len(ratio)) - (len(ratio) - 1) / 2
    trend = float((at * ratio).sum() / (at**2).sum())
    rest = mean(ratio - trend * at)
    return Estimate(rest.value, rest.error, max(rest.effective, FEWEST))


def _share(estimate: Estimate, whole: float) -> Estimate:
    return Estimate(estimate.value / whole, estimate.error / whole, estimate.effective)


UNKNOWN = 5.0
"""Times the tolerance from which on a gap is blamed although nobody knows how far seeds of the reference lie apart, and
up to which a band of seeds excuses one."""


@dataclass(frozen=True)
class Band:
    """How far seeds of the reference lie apart in one statistic: what no candidate may be blamed for."""

    spread: float
    """Standard deviation between seeds."""
    half: float
    """A gap within ± this of the references' mean is as small as theirs are."""
    outer: float
    """A further seed lies within ± this in 19 of 20 cases, for all that so few seeds can tell."""


def band_of(values: Sequence[float], references: int, wanders: bool = False) -> Band:
    """The band from the statistic of several parts of each pair of references.

    A pair's gap has twice the variance of a seed. For `half` parts of one pair count as half as many independent ones, or
    as one where the statistic `wanders` without noise; of as many pairs as share no seed. A seed may as well be better than
    another all along: `outer` takes each seed as one draw (the t interval of one more draw).
    """
    spread = math.sqrt(float(np.mean(np.square(values))) / 2)
    pairs, further = references * (references - 1) // 2, math.sqrt(1 + 1 / references)
    freedom = (references - 1) * (1.0 if wanders else max(1.0, len(values) / pairs / 2))
    half, outer = (t_quantile(0.975, draws) * spread * further for draws in (freedom, references - 1))
    return Band(spread, half, outer)


def judged(
    rule: str,
    says: str,
    estimate: Estimate,
    tolerance: float,
    band: Band | None,
    options: Options,
    known: bool = True,
    witness: bool = False,
) -> Finding:
    """An equivalence test in words. `known`: whether a gap beyond tolerance and band could not be a matter of seeds; else
    only one of UNKNOWN times that is blamed. A `witness` may blame a run, but where seeds themselves lie so far apart that
    it can tell nothing, the verdict does not wait for it.
    """
    limit = max(tolerance, band.half if band else 0.0)
    half = estimate.half(options.confidence)
    verdict: Judgement = estimate.judge(limit, options.confidence)
    text = f"{says} {percent(estimate.value, sign=True)} ± {percent(half)} (tolerance {percent(tolerance)}"
    text += f", band of the seeds {percent(band.half)})" if band else ")"
    more, blamed, decisive = None, UNKNOWN * limit, True
    wide = band is not None and band.half > UNKNOWN * tolerance
    if known:
        outer = band.outer if band else 0.0
        blamed = max(limit, outer if wide else min(outer, UNKNOWN * tolerance))
    if band and not wide and abs(estimate.value) <= band.half:
        verdict = "pass"  # the band holds the noise of a run's own statistic already
    elif wide and abs(estimate.value) - half <= blamed and estimate.judge(tolerance, options.confidence) != "pass":
        verdict, decisive = "undecided", not witness
        text += "; seeds lie too far apart to show anything" + (
            "" if witness else ": compare longer runs, or more seeds"
        )
    elif verdict == "fail" and abs(estimate.value) - half <= blamed:
        verdict = "undecided"
        text += "; a matter of seeds or batches, perhaps"
    elif verdict == "undecided":
        more = estimate.more(limit, options.confidence)
    return Finding(
        rule, verdict, text, estimate.value, estimate.value - half, estimate.value + half, limit,
        estimate.detectable(blamed, options.confidence), decisive, more,
    )  # fmt: skip
