"""What one rank does and holds in a step, counted by running the step itself without the hardware and without memory.

The recipe's network is laid over a fake process group of the wanted size; its tensors have shapes and types, no storage
(torch's FakeTensorMode). On them runs what trains: llama/train/loop's Trainer.step with the real layouts, schedules and
optimizer, once to warm up and then watched operator by operator (llama/plan/dry_tally.py, dry_memory.py).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import _disable_current_modes

from data_prep.errors import UserError
from llama import recipe as recipes
from llama.capabilities import TABLE
from llama.capabilities import kind as capabilities_of
from llama.checkpoint_format import TrainState
from llama.config import Recipe
from llama.data.batches import Batch
from llama.device import Device, find_device
from llama.parallel import shards
from llama.parallel.apply import parallelize
from llama.parallel.fsdp import modules
from llama.parallel.mesh import Mesh, build_mesh
from llama.parallel.pipeline import Pipeline
from llama.plan.analytic import foresee
from llama.plan.counts import Counts, Memory
from llama.plan.dry_memory import Live
from llama.plan.dry_tally import Counting, Groups, Tally, Weightless
from llama.train.loop import Trainer
from llama.train.optim import build_optimizer

BATCH_BYTES = 8 + 8 + 4 + 4
"""Of one token of a Batch."""
ENOUGH = 4
"""Micro-batches of a step without a pipeline that are run; of more the third is known to be like those that follow."""


@dataclass(frozen=True)
class _StandIn(Device):
    """A device that is not here: code that asks for its type hears it, tensors say they are the CPU's."""

    def torch(self) -> torch.device:
        return torch.device("cpu")


def stand_in(kind: str) -> Device:
    """A device of `kind` (cpu, cuda, neuron) for a count."""
    cpu = find_device("cpu")
    able = TABLE[capabilities_of(kind)]
    return _StandIn(**vars(cpu) | {"type": kind, "fused_adamw": able.fused_adamw, "float64": able.float64})


class _Watched(Trainer):
    """The trainer, telling the step's one reduction over all ranks from others over the same ranks."""

    groups: Groups

    def total(self, *args: Any) -> list[float]:
        with self.groups.all_ranks():
            return super().total(*args)


class Rehearsal:
    """A recipe's training, ready to take steps that are watched. With `fake` on tensors without memory; without it for
    real, in processes that are really joined, which is how tests know that the two agree."""

    def __init__(self, recipe: Recipe, mesh: Mesh, device: Device, fake: Weightless | None):
        self.recipe, self.mesh, self.device, self.fake = recipe, mesh, device, fake
        self.live = Live()
        groups = Groups(mesh)
        self.counting = Counting(groups, self.live, fake)
        self.model = parallelize(recipe, mesh, device, unfilled=fake)
        self.named = self.model.optimized_parameters()
        with fake or nullcontext():
            optimizer = build_optimizer(self.model, recipe, device)
            for _, parameter in self.named:  # from the second step on the moments are there
                parameter.grad = torch.zeros_like(parameter)
            with _boxes_apart(), self.counting:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for part in self.model.parts:  # so FSDP pads what it cuts unevenly, as in a first step
                for module in modules(part):
                    module.unshard()
                    module.reshard()
        for _, parameter in self.named:
            parameter.register_post_accumulate_grad_hook(lambda p: self._is_gradient(p.grad))
        nobody: Any = SimpleNamespace(seconds=0.0, wanted=lambda needed: False)
        self.trainer = _Watched(recipe, device, self.model, optimizer, nobody, nobody, TrainState(), nobody, nobody)
        self.trainer.groups = groups
        self.cuts: list[Tally] = []
        """What was counted when each micro-batch's forward began, of the last step without a pipeline."""
        if self.model.pipeline is None:
            self.model.parts[0].register_forward_pre_hook(lambda *_: self.cuts.append(self.counting.tally.copy()))

    def _is_gradient(self, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            self.live.use(gradient, "gradients")

    def _batch(self) -> Batch:
        """A micro-batch of which every token is trained and every sequence is one document."""
        shape = (self.recipe.train.micro_batch_size, self.recipe.data.seq_length)
        ids, numbers = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int32)
        positions = torch.arange(shape[1], dtype=torch.int32).repeat(shape[0], 1)
        return Batch(ids, ids.clone(), positions, numbers, 0)

    def step(self, micro_batches: int) -> tuple[Tally, Memory]:
        """One optimizer step of so many micro-batches, whatever the recipe says."""
        if self.model.pipeline is not None:
            layout = self.mesh.layout.model_copy(update={"accumulation": micro_batches})
            compute = torch.float32 if self.recipe.train.precision == "fp32" else torch.bfloat16
            self.model.pipeline = Pipeline(
                self.model.parts, self.recipe, replace(self.mesh, layout=layout), self.device.torch(), compute
            )
        batches = [self._batch() for _ in range(micro_batches)]
        self._begin(batches)
        with ExitStack() as stack:
            stack.enter_context(_boxes_apart())
            stack.enter_context(_uncollected())
            stack.enter_context(_sent_held())
            stack.enter_context(self.live.resizing())
            if self.fake is not None:
                stack.enter_context(self.fake)
            stack.enter_context(self.counting)
            self.trainer.step(iter([batches]))  # type: ignore[arg-type]
        return self.counting.tally, self.live.memory()

    def _begin(self, batches: list[Batch]) -> None:
        """Say what lives from the beginning, and count from nothing."""
        for part in self.model.parts:
            for tensor in (*part.parameters(), *part.buffers()):
                self.live.use(tensor, "weights")
        for state in self.trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.live.use(value, "optimizer")
        for batch in batches:
            for tensor in (batch.tokens, batch.labels, batch.positions, batch.documents):
                self.live.note(tensor)
        self.live.restart()
        self.counting.tally, self.cuts[:] = Tally(), ()


@contextmanager
def _uncollected() -> Iterator[None]:
    """As in a run: what refers to itself stays until the collector is called (llama/train/loop.py)."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Sent:
    """A message under way. What is sent lives as long as this, as with a real process group; a fake one keeps nothing."""

    def __init__(self, work: Any, tensor: torch.Tensor):
        self.work, self.tensor = work, tensor

    def wait(self) -> None:
        self.work.wait()


@contextmanager
def _sent_held() -> Iterator[None]:
    """Messages of a pipeline live until torch's schedule lets go of them, which some do at the end of a step only."""
    send = dist.isend

    def held(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> _Sent:
        return _Sent(send(tensor, *args, **kwargs), tensor)

    dist.isend = distributed_c10d.isend = held  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.isend = distributed_c10d.isend = send


@contextmanager
def _boxes_apart() -> Iterator[None]:
    """Work out which part of a weight this rank holds with plain numbers, once for each kind of weight: torch does it
    with small tensors on the host, thousands of operators that no device sees."""
    compute, known = shards.compute_local_shape_and_global_offset, {}

    def remembered(shape: Any, mesh: Any, placements: Any) -> Any:
        key = tuple(shape), id(mesh), tuple(placements)
        if key not in known:
            with _disable_current_modes():
                known[key] = compute(shape, mesh, placements)
        return known[key]

    shards.compute_local_shape_and_global_offset = remembered  # type: ignore[assignment]
    try:
        yield
    finally:
        shards.compute_local_shape_and_global_offset = compute


@contextmanager
def pretended(world: int, rank: int) -> Iterator[None]:
    """This process as `rank` of a fake process group: collectives return at once and send nothing."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a count needs a process that has joined no other"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # what DTensor remembers names groups that are gone


def count(recipe: Recipe, world: int, rank: int = 0, device: str = "cpu") -> Counts:
    """What `rank` of `world` does and holds in one step of `recipe`, in steady state.

    `device`: the kind that is planned for (cpu, cuda, neuron); operators are those of a CPU. torch.distributed must not
    be initialised here. Many micro-batches are not all run: see `_whole_step`. Raises UserError for a layout that does not
    fit.
    """
    layout = recipes.lay_out(recipe, world)
    plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    with pretended(world, rank):
        mesh = build_mesh(layout, "cpu")
        # Real are the labels and document numbers alone: shapes may depend on them.
        rehearsal = Rehearsal(plain, mesh, stand_in(device), Weightless())
        tally, memory = _whole_step(rehearsal, layout.accumulation)
        if recipe.train.compile:  # nothing is compiled here: what compiled blocks do not keep is known by formulas
            spared = foresee(plain, world, rank).memory.peak - foresee(recipe, world, rank).memory.peak
            memory = replace(memory, activations=memory.activations - spared)
        return tally.counts(memory, rank, mesh.stage_rank, _notes(recipe, device))


def count_ranks(recipe: Recipe, world: int, ranks: Sequence[int], device: str = "cpu") -> list[Counts]:
    """`count` of several ranks, each in a process of its own, as many at a time as there are cores.

    Raises UserError for a layout that does not fit and when a process dies, RuntimeError that names the rank when its
    step fails.
    """
    where = f"{world} ({recipes.lay_out(recipe, world).name})"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def one(rank: int) -> Counts:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(send, recipe, world, rank, device), daemon=True)
        process.start()
        send.close()
        try:
            found = receive.recv()
        except EOFError:
            raise UserError(
                f"the process that counted the step of rank {rank} of {where} died, as happens when memory runs out; "
                "free some and try again",
                1,
            ) from None
        finally:
            process.join()
        if isinstance(found, str):
            raise RuntimeError(f"the step of rank {rank} of {where} could not be counted:\n{found}")
        assert isinstance(found, Counts)
        return found

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return list(threads.map(one, ranks))


def _child(pipe: Connection, recipe: Recipe, world: int, rank: int, device: str) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(count(recipe, world, rank, device))
    except Exception:
        pipe.send(traceback.format_exc())


def _whole_step(rehearsal: Rehearsal, micro_batches: int) -> tuple[Tally, Memory]:
    """A step of `micro_batches`, of which only some are run where the others are known to do the same.

    Without a pipeline that is every one but the first two and the last (FSDP gathers otherwise in the first two). With
    one they come in rounds of its length, and from its third round on nothing is new.
    """
    pipeline, recipe = rehearsal.mesh.layout.pipeline, rehearsal.recipe
    if pipeline == 1:
        run = min(micro_batches, ENOUGH)
        tally, memory = rehearsal.step(run)
        if micro_batches > run:
            tally = tally.extended(rehearsal.cuts[2], rehearsal.cuts[3], micro_batches - run, 1)
            # The whole step's batches are on the device from its beginning.
            batches = (micro_batches - run) * BATCH_BYTES * recipe.train.micro_batch_size * recipe.data.seq_length
            memory = replace(memory, activations=memory.activations + batches)
        return tally, memory
    run = min(micro_batches, max(3 * pipeline, ENOUGH))
    shorter, memory_shorter = rehearsal.step(run if run == micro_batches else run - pipeline)
    tally, memory = rehearsal.step(run)
    if micro_batches > run:
        tally = tally.extended(shorter, tally, micro_batches - run, pipeline)
        memory = _grown(memory_shorter, memory, micro_batches - run, pipeline)
    return tally, memory


def _grown(before: Memory, after: Memory, steps: int, each: int) -> Memory:
    """The peak of a step `steps` micro-batches longer than that of `after`, which is `each` longer than `before`'s: every
    schedule has all batches on the device, and GPipe holds activations for each."""
    return Memory(
        **{name: value + (value - getattr(before, name)) * steps // each for name, value in vars(after).items()}
    )


def _notes(recipe: Recipe, device: str) -> tuple[str, ...]:
    notes = []
    if recipe.train.compile:
        notes.append("counted without train.compile: compiled blocks move fewer bytes and keep other activations")
    if device != "cpu":
        notes.append(
            f"norms, attention and rotations are counted in the operators that a CPU has for them, not {device}'s"
        )
    if recipe.chat is not None:
        notes.append("counted as if every token were trained")
    if recipe.data.document_mask:
        notes.append("counted as if each sequence were one document")
    return tuple(notes)
