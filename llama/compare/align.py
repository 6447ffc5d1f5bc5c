"""Two curves on one axis: steps, samples or tokens; where points fall apart the denser curve is interpolated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from data_prep.errors import UserError
from llama.compare.events import Curve, find_tag
from llama.compare.statistics import Series

Over = Literal["auto", "steps", "samples", "tokens"]
MEANS = ("train/loss",)
"""Tags whose points are means since the point before (transformers' trainer.py, _maybe_log_save_evaluate)."""
VERSUS = " vs samples"
"""Megatron-LM writes each curve twice; under this ending its step is the number of samples."""


class Line(NamedTuple):
    """A curve over its axis: x ascending, y of the same length, some of it perhaps not finite."""

    x: Series
    y: Series
    means: bool = False
    """Whether a point is the mean since the one before, as the Hugging Face trainer logs its loss."""


def counted_from(curves: Mapping[str, Curve]) -> int:
    """Number of the first step in a run's own counting: 1, or 0 where a point's step is that of the steps before it.

    Lightning, and so NeMo, counts from 0. The consumed samples tell, which include the point's own step; else a loss that
    begins at step 0, or that is logged each n steps at n - 1, 2n - 1, … as Lightning does.
    """
    tag = find_tag(curves, "samples")
    if tag is not None and len(curves[tag].steps) > 1:
        steps, samples = curves[tag].steps[:2], curves[tag].values[:2]
        if steps[1] > steps[0] and samples[1] > samples[0]:
            done = samples[0] * (steps[1] - steps[0]) / (samples[1] - samples[0])
            if round(done - steps[0], 3) in (0, 1):
                return 1 - round(done - steps[0])
    tag = find_tag(curves, "loss")
    if tag is None or not curves[tag].steps:
        return 1
    steps = curves[tag].steps
    apart = {later - earlier for earlier, later in itertools.pairwise(steps)}
    each = min(apart, default=1)
    return 0 if steps[0] == 0 or (each > 1 and apart == {each} and steps[0] % each == each - 1) else 1


def axis_for(runs: Mapping[str, Mapping[str, Curve]], over: Over) -> str:
    """What the runs share: steps; where a step is not as many tokens in each, tokens, or else samples; or what was asked."""
    if over != "auto":
        return over
    for unit in ("tokens", "samples"):
        rates = {_rate(curves, unit) for curves in runs.values()}
        if None not in rates:
            return unit if len(rates) > 1 else "steps"
    return "steps"


def _rate(curves: Mapping[str, Curve], unit: str) -> float | None:
    """Tokens or samples of a step, on average over the run; None where it does not say."""
    tag, loss = find_tag(curves, unit), find_tag(curves, "loss")
    step, amount = (curves[tag].steps[-1:], curves[tag].values[-1:]) if tag else ([], [])
    if unit == "samples" and loss is not None and loss + VERSUS in curves:
        step, amount = curves[loss].steps[-1:], [float(n) for n in curves[loss + VERSUS].steps[-1:]]
    done = step[0] + 1 - counted_from(curves) if step else 0
    return float(f"{amount[0] / done:.5g}") if amount and done else None  # events hold float32


def line(curves: Mapping[str, Curve], tag: str, over: str, name: str) -> Line:
    """The curve `tag` over `over`; steps count from 1. UserError when the run does not say where on that axis it lies."""
    curve = curves[tag]
    if over == "steps":
        return Line(
            np.array(curve.steps, float) + 1 - counted_from(curves), np.array(curve.values, float), tag in MEANS
        )
    if over == "samples" and tag + VERSUS in curves:
        other = curves[tag + VERSUS]
        return Line(np.array(other.steps, float), np.array(other.values, float))
    axis = find_tag(curves, over)
    if axis is None:
        raise UserError(f"{name}: holds no {over} (found {', '.join(sorted(curves))}); use --over steps", 2)
    known = dict(zip(*curves[axis], strict=True))
    points = [(known[s], v) for s, v in zip(*curve, strict=True) if math.isfinite(known.get(s, math.nan))]
    x, y = np.array(points, float).reshape(-1, 2).T
    return Line(x, y, tag in MEANS)


def align(a: Line, b: Line, names: tuple[str, str], over: str) -> tuple[Series, Series, Series]:
    """x, and both curves there: the points of the sparser one in the range that both cover.

    Where both have a point, and nothing is made up, points that are the same batch stay a pair; where the sparser one's
    points are means, they meet the other's means over the same steps. Points that are not finite are left out. Raises
    UserError when there is no common range.
    """
    a, b = (Line(c.x[np.isfinite(c.y)], c.y[np.isfinite(c.y)], c.means) for c in (a, b))
    if not len(a.x) or not len(b.x):
        raise UserError(f"{names[0] if not len(a.x) else names[1]}: has no finite point", 1)
    low, high = max(a.x[0], b.x[0]), min(a.x[-1], b.x[-1])
    if low > high or len(a.x) < 2 or len(b.x) < 2:
        ranges = "; ".join(
            f"{name} has {over} {c.x[0]:,.0f} to {c.x[-1]:,.0f}" for name, c in zip(names, (a, b), strict=True)
        )
        raise UserError(f"the runs have no common range: {ranges}; choose runs that overlap, or another --over", 2)
    inside = [c.x[(c.x >= low) & (c.x <= high)] for c in (a, b)]
    x = min(inside, key=len)
    return x, _at(x, a, len(inside[0]) > len(x) and b.means), _at(x, b, len(inside[1]) > len(x) and a.means)


def _at(x: Series, curve: Line, means: bool) -> Series:
    """A curve at `x`; with `means` its mean since the x before, where it has points there."""
    y = np.interp(x, curve.x, curve.y)
    if not means:
        return y
    sums = np.concatenate(([0.0], np.cumsum(curve.y)))
    end = np.searchsorted(curve.x, x, "right")
    begin = np.searchsorted(curve.x, np.concatenate(([2 * x[0] - x[1]], x[:-1])), "right")
    found: Series = np.where(end > begin, (sums[end] - sums[begin]) / np.maximum(end - begin, 1), y)
    return found
