"""What the points of a sweep came to: one row each, the best first, as Markdown and JSON."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from llama.run_folder import RunFolder, read_json

if TYPE_CHECKING:
    from llama.config import Recipe

DONE = "finished"


@dataclass(frozen=True)
class Row:
    """One point of a sweep."""

    name: str
    run: str
    state: str
    """finished; else how far it came, or why it ended."""
    chosen: dict[str, str]
    rank: int
    """Of adapters; 0: all weights are trained."""
    targets: str
    bits: float
    """Of each weight of the frozen linears, or of all weights where there are no adapters."""
    trainable: int
    """Parameters."""
    total: int
    """Parameters, adapters included."""
    step: int = 0
    seconds: float = 0.0
    """Of all attempts, loading included."""
    memory: float | None = None
    """Most bytes that the first rank held."""
    train_loss: float | None = None
    """Mean over the last tenth of the steps."""
    val_loss: float | None = None
    """Of the last validation."""
    val_step: int | None = None
    best_loss: float | None = None
    """Of the best validation."""
    best_step: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """Other figures of the last validation, such as accuracy and the baseline's; loss/NAME is a source's."""

    @property
    def accuracy(self) -> float | None:
        return self.scores.get("accuracy")


def row(name: str, chosen: dict[str, str], recipe: Recipe) -> Row:
    """What the run folder of `recipe` says."""
    run = RunFolder(Path(recipe.folder))
    trainable, total = parameters(recipe)
    lora = recipe.lora
    known: dict[str, Any] = dict(
        name=name, run=str(run.path), chosen=chosen, rank=lora.rank, targets="+".join(lora.targets) if lora.rank else "all",
        bits=bits(recipe), trainable=trainable, total=total,
    )  # fmt: skip
    events = list(run.history())
    status = read_json(run.status)
    validations = [event for event in events if event["event"] == "validation"]
    losses = [(event["step"], event["loss"]) for event in validations]
    finite = [(loss, step) for step, loss in losses if isinstance(loss, float) and math.isfinite(loss)]
    known |= dict(state=state_of(run, recipe), step=status.get("step", 0), seconds=seconds(events))
    if losses:
        known |= dict(val_step=losses[-1][0], val_loss=losses[-1][1], scores=scores_of(validations[-1]))
    if finite:
        known |= dict(best_loss=min(finite)[0], best_step=min(finite)[1])
    return Row(**known, **_curves(run))


def state_of(run: RunFolder, recipe: Recipe) -> str:
    """finished, not begun, or how far a run came and why it ended."""
    from llama import recipe as recipes

    events = list(run.history())
    end: dict[str, Any] = next((event for event in reversed(events) if event["event"] in ("end", "start")), {})
    step = read_json(run.status).get("step", 0)
    # One that ended early is done too, unless more steps are wanted now.
    if end.get("outcome") == "finished":
        then = recipes.load(str(run.recipe)).train
        same = then.steps == recipe.train.steps if recipe.train.epochs is None else then.epochs == recipe.train.epochs
        if same or (recipe.train.epochs is None and step >= recipe.train.steps):
            return DONE
    if not events:
        return "not begun"
    attempts = run.attempts()
    words = run.last_words(attempts[-1]) if attempts else []
    if end.get("outcome") in (None, "failed") and words:
        return f"failed at step {step}: {words[0].text}"
    steps = read_json(run.status).get("steps") if recipe.train.epochs is not None else recipe.train.steps
    return f"step {step} of {steps}" if steps else f"step {step}"


def scores_of(validation: dict[str, Any]) -> dict[str, float]:
    """Figures of a validation besides its loss, and those of each source."""
    found = {key: validation.get(key) for key in ("accuracy", "baseline")}
    for source, figures in (validation.get("sources") or {}).items():
        found |= {f"{key}/{source}": value for key, value in figures.items()}
    return {key: value for key, value in found.items() if isinstance(value, float)}


def seconds(events: Sequence[dict[str, Any]]) -> float:
    """From start to the last sign of each attempt."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        moment = datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "start":
            total += last - began if began is not None else 0.0
            began = moment
        last = moment
    return total + (last - began if began is not None else 0.0)


def _curves(run: RunFolder) -> dict[str, Any]:
    """What only TensorBoard's points hold; empty where there are none."""
    from launch.plot import LOSS, read_scalars

    try:
        curves = read_scalars(run.path)
    except UserError:
        return {}
    last = curves[LOSS].values[-max(1, len(curves[LOSS].values) // 10) :]
    memory = curves["memory_peak"].values if "memory_peak" in curves else []
    return dict(train_loss=sum(last) / len(last), memory=max(memory, default=None))


def parameters(recipe: Recipe) -> tuple[int, int]:
    """How many are trained, and all."""
    import torch

    from llama.freeze import counts
    from llama.model.llama import count_parameters
    from llama.parallel.adapters import adapter_shapes

    if recipe.train.freeze:
        return counts(recipe.train.freeze, recipe.model)
    base = count_parameters(recipe.model)[0]
    adapters = sum(torch.Size(shape).numel() for shape in adapter_shapes(recipe).values())
    return (adapters, base + adapters) if recipe.lora.rank else (base, base)


def bits(recipe: Recipe) -> float:
    """Bits in which a weight of the blocks' linears is held."""
    from llama.parallel.adapters import packed_size

    if recipe.lora.quantize:
        weights, size = packed_size(recipe)
        return round(8 * size / weights, 2)
    return 32.0 if recipe.train.precision == "fp32" or not recipe.lora.rank else 16.0


def order(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The best first, and what by: accuracy where all have one, else validation loss, else training loss.

    Points that are alike in that go by the next; those that are not finished come last.
    """
    done = [row for row in rows if row.state == DONE]
    measures = ("accuracy", "val_loss", "train_loss")
    known = [m for m in measures if done and all(getattr(row, m) is not None for row in done)] or ["train_loss"]

    def badness(row: Row) -> tuple[float, ...]:
        found = [(math.inf if (value := getattr(row, m)) is None else value, m) for m in known]
        signed = [-value if m == "accuracy" else value for value, m in found]
        return (float(row.state != DONE), *(value if math.isfinite(value) else math.inf for value in signed))

    words = {"accuracy": "accuracy", "val_loss": "validation loss", "train_loss": "training loss"}
    return sorted(rows, key=badness), words[known[0]]


def take(row: Row, recipe: Recipe) -> list[str]:
    """The commands that make a model of a point."""
    words = ["--step", "best"] if recipe.checkpoint.keep_best else []
    to = str(Path(row.run).parent / "best")
    if not row.rank:
        return [shlex.join(["herd", "export", row.run, *words, "--to", to])]
    adapter = [shlex.join(["herd", "export", row.run, *words, "--to", f"{to}-adapter"])]
    source = f"{to}-adapter" if words else row.run
    return [*adapter[: len(words)], shlex.join(["herd", "merge", str(recipe.train.init_from), source, "--to", to])]


def markdown(rows: Sequence[Row]) -> str:
    """The table of the QLoRA study; columns in which nothing is known are left out."""
    keys = [key for key in (rows[0].chosen if rows else {}) if key not in ("lora.rank", "lora.targets")]
    keys = [key for key in keys if key != "lora.quantize"]
    columns: list[tuple[str, list[str]]] = [("point", [row.name for row in rows])]
    columns += [(key, [row.chosen[key] for row in rows]) for key in keys]
    columns += [
        ("r", [str(row.rank or "–") for row in rows]),
        ("targets", [row.targets for row in rows]),
        ("bits", [f"{row.bits:g}" for row in rows]),
    ]
    if any(row.accuracy is not None for row in rows):
        columns.append(("accuracy", [_number(row.accuracy, ".1%") for row in rows]))
    if any("baseline" in row.scores for row in rows):
        columns.append(("same answer", [_number(row.scores.get("baseline"), ".1%") for row in rows]))
    if any(row.val_loss is not None for row in rows):
        columns += [
            ("val. loss", [_number(row.val_loss, ".4f") for row in rows]),
            ("perplexity", [_number(_perplexity(row.val_loss), ".3f") for row in rows]),
            ("best (step)", [f"{_number(r.best_loss, '.4f')} ({r.best_step})" if r.best_step is not None else "–" for r in rows]),
        ]  # fmt: skip
    columns += [
        ("train. loss", [_number(row.train_loss, ".4f") for row in rows]),
        ("trainable", [f"{row.trainable:,}" for row in rows]),
        ("% of all", [f"{100 * row.trainable / row.total:.3f}" for row in rows]),
        ("time", [_clock(row.seconds) for row in rows]),
        ("peak memory", ["–" if row.memory is None else f"{row.memory / 1e9:.2f} GB" for row in rows]),
    ]
    if any(row.state != DONE for row in rows):
        columns.append(("state", [row.state.replace("|", "/") for row in rows]))
    right = {"point", "targets", "state", *keys}
    widths = [max(3, len(title), *map(len, cells)) for title, cells in columns]  # a rule takes three dashes

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if title in right else cell.rjust(width)
            for cell, width, (title, _) in zip(cells, widths, columns, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if t in right else "-" * (w - 1) + ":") for w, (t, _) in zip(widths, columns, strict=True)]
    return "\n".join(
        [line([t for t, _ in columns]), line(rule), *(line(c) for c in zip(*(c for _, c in columns), strict=True))]
    )


def write(folder: Path, title: str, rows: Sequence[Row], by: str, commands: Sequence[str]) -> str:
    """table.md and table.json in the sweep's folder, each whole or not at all; the Markdown."""
    best = rows[0] if rows and rows[0].state == DONE else None
    text = f"# {title}\n\n{markdown(rows)}\n\nBest first, by {by}.\n"
    if best is not None:
        text += f"\n{best.name} is the best of {len(rows)}:\n\n```bash\n" + "\n".join(commands) + "\n```\n"
    facts = {
        "by": by,
        "best": best.name if best else None,
        "commands": list(commands) if best else [],
        "rows": [_finite(asdict(row)) for row in rows],
    }
    for name, content in (("table.md", text), ("table.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")):
        aside = folder / f".{name}.tmp"
        with aside.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / name)
    return text


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _clock(value: float) -> str:
    whole = round(value)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
