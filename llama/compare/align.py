"""Two curves on one axis: steps, samples or tokens; where points fall apart the denser curve is interpolated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from data_prep.errors import UserError
from llama.compare.events import Curve, find_tag
from llama.compare.statistics import Series

Over = Literal["auto", "steps", "samples", "tokens"]
VERSUS = " vs samples"
"""Megatron-LM writes each curve twice; under this ending its step is the number of samples."""


class Line(NamedTuple):
    """A curve over its axis: x ascending, y of the same length, some of it perhaps not finite."""

    x: Series
    y: Series


def axis_for(runs: Mapping[str, Mapping[str, Curve]], over: Over) -> str:
    """What the runs share: tokens where a step is not as many of them in each, else steps; or what was asked for."""
    if over != "auto":
        return over
    rates = set()
    for curves in runs.values():
        tag = find_tag(curves, "tokens")
        if tag is None or not curves[tag].steps or not curves[tag].steps[-1]:
            return "steps"
        rates.add(round(curves[tag].values[-1] / curves[tag].steps[-1], 3))
    return "tokens" if len(rates) > 1 else "steps"


def line(curves: Mapping[str, Curve], tag: str, over: str, name: str) -> Line:
    """The curve `tag` over `over`. UserError when the run does not say where on that axis its points lie."""
    curve = curves[tag]
    if over == "steps":
        return Line(np.array(curve.steps, float), np.array(curve.values, float))
    if over == "samples" and tag + VERSUS in curves:
        other = curves[tag + VERSUS]
        return Line(np.array(other.steps, float), np.array(other.values, float))
    axis = find_tag(curves, over)
    if axis is None:
        raise UserError(f"{name}: holds no {over} (found {', '.join(sorted(curves))}); use --over steps", 2)
    known = dict(zip(*curves[axis], strict=True))
    points = [(known[s], v) for s, v in zip(*curve, strict=True) if math.isfinite(known.get(s, math.nan))]
    x, y = np.array(points, float).reshape(-1, 2).T
    return Line(x, y)


def align(a: Line, b: Line, names: tuple[str, str], over: str) -> tuple[Series, Series, Series]:
    """x, and both curves there: the points of the sparser one in the range that both cover.

    Where both have a point, and nothing is made up, points that are the same batch stay a pair. Points that are not
    finite are left out. Raises UserError when there is no common range.
    """
    a, b = (Line(c.x[np.isfinite(c.y)], c.y[np.isfinite(c.y)]) for c in (a, b))
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
    return x, np.interp(x, a.x, a.y), np.interp(x, b.x, b.y)
