"""Scalars of a training run, from TensorBoard event files: ours, NeMo's, Megatron-LM's, the Hugging Face trainer's.

Also from JSON ({tag: {"steps": [...], "values": [...]}}) and CSV (a column `step`, the other columns are tags).
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError

EVENTS = "events.out.tfevents.*"

NAMES = {
    # What is compared -> the tags it goes by, ours first. Sources: llama/train/metrics.py; NeMo 1 and 2 and
    # neuronx-nemo-megatron (megatron_gpt_model.py); Megatron-LM (megatron/training/training.py, training_log); the
    # Hugging Face trainer (integration_utils.py, rewrite_logs); neuronx-distributed's examples; torchtitan (metrics.py).
    "loss": (
        "reduced_train_loss", "lm loss", "train/loss", "loss_metrics/global_avg_loss", "train_loss", "step loss", "loss",
    ),
    "gradient norm": (
        "gradient_norm", "grad_norm", "grad-norm", "train/grad_norm", "global_norm",
    ),
    "parameter norm": ("parameter_norm", "params-norm", "param_norm"),
    "samples": ("consumed_samples",),
    "tokens": ("consumed_tokens", "train/num_input_tokens_seen", "n_tokens_seen"),
}  # fmt: skip


class Curve(NamedTuple):
    """One scalar of a run."""

    steps: list[int]
    values: list[float]


def read_run(run: Path) -> dict[str, Curve]:
    """Every scalar of a run by its tag; `run` is a run folder, a folder of event files, or one file.

    Parts of a resumed run are one curve, in one folder or in several that each begin later: of two points at one step
    the later part's counts. Raises UserError.
    """
    if run.suffix in (".json", ".csv") and run.is_file():
        return _read_text(run)
    folders = [run] if run.is_file() else _folders_of_events(run)
    read = {folder: _read_events(folder) for folder in folders}
    folders = [folder for folder in folders if read[folder]]  # some hold hyperparameters alone
    parts = [read[folder] for folder in folders]
    starts = [min((curve.steps[0] for curve in part.values() if curve.steps), default=0) for part in parts]
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        found = ", ".join(str(folder.relative_to(run)) for folder in folders[:5])
        raise UserError(f"{run}: has TensorBoard events of {len(folders)} runs ({found}); name one of these folders", 2)
    points: dict[str, dict[int, float]] = {}
    for part in parts:
        for tag, curve in part.items():
            points.setdefault(tag, {}).update(zip(*curve, strict=True))
    return {tag: Curve(sorted(values), [values[step] for step in sorted(values)]) for tag, values in points.items()}


def _read_events(place: Path) -> dict[str, Curve]:
    """The curves of one folder of event files, or of one file."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(place), size_guidance={SCALARS: 0})  # 0: every point, no sample of them
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = sorted({event.step: event.value for event in events.Scalars(tag)}.items())  # the last word on a step
        curves[tag] = Curve([step for step, _ in points], [value for _, value in points])
    return curves


def _folders_of_events(run: Path) -> list[Path]:
    """The folders in `run` that hold event files: its tensorboard/ or itself, else those below in the order of time.

    The Hugging Face trainer and Lightning begin another folder each time that a run is started.
    """
    for folder in (run / "tensorboard", run):
        if folder.is_dir() and any(folder.glob(EVENTS)):
            return [folder]
    files = sorted(run.rglob(EVENTS), key=lambda path: path.name) if run.is_dir() else []  # names begin with the time
    if files:
        return list(dict.fromkeys(path.parent for path in files))
    raise UserError(
        f"{run}: has no TensorBoard events, neither there nor in tensorboard/; give a run folder such as "
        "runs/tiny_cpu of a run with log.tensorboard=true",
        2,
    )


def _read_text(path: Path) -> dict[str, Curve]:
    """Curves of a JSON or CSV file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return {
                tag: Curve([int(step) for step in curve["steps"]], [float(value) for value in curve["values"]])
                for tag, curve in json.loads(text).items()
                if isinstance(curve, dict)
            }
        rows = list(csv.DictReader(text.splitlines()))
        tags = [tag for tag in rows[0] if tag != "step"]
        kept = {tag: [row for row in rows if row[tag]] for tag in tags}
        return {tag: Curve([int(r["step"]) for r in few], [float(r[tag]) for r in few]) for tag, few in kept.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is no file of curves ({type(error).__name__}: {error}); JSON is "
            '{"loss": {"steps": [1, 2], "values": [4.1, 4.0]}}, CSV has a column step',
            2,
        ) from None


def find_tag(curves: Mapping[str, Curve], what: str, given: Sequence[str] = ()) -> str | None:
    """The tag under which a run has `what` (a key of NAMES), the first of those that the user gave; None without one."""
    return next((tag for tag in given or NAMES[what] if tag in curves), None)


def need_tag(curves: Mapping[str, Curve], what: str, where: object, given: Sequence[str] = ()) -> str:
    """The same; UserError that lists the tags which exist."""
    tag = find_tag(curves, what, given)
    if tag is None:
        found = ", ".join(sorted(curves)) or "no scalar at all"
        looked = " or ".join(given or NAMES[what])
        raise UserError(f"{where}: holds no {looked} (found {found}); name the tag of its {what} with --tag", 2)
    return tag
