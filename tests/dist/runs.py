"""Whole training runs for tests: a small token file, and train() on this rank with everything it did recorded."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.indexed import IndexedWriter
from llama.checkpoint_format import TrainState
from llama.config import Recipe
from llama.data.batches import Batch
from llama.parallel.shards import Box, local_part
from llama.train import loop
from llama.train.metrics import StepReport
from tests.dist.layouts import VOCAB, recipe


def write_tokens(folder: Path, documents: int = 60, seed: int = 0) -> str:
    """A token file of documents whose next token can be guessed, so that a loss can fall; its prefix."""
    random, prefix = np.random.RandomState(seed), str(folder / f"tokens{seed}")
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in random.randint(30, 200, documents):
            start, stride = random.randint(0, VOCAB - 1), random.randint(1, 4)
            writer.add_document([*((start + stride * i) % (VOCAB - 1) for i in range(length)), VOCAB - 1])
    return prefix


def run_recipe(folder: Path, prefix: str, **changes: Any) -> Recipe:
    """The tests' tiny recipe over a token file: six steps, a checkpoint every three, nothing else written."""
    keys: dict[str, Any] = dict(
        data__train=prefix, data__split="90,10,0", train__steps=6, checkpoint__interval=3, checkpoint__keep_last=9,
        log__tensorboard=False, optimizer__eps=1e-6,
    )  # fmt: skip
    return recipe(**(keys | changes)).model_copy(update={"run_dir": str(folder)})


@dataclass
class Record:
    """What one rank saw of a run."""

    state: TrainState | None = None
    reports: list[StepReport] = field(default_factory=list)
    samples: dict[int, int] = field(default_factory=dict)
    """Absolute sample number to a checksum of the tokens and labels that came under it."""
    weights: dict[str, tuple[Box, torch.Tensor]] = field(default_factory=dict)
    """What this rank holds at the end, with its place in the whole."""
    error: str | None = None
    """The UserError that ended the run."""
    outcome: loop.Outcome | None = None

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]


class Spy(loop.Trainer):
    """The trainer, recording. `act(trainer, next step)` is called before each step."""

    record: Record
    act: Any = None

    def step(self, batches: Generator[list[Batch], None, None]) -> StepReport:
        if self.act is not None:
            type(self).act(self, self.state.step + 1)
        report = super().step(self._noted(batches))
        self.record.reports.append(report)
        return report

    def _noted(self, batches: Generator[list[Batch], None, None]) -> Any:
        micro_batches = next(batches)
        mesh, size = self.model.mesh, self.recipe.train.micro_batch_size
        for m, batch in enumerate(micro_batches):
            first = batch.cursor + (m * mesh.layout.data + mesh.data_rank) * size
            for i in range(size):
                row = torch.stack((batch.tokens[i], batch.labels[i])).numpy()
                self.record.samples[first + i] = zlib.crc32(row.tobytes())
        yield micro_batches


def spied_train(rank: int, config: Recipe, act: Any = None, device: str = "cpu") -> Record:
    """train(config) on this rank; a UserError is recorded, not raised. To be called in a process of its own."""
    os.environ["HERD_DEVICE"] = device
    record, trainers = Record(), []

    class Recorder(Spy):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.record = record
            trainers.append(self)

    Recorder.act = act
    before, loop.Trainer = loop.Trainer, Recorder  # type: ignore[misc]
    try:
        record.outcome = loop.train(config)
    except UserError as error:
        record.error = str(error)
    finally:
        loop.Trainer = before  # type: ignore[misc]
    for trainer in trainers:
        record.state = trainer.state
        for name, parameter in trainer.model.optimized_parameters():
            local, box = local_part(parameter)
            record.weights[name] = box, local.detach().clone().cpu()
    return record


def stop_at_three(trainer: loop.Trainer, step: int) -> None:
    """SIGTERM to the last rank alone, in its third step."""
    if step == 3 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def spied_train_stopped(rank: int, config: Recipe) -> Record:
    """spied_train, asked to stop in step 3 on the last rank alone."""
    return spied_train(rank, config, stop_at_three)


def samples_of(records: list[Record]) -> dict[int, int]:
    """The samples of all ranks; ranks that read the same ones must have read the same."""
    whole: dict[int, int] = {}
    for record in records:
        for number, value in record.samples.items():
            assert whole.setdefault(number, value) == value
    return whole


def whole_weights(records: list[Record]) -> dict[str, torch.Tensor]:
    """Each weight put together from the ranks' parts; a tied output goes by its own name where a rank holds it."""
    parts: dict[str, list[tuple[Box, torch.Tensor]]] = {}
    for record in records:
        for name, part in record.weights.items():
            parts.setdefault(name, []).append(part)
    out = {}
    for name, pieces in parts.items():
        shape = [max(box[d].stop for box, _ in pieces) for d in range(len(pieces[0][0]))]
        out[name] = torch.full(shape, torch.nan, dtype=pieces[0][1].dtype)
        for box, value in pieces:
            out[name][box] = value
        assert not out[name].isnan().any(), f"parts of {name} are on no rank"
    return out
