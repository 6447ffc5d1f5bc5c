"""Means and slopes of autocorrelated series with honest errors, and equivalence tests on them. NumPy alone.

Points of a loss curve are no independent draws: what a mean of n of them is worth is its effective sample size, n over
the integrated autocorrelation time, which Geyer's initial positive sequence estimates (Practical Markov Chain Monte
Carlo, 1992, section 3.3). Equivalence is shown by two one-sided tests (TOST, Schuirmann 1987): the interval lies within
the tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]
Judgement = Literal["pass", "fail", "undecided"]

FEWEST = 3.0
"""Effective points below which an interval is no longer believed."""


@dataclass(frozen=True)
class Estimate:
    """A number from a series, and how far to trust it."""

    value: float
    error: float
    """Its standard error."""
    effective: float
    """Independent points that the series is worth."""

    def half(self, confidence: float) -> float:
        """Half the width of its interval: the true value lies above the lower end with `confidence`, and so below."""
        if self.error == 0:
            return 0.0
        return t_quantile(confidence, max(self.effective - 1, 1.0)) * self.error

    def judge(self, tolerance: float, confidence: float) -> Judgement:
        """pass: shown to lie within ± tolerance; fail: shown to lie outside; else there is too little data."""
        half = self.half(confidence)
        if self.error > 0 and self.effective < FEWEST and abs(self.value) <= tolerance + 3 * half:
            return "undecided"
        if abs(self.value) + half <= tolerance:
            return "pass"
        return "fail" if abs(self.value) - half > tolerance else "undecided"

    def more(self, tolerance: float, confidence: float) -> float:
        """How many times the data would decide, if the value stayed where it is; infinite on the very edge."""
        distance = abs(abs(self.value) - tolerance)
        return (self.half(confidence) / distance) ** 2 if distance else math.inf

    def detectable(self, tolerance: float, confidence: float, power: float = 0.8) -> float:
        """The smallest true value that would be shown to lie beyond the tolerance in `power` of such comparisons."""
        return tolerance + (self.half(confidence) + self.half(power))


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t: Cornish and Fisher's expansion around the normal quantile (Abramowitz and Stegun 26.7.5).

    Within 0.5 % from 3 degrees of freedom on, 12 % low at 1; fewer count as 1.
    """
    z, n = NormalDist().inv_cdf(probability), max(freedom, 1.0)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (i + 1) for i, term in enumerate(terms))


def autocorrelation_time(series: Series) -> float:
    """Points that one independent point is worth; at least 1."""
    n = len(series)
    centred = series - series.mean()
    if n < 4 or not centred.any():
        return 1.0
    spectrum = np.fft.rfft(centred, 2 * n)
    correlation = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n]
    correlation /= correlation[0]
    pairs = correlation[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: negative[0]] if len(negative) else pairs)
    return float(min(max(2 * pairs.sum() - 1, 1.0), n / 2))


def mean(series: Series) -> Estimate:
    """Mean of a stationary series."""
    time = autocorrelation_time(series)
    effective = len(series) / time
    # The variance about a mean of few independent points is too small by that mean's own.
    spread = float(series.std()) * math.sqrt(effective / max(effective - 1, 1.0))
    return Estimate(float(series.mean()), spread / math.sqrt(effective), effective)


def slope(x: Series, series: Series) -> Estimate:
    """Slope of the least-squares line; its error is that of independent residuals, widened by their autocorrelation."""
    centred = x - x.mean()
    total = float((centred**2).sum())
    value = float((centred * series).sum() / total)
    residuals = series - series.mean() - value * centred
    time = autocorrelation_time(residuals)
    effective = len(series) / time
    variance = float((residuals**2).mean()) * effective / max(effective - 2, 1.0)
    return Estimate(value, math.sqrt(variance * time / total), max(effective - 1, 1.0))


def noise(series: Series) -> float:
    """Standard deviation of what changes from point to point: each against the middle of its neighbours."""
    return float(jitter(series).std()) if len(series) > 2 else 0.0


def jitter(series: Series) -> Series:
    """What each point departs from the middle of its neighbours, of the variance of independent noise; n - 2 points."""
    return (series[1:-1] - (series[:-2] + series[2:]) / 2) * math.sqrt(2 / 3)


def smooth(series: Series, window: int) -> Series:
    """Centred mean over `window` points, fewer at the ends."""
    sums = np.concatenate(([0.0], np.cumsum(series)))
    at = np.arange(len(series))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(series))
    means: Series = (sums[high] - sums[low]) / (high - low)
    return means
