"""Checkpoints: written in the background, whole or not at all, verified, and resumed on any layout.

llama/checkpoint_format.py says what one is on disk. It is written as `step-00000100.writing` and renamed once all of it
is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from data_prep.errors import UserError
from llama.checkpoint_format import (
    ASIDE,
    FORMAT,
    SafeReader,
    TrainState,
    checksum,
    damage,
    read_manifest,
)
from llama.config import Recipe
from llama.freeze import frozen as frozen_names
from llama.parallel.apply import ParallelLlama
from llama.peers import lost_peer
from llama.run_folder import DAMAGED, MANIFEST, PREFIX, Lock, complete, step_of
from llama.targets import adapted
from llama.train.journal import Journal


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """One line on what went wrong; of torch's report over all ranks the first rank's own error."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _out_of_space(folder: Path, tensors: dict[str, Any]) -> str | None:
    """What to say when `folder` cannot hold this rank's part: torch's zip writer tells a full disk as a wrong position."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    needed, free = sum(t.nbytes for t in own), shutil.disk_usage(folder).free
    return f"No space left on device: {free:,} bytes are free, a rank writes {needed:,}" if free < needed else None


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """`value` of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Checkpoints:
    """Saves and restores a run's state in its folder.

    Collective: every rank must make the same calls. A process group of its own keeps background writing apart from
    training's collectives.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        model: ParallelLlama,
        optimizer: torch.optim.Optimizer,
        journal: Journal | None = None,
        lock: Lock | None = None,
    ):
        self.folder, self.recipe, self.model, self.optimizer = folder, recipe, model, optimizer
        self.journal, self.lock = journal, lock
        self.seconds = 0.0
        """What the slowest save so far took, from its call until it was on disk."""
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.stager = BlockingAsyncStager()

    def _tensors(self) -> dict[str, Any]:
        """Weights, and moments of those that are trained, by the key they are saved under; moments are made when there
        are none yet."""
        tensors: dict[str, Any] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
                tensors[f"optimizer.{name}.{key}"] = self._moments(parameter)[key]
        return tensors

    def _moments(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.optimizer.state[parameter]
        if not state:
            dtype = getattr(self.optimizer, "state_dtype", parameter.dtype)
            state["step"] = torch.zeros(
                (), dtype=torch.float32, device=parameter.device if _fused(self.optimizer) else "cpu"
            )
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        return state  # type: ignore[no-any-return]

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of this moment; returns once a copy is taken when saving in the background.

        Raises UserError (disk full, folder not writable) of this or of the background write before it, on every rank;
        what the collectives raised when another rank was lost meanwhile.
        """
        self.wait()
        self.started = time.monotonic()
        copy = self.stager.stage(self._tensors())
        assert isinstance(copy, dict)
        frozen = TrainState(**asdict(state))
        if self.recipe.checkpoint.save_async:
            self.thread = threading.Thread(target=self._write_guarded, args=(copy, frozen), name="checkpoint")
            self.thread.start()
        else:
            self._write_guarded(copy, frozen)
            self._raise_failure()

    def wait(self) -> None:
        """Until the write in the background is on disk; raises what went wrong with it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            if lost_peer(failure):
                raise failure
            raise UserError(
                f"checkpoint in {self.folder / 'checkpoints'} could not be written: {failure}; free some space or make the "
                "folder writable, then start the run again: it resumes from the checkpoint before"
            ) from failure

    def _write_guarded(self, tensors: dict[str, Any], state: TrainState) -> None:
        try:
            self._write(tensors, state)
            took = time.monotonic() - self.started
            self.seconds = max(self.seconds, took)
            if self.journal is not None:
                self.journal.event("save", step=state.step, samples=state.consumed_samples, seconds=round(took, 3))
        except BaseException as failure:
            self.failure = failure

    def _write(self, tensors: dict[str, Any], state: TrainState) -> None:
        final = self.folder / "checkpoints" / f"{PREFIX}{state.step:08d}"
        aside = final.with_name(final.name + ASIDE)
        trouble = None
        try:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        except OSError as error:
            trouble = str(error)
        if problems := [t for t in _gather(trouble, self.group) if t]:
            raise OSError(problems[0])
        writer = dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True, overwrite=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            own = [p for p in aside.iterdir() if p.name.startswith(f"__{self.rank}_")]
            own += [aside / ".metadata"] if self.rank == 0 else []
            sums: Any = {path.name: (path.stat().st_size, checksum(path)) for path in own}
        except BaseException as error:
            sums = _out_of_space(aside, tensors) or _cause(error)
        shares = _gather(sums, self.group)
        if problems := [share for share in shares if isinstance(share, str)]:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise OSError(problems[0])
        try:
            if self.rank == 0:
                self._finish(final, aside, {name: s for share in shares for name, s in share.items()}, state)
        except OSError as error:
            trouble = str(error)
        if problems := [t for t in _gather(trouble, self.group) if t]:
            raise OSError(problems[0])

    def _finish(self, final: Path, aside: Path, files: dict[str, Any], state: TrainState) -> None:
        """Manifest, rename, and removal of what need not be kept; on the first rank alone."""
        manifest = {
            "format": FORMAT,
            "state": asdict(state),
            "model": self.recipe.model.model_dump(mode="json"),
            "lora": _adapter_shape(self.recipe),
            "freeze": frozen_names(self.recipe.train.freeze, self.recipe.model),
            "precision": self.recipe.train.precision,
            "ranks": len({name.split("_")[2] for name in files if name.startswith("__")}),
            "files": files,
        }
        with (aside / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(aside)
        if self.lock is not None and not self.lock.held():
            raise OSError("another run has taken this run folder over while this one stood still")
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        aside.rename(final)
        _sync(final.parent)
        self._prune(state)

    def _prune(self, state: TrainState) -> None:
        keys, found = self.recipe.checkpoint, complete(self.folder)
        for old in found[: -keys.keep_last]:
            best = keys.keep_best and step_of(old) == state.best_step
            if not best and not (keys.keep_every and step_of(old) % keys.keep_every == 0):
                (old / MANIFEST).unlink()  # first of all: a folder half removed is then no checkpoint
                shutil.rmtree(old, ignore_errors=True)
        kept = step_of(complete(self.folder)[0])
        for damaged in (self.folder / "checkpoints").glob(f"{PREFIX}*{DAMAGED}"):
            if damaged.name[len(PREFIX) : -len(DAMAGED)] < f"{kept:08d}":  # nobody came to look
                shutil.rmtree(damaged, ignore_errors=True)
        for rest in (self.folder / "checkpoints").glob(f"{PREFIX}*{ASIDE}"):
            shutil.rmtree(rest, ignore_errors=True)

    def resume(self, say: Any = print) -> TrainState | None:
        """Load the newest checkpoint that is whole into model and optimizer; None when there is none.

        A damaged one is passed over with a warning. Raises UserError when checkpoints are there and all are damaged, or
        when the checkpoint is of another model.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        found = _gather(complete(self.folder), self.group)[0]  # the first rank's view decides for all
        for checkpoint in reversed(found):
            wrongs = _gather(damage(checkpoint, self.recipe.checkpoint.verify, self.rank, world), self.group)
            if wrong := next((w for w in wrongs if w), None):
                say(f"warning: checkpoint {checkpoint.name} is damaged and passed over: {wrong}")
                self._put_aside(checkpoint, wrong)
                continue
            return self._load(checkpoint)
        if found:
            raise UserError(
                f"{self.folder / 'checkpoints'}: all {len(found)} checkpoints are damaged; restore one, or start again in "
                "another run_dir"
            )
        return None

    def _put_aside(self, checkpoint: Path, wrong: str) -> None:
        """Rename a damaged checkpoint, so that it counts for nothing and is there for whoever wants to see it."""
        if self.rank == 0:
            if self.journal is not None:
                self.journal.event("damaged", checkpoint=checkpoint.name, why=wrong)
            with contextlib.suppress(OSError):
                aside = checkpoint.with_name(checkpoint.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)

    def _load(self, checkpoint: Path) -> TrainState:
        manifest = read_manifest(checkpoint)
        saved, wanted = manifest["model"], self.recipe.model.model_dump(mode="json")
        if saved != wanted:
            keys = ", ".join(
                f"{k}: {saved.get(k)} there, {wanted.get(k)} here" for k in wanted if saved.get(k) != wanted[k]
            )
            raise UserError(
                f"{checkpoint} is of another model (model.{keys}); use the run's own recipe or another run_dir", 2
            )
        there, here = manifest.get("lora"), _adapter_shape(self.recipe)
        if there != here:
            raise UserError(
                f"{checkpoint} has {_adapter_words(there)} and the recipe {_adapter_words(here)}; use the run's own recipe "
                "or another run_dir",
                2,
            )
        if manifest.get("freeze", []) != frozen_names(self.recipe.train.freeze, self.recipe.model):
            raise UserError(
                f"{checkpoint} was trained with other weights frozen than train.freeze={','.join(self.recipe.train.freeze)} "
                "means; use the run's own recipe, or export it and start another run_dir with train.init_from",
                2,
            )
        tensors = self._tensors()
        reader = SafeReader(checkpoint)
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except (Exception, dcp.CheckpointException) as error:
            if lost_peer(error):  # the checkpoint is well; the next attempt loads it
                raise
            raise UserError(
                f"{checkpoint} cannot be loaded: {_cause(error)}; delete the folder, an older checkpoint is used then"
            ) from error
        state = TrainState(**manifest["state"])
        copies = {p for _, p in self.model.named_parameters()}
        twins = [p for _, p in self.model.optimized_parameters() if p not in copies]
        if twins:  # both ends of a tied embedding on this rank: the second is a copy of the first
            first = next(p for name, p in self.model.named_parameters() if name == "embed.weight")
            for twin in twins:
                twin.data.copy_(first.data)
                for key in ("exp_avg", "exp_avg_sq"):
                    self._moments(twin)[key].copy_(self._moments(first)[key])
        for _, parameter in self.model.optimized_parameters():
            self._moments(parameter)["step"].fill_(state.updates)
        return state


def _adapter_shape(recipe: Recipe) -> dict[str, Any] | None:
    """What of the recipe decides which adapters a checkpoint holds; None where it holds the model."""
    lora = recipe.lora
    if not lora.rank:
        return None
    return {"rank": lora.rank, "dora": lora.dora, "targets": adapted(lora.targets, recipe.model.num_layers)}


def _adapter_words(shape: dict[str, Any] | None) -> str:
    if shape is None:
        return "no adapters"
    leaves = sorted({name.rpartition(".")[2] for name in shape["targets"]})
    return f"adapters of rank {shape['rank']} on {len(shape['targets'])} linears ({', '.join(leaves)})" + (
        " with dora" if shape["dora"] else ""
    )


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether AdamW keeps its step count on the device."""
    return bool(optimizer.defaults.get("fused"))
