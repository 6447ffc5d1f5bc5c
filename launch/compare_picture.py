"""The picture of `herd compare`: curves, gap with tolerance and band, gradient norms and their ratio."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import UserError
from launch.plot import COLOURS, readable_norm, save
from llama.compare.statistics import Series, smooth

if TYPE_CHECKING:
    from llama.compare import Comparison

GREY = "#555555"


def draw(found: Sequence[Comparison], to: Path) -> None:
    """Write the picture of all comparisons to `to`. Raises UserError."""
    from matplotlib.figure import Figure

    found = [c for c in found if c.points]
    if not found:
        raise UserError(f"--to {to}: no run has enough points that are numbers to draw; leave it out", 1)
    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    panels: dict[str, Any] = figure.subplot_mosaic(
        [["loss", "norm"], ["gap", "ratio"]], width_ratios=[3, 2], sharex=True
    )
    first = found[0]
    _curve(panels["loss"], first.x, first.reference_loss, GREY, " + ".join(first.references))
    if first.spread is not None:
        middle = smooth(first.reference_loss, _window(first.x))
        half = smooth(first.spread, _window(first.x))
        panels["loss"].fill_between(first.x, middle - half, middle + half, color=GREY, alpha=0.2, label="seeds")
    if first.norms is not None:
        _curve(panels["norm"], first.norms[0], first.norms[1], GREY, None)
    for i, c in enumerate(found):
        colour = COLOURS[i % len(COLOURS)]
        _curve(panels["loss"], c.x, c.candidate_loss, colour, f"{c.candidate}: {c.verdict}")
        gap = 100 * (c.candidate_loss - c.reference_loss) / c.reference_loss
        _curve(panels["gap"], c.x, gap, colour, None)
        _last_quarter(panels["gap"], c, colour)
        if c.norms is not None:
            at, reference, candidate = c.norms
            _curve(panels["norm"], at, candidate, colour, None)
            _curve(panels["ratio"], at, 100 * np.log(candidate / reference), colour, None)
    for key, rule in (("gap", "final gap"), ("ratio", "gradient norm")):
        finding = next((f for f in first.findings if f.rule == rule), None)
        panels[key].axhline(0, color="black", linewidth=0.8)
        if finding is not None and finding.tolerance is not None:
            limit = 100 * finding.tolerance
            panels[key].axhspan(
                -limit,
                limit,
                color="#009E73",
                alpha=0.12,
                label=f"± {limit:.3g} %: {'band of seeds' if _banded(first, rule, limit) else 'tolerance'}",
            )
            panels[key].legend(frameon=False, loc="upper left", fontsize=9)
            _view(panels[key], 1.5 * limit)
    titles = {
        "loss": "loss (nats a token)", "gap": "gap of the loss (% of the reference)", "norm": "gradient norm",
        "ratio": "gradient norm, ratio (% above the reference)",
    }  # fmt: skip
    for key, title in titles.items():
        panels[key].set_title(title, loc="left", fontsize=10)
        panels[key].grid(alpha=0.25, linewidth=0.6)
        panels[key].spines[["top", "right"]].set_visible(False)
        panels[key].margins(x=0.01)
    if first.norms is not None:
        readable_norm(panels["norm"])
    for key in ("gap", "ratio"):
        panels[key].set_xlabel(first.over)
    panels["loss"].legend(frameon=False, loc="upper right")
    said = [textwrap.fill(f"{c.verdict.upper()}: {c.sentence}", 170) for c in found[:3]]
    figure.suptitle("\n".join(said), x=0.01, ha="left", fontsize=9)
    save(figure, to)


def _last_quarter(axes: Any, c: Comparison, colour: str) -> None:
    """The final gap with its interval, over the points that it is the mean of."""
    finding = next((f for f in c.findings if f.rule == "final gap"), None)
    if finding is None or finding.value is None or finding.low is None or finding.high is None:
        return
    x = c.x[len(c.x) * 3 // 4 :]
    axes.hlines(100 * finding.value, x[0], x[-1], color=colour, linestyle="--", linewidth=1.2)
    axes.fill_between(x[[0, -1]], 100 * finding.low, 100 * finding.high, color=colour, alpha=0.25, linewidth=0)


def _banded(c: Comparison, rule: str, limit: float) -> bool:
    """Whether the limit of a rule is that of the seeds."""
    band = None if c.pair else c.band.get(rule)
    return band is not None and 100 * band.half >= limit


def _window(x: Series) -> int:
    """Points that are smoothed over: a thirtieth of the curve."""
    return max(3, len(x) // 30)


def _curve(axes: Any, x: Series, y: Series, colour: str, label: str | None) -> None:
    axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(x, smooth(y, _window(x)), color=colour, linewidth=1.7, label=label)


def _view(axes: Any, low: float) -> None:
    """Show what is smoothed in full, and at least ± `low`; single points as far as they go along with it."""
    smoothed = [line.get_ydata() for line in axes.get_lines() if line.get_linewidth() == 1.7]
    if not smoothed:
        return
    high = max(float(np.abs(y).max()) for y in smoothed)
    axes.set_ylim(-max(1.6 * high, low), max(1.6 * high, low))
