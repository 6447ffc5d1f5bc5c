"""The picture of `herd plan`: memory of each stage, seconds of a step by part, and a pipeline's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.plot import COLOURS, save
from llama.plan.estimate import Estimate
from llama.plan.nodes import GIB
from llama.plan.schedule import Timeline, play
from llama.plan.suggest import Suggestion, parts_of

GREY = "#BBBBBB"
MOST_MICRO_BATCHES = 24
"""Micro-batches of a pipeline that can still be told apart in a picture."""


def draw(own: Estimate | None, found: Suggestion | None, to: Path) -> None:
    """Write the picture to `to`. Raises UserError."""
    from matplotlib.figure import Figure

    shown = [] if own is None else [("the recipe", own)]
    shown += [] if found is None else [(f"{i}. {c.words}", c.found) for i, c in enumerate(found.best, 1)]
    piped = next((e for _, e in shown if e.layout.pipeline > 1), None)
    rows = max(2, len(shown))
    figure = Figure(figsize=(12, 1.6 + 0.7 * rows + (3 if piped else 0)), dpi=130, layout="constrained")
    mosaic: Any = [["memory", "time"]] + ([["schedule", "schedule"]] if piped else [])
    panels: dict[str, Any] = figure.subplot_mosaic(mosaic, height_ratios=[0.7 * rows + 1, 3][: len(mosaic)])
    _memory(panels["memory"], shown)
    _time(panels["time"], shown)
    if piped:
        _schedule(panels["schedule"], piped)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, to)


def _memory(axes: Any, shown: Sequence[tuple[str, Estimate]]) -> None:
    """A bar a layout, or a bar a stage where one layout has stages."""
    bars: list[tuple[str, Estimate, Any]] = []
    for name, e in shown:
        if len(shown) == 1 and len(e.counts) > 1:
            bars += [(f"stage {counts.stage}", e, counts.memory) for counts in e.counts]
        else:
            bars.append((name, e, e.worst.memory))
    parts = ("weights", "gradients", "optimizer", "gathered", "activations")
    at = range(len(bars))
    left = [0.0] * len(bars)
    rest = [(e.fragments + e.base) / GIB for _, e, _ in bars]
    for i, part in enumerate(parts):
        widths = [getattr(memory, part) / GIB for _, _, memory in bars]
        axes.barh(at, widths, left=left, color=COLOURS[i], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.barh(at, rest, left=left, color=GREY, label="allocator and runtime")
    limit = bars[0][1].place.node.memory / GIB
    axes.axvline(limit, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(at, [name for name, _, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(f"memory of a rank (GiB), limit {limit:.0f}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.08))


def _time(axes: Any, shown: Sequence[tuple[str, Estimate]]) -> None:
    at, left = range(len(shown)), [0.0] * len(shown)
    steps = [parts_of(e.step) for _, e in shown]
    names = [name for name in steps[0] if any(step[name] > 0.005 * sum(step.values()) for step in steps)]
    for i, name in enumerate(names):
        widths = [step[name] for step in steps]
        axes.barh(at, widths, left=left, color=[*COLOURS, GREY, "#777777"][i], label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(at, ["" for _ in shown])
    axes.invert_yaxis()
    axes.set_title("a step (seconds)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _schedule(axes: Any, e: Estimate) -> None:
    """Who works on what, when: the schedule's own order, a forward half as long as a backward."""
    line, micro_batches = timeline(e)
    colours = {"F": COLOURS[0], "B": COLOURS[4], "I": COLOURS[4], "W": COLOURS[2]}
    for span in line.spans:
        a = span.action
        axes.barh(
            span.rank, span.end - span.start, left=span.start, color=colours[a.work], edgecolor="white", linewidth=0.4,
            alpha=1.0 if a.stage < e.layout.pipeline else 0.6,
        )  # fmt: skip
        if len(line.spans) <= 400:
            middle = (span.start + span.end) / 2
            axes.text(middle, span.rank, str(a.micro_batch), ha="center", va="center", fontsize=5, color="white")
    axes.set_yticks(range(e.layout.pipeline))
    axes.invert_yaxis()
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("forwards of a rank")
    shown = f", the first {micro_batches} of {e.layout.accumulation} micro-batches" * (
        micro_batches < e.layout.accumulation
    )
    axes.set_title(f"{e.recipe.parallel.pipeline_schedule}{shown}: waiting {line.bubble:.0%}", loc="left", fontsize=10)


def timeline(e: Estimate) -> tuple[Timeline, int]:
    """A step of the pipeline in units of a rank's forward, and how many micro-batches of it are played."""
    parallel = e.recipe.parallel
    ranks = parallel.pipeline_parallel
    micro_batches = min(e.layout.accumulation, max(ranks, MOST_MICRO_BATCHES // ranks * ranks))
    share = 1.0 / parallel.rank_stages
    again = 1.0 if e.recipe.train.activation_checkpointing == "full" else 0.0
    return (
        play(parallel, micro_batches, [share] * parallel.stages, [(2 + again) * share] * parallel.stages),
        micro_batches,
    )
