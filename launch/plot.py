"""`herd plot`: loss, learning rate and gradient norm of runs as one picture, read from their TensorBoard events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError
from llama.compare.events import Curve, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS, VALIDATION, LR, NORM, TOKENS = "reduced_train_loss", "val_loss", "lr", "gradient_norm", "consumed_tokens"
# Okabe and Ito's colours, which people who do not see red and green apart can tell from one another.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def read_scalars(run: Path) -> dict[str, Curve]:
    """Every scalar of a run folder (or of a folder of event files) by its tag; a resumed run's parts are one curve.

    Raises UserError when there is no event file, or none that holds a training loss.
    """
    curves = read_run(run)
    if LOSS not in curves:
        found = ", ".join(curves) or "no scalar"
        raise UserError(f"{run}: holds no {LOSS} (found {found}); did the run reach its first log.interval?")
    return curves


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of the curve, without the pull of its start; NaNs are passed."""
    weight, total, mass, out = 1 - 2 / (max(5.0, len(values) / 30) + 1), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(total / mass if mass else math.nan)
    return out


def names_of(runs: Sequence[Path]) -> list[str]:
    """What tells the runs apart: the last folder of each, with as many parents as that takes."""
    parts = [run.resolve().parts for run in runs]
    names = ["/".join(p[-1:]) for p in parts]
    for length in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(p[-length:]) for p in parts]
    return names


def draw(runs: Mapping[str, Mapping[str, Curve]], to: Path, over: str = "steps") -> None:
    """Write the picture of `runs` (name to scalars by tag) to `to`; its ending says the format. Raises UserError."""
    from matplotlib.figure import Figure

    check_ending(to)
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    panels = figure.subplot_mosaic([["loss", "lr"], ["loss", "norm"]], width_ratios=[2, 1])
    for i, (name, curves) in enumerate(runs.items()):
        _draw_run(panels, name, curves, COLOURS[i % len(COLOURS)], over)
    for key, title in (("loss", "loss (nats a token)"), ("lr", "learning rate"), ("norm", "gradient norm")):
        axes = panels[key]
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.set_xlim(left=0)
    panels["lr"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panels["lr"].set_ylim(bottom=0)
    panels["lr"].tick_params(labelbottom=False)
    for key in ("loss", "norm"):
        panels[key].set_xlabel(over)
    readable_norm(panels["norm"])
    panels["loss"].legend(frameon=False, loc="upper right")
    save(figure, to)


def readable_norm(axes: Axes) -> None:
    """A logarithmic axis, as norms fall by tens and spike by hundreds, with plain numbers beside it."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    digits = "125" if high > 10 * low else "123456789"
    for pick in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        pick(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else ""))


def check_ending(to: Path) -> None:
    """UserError unless a picture can be written in the format that the file's ending names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if to.suffix.removeprefix(".").lower() not in known:
        raise UserError(f"--to {to}: pictures end in .png, .svg or .pdf (known: {', '.join(sorted(known))})", 2)


def save(figure: Figure, to: Path) -> None:
    """Write a picture whole or not at all; its ending says the format. Raises UserError."""
    check_ending(to)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    aside = to.with_name(to.name + ".tmp")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, format=to.suffix.removeprefix(".").lower())
        aside.replace(to)
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror or error}; choose another --to") from error
    finally:
        aside.unlink(missing_ok=True)


def _draw_run(panels: Mapping[str, Axes], name: str, curves: Mapping[str, Curve], colour: str, over: str) -> None:
    """One run's lines in each panel."""
    tokens = dict(zip(*curves[TOKENS], strict=True)) if over == "tokens" and TOKENS in curves else None
    if over == "tokens" and tokens is None:
        raise UserError(f"{name}: its events hold no {TOKENS}; leave --over tokens out", 2)

    def where(curve: Curve) -> list[float]:
        return [float(step) if tokens is None else tokens.get(step, math.nan) for step in curve.steps]

    loss, validation = curves[LOSS], curves.get(VALIDATION)
    smoothed = smooth(loss.values)
    panels["loss"].plot(where(loss), loss.values, color=colour, alpha=0.25, linewidth=1)
    panels["loss"].plot(where(loss), smoothed, color=colour, linewidth=1.8, label=f"{name}: {smoothed[-1]:.3f}")
    if validation is not None:
        label = f"{name}, validation: {validation.values[-1]:.3f}"
        panels["loss"].plot(
            where(validation), validation.values, "o--", color=colour, label=label, markersize=4.5, linewidth=1.2
        )
    if LR in curves:
        panels["lr"].plot(where(curves[LR]), curves[LR].values, color=colour, linewidth=1.5)
    if NORM in curves:
        norm = curves[NORM]
        panels["norm"].plot(where(norm), norm.values, color=colour, alpha=0.25, linewidth=1)
        panels["norm"].plot(where(norm), smooth(norm.values), color=colour, linewidth=1.5)


@click.command(short_help="Draw loss curves of runs.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--to", default="curves.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path),
    help="Picture to write: .png, .svg or .pdf.",
)  # fmt: skip
@click.option(
    "--over", type=click.Choice(["steps", "tokens"]), default="steps", show_default=True,
    help="What runs along: tokens for runs with different batches.",
)  # fmt: skip
def command(runs: tuple[Path, ...], to: Path, over: str) -> None:
    """Draw training loss (raw and smoothed), validation loss, learning rate and gradient norm of each RUN folder.

    \b
    herd plot runs/tiny_cpu
    herd plot runs/a runs/b --to curves.png --over tokens
    """
    names = names_of(runs)
    scalars = {name: read_scalars(run) for name, run in zip(names, runs, strict=True)}
    draw(scalars, to, over)
    for name, curves in scalars.items():
        loss, validation = curves[LOSS], curves.get(VALIDATION)
        held_out = f", validation {validation.values[-1]:.4f}" if validation else ""
        click.echo(
            f"{name}: {len(loss.steps):,} points, loss {loss.values[0]:.4f} at step {loss.steps[0]} -> "
            f"{loss.values[-1]:.4f} at step {loss.steps[-1]}{held_out}"
        )
    click.echo(f"{to}: {to.stat().st_size / 1e3:,.0f} kB")
