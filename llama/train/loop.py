"""The training run, from a recipe to its last checkpoint. Read `train` for the whole, `Trainer.step` for one step."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from llama import recipe as recipes
from llama.chat.together import encode_together
from llama.checkpoint_format import TrainState
from llama.config import Recipe
from llama.data.batches import IGNORED, Batch, Batches
from llama.data.build import build_data
from llama.device import Device, find_device
from llama.parallel.adapters import adapters_in_words
from llama.parallel.apply import ParallelLlama, parallelize
from llama.parallel.mesh import build_mesh
from llama.train.beginning import adapter_reader, check_same_data, describe, settle_order, settle_steps, weights_reader
from llama.train.checkpoint import Checkpoints
from llama.train.ending import plan_against_measured
from llama.train.evaluate import Evaluator
from llama.train.evaluate_samples import Sampler
from llama.train.graphs import Graphs
from llama.train.guard import StepGuard
from llama.train.metrics import Metrics, StepReport
from llama.train.opening import open_run
from llama.train.optim import (
    build_optimizer,
    clip_factor,
    scale_gradients,
    settle_gradients,
    squared_norm,
    total_over_ranks,
)
from llama.train.patience import given_up, judge
from llama.train.preflight import preflight
from llama.train.schedule import learning_rate
from llama.train.signals import StopRequest
from llama.train.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    loss: float
    validation_loss: float | None
    stopped_by: str | None
    """Name of the signal that ended it early."""
    given_up: str | None = None
    """Why it ended before its last step though nobody asked it to: validations that no longer improve."""


def train(recipe: Recipe, stop: StopRequest | None = None, graphs: Graphs | None = None) -> Outcome:
    """Train `recipe` on the ranks that were started, resuming from its run folder when that has a checkpoint.

    Every rank calls this after init_process_group. `stop`: what listens for signals already. `graphs`: the compiled
    ones, when the caller keeps them. Raises UserError for what the user can mend.
    """
    device = find_device()
    doubts = recipes.check_device(recipe, device)
    layout = recipes.lay_out(recipe, dist.get_world_size())
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest.of_job())
        place = stack.enter_context(open_run(recipe))
        stop.look(place.run.attempt(place.attempt))
        journal, speaks = place.journal, dist.get_rank() == 0

        def say(text: str) -> None:
            if speaks:
                print(text, flush=True)

        for note in (*place.notes, *(f"warning: {doubt}" for doubt in doubts)):
            say(note)
        journal.event(
            "start", nodes=sorted(set(place.hosts)), ranks=layout.world, layout=layout.name, device=device.name,
            version=place.version,
        )  # fmt: skip
        preflight(recipe, device, layout, place.run, place.attempt, say)
        keeps = None
        if graphs is None and recipe.train.compile:
            keeps = Graphs(recipe, device, layout)
            say(f"compile cache {keeps.load()}")
        mesh = build_mesh(layout, device.type)
        model = parallelize(recipe, mesh, device, read=weights_reader(recipe), read_adapter=adapter_reader(recipe))
        optimizer = build_optimizer(model, recipe, device)
        checkpoints = Checkpoints(place.run.path, recipe, model, optimizer, journal, place.lock)
        resumed = checkpoints.resume(say)
        state = resumed or TrainState()
        journal.event("resume" if resumed else "fresh", step=state.step)
        recipe = settle_order(recipe, state)
        encode_together(recipe, say)
        data, validation = build_data(recipe, mesh.data_rank, layout.data, say)
        check_same_data(recipe, state, data)
        recipe = settle_steps(recipe, data)
        if speaks and recipe.train.epochs is not None:
            recipes.save(recipe, place.run.recipe)
        metrics = Metrics(recipe, device, layout.world, journal, state.step)
        metrics.say(describe(recipe, device, model, state if resumed else None))
        for line in adapters_in_words(recipe):
            metrics.say(line)
        metrics.say(metrics.peak_in_words)
        stack.callback(metrics.close)
        trainer = Trainer(recipe, device, model, optimizer, checkpoints, metrics, state, stop, place.watchdog, keeps)
        outcome = trainer.run(data, validation)
        if line := plan_against_measured(recipe, device, trainer.step_seconds):
            metrics.say(line)
        ended, reason = "stopped" if outcome.stopped_by else "finished", outcome.stopped_by or outcome.given_up
        journal.event("end", step=outcome.step, outcome=ended, reason=reason)
        return outcome


class Trainer:
    """Holds the parts of a run and takes its steps."""

    def __init__(
        self,
        recipe: Recipe,
        device: Device,
        model: ParallelLlama,
        optimizer: torch.optim.Optimizer,
        checkpoints: Checkpoints,
        metrics: Metrics,
        state: TrainState,
        stop: StopRequest,
        watchdog: Watchdog,
        graphs: Graphs | None = None,
    ):
        self.recipe, self.device, self.model, self.optimizer = recipe, device, model, optimizer
        self.checkpoints, self.metrics, self.state, self.stop = checkpoints, metrics, state, stop
        self.watchdog, self.graphs = watchdog, graphs
        self.guard = StepGuard(recipe.train.guard, state)
        self.stopping = False
        self.step_seconds: deque[float] = deque(maxlen=20)
        self.validation_seconds = 0.0
        self.evaluator: Evaluator | None = None
        self.sampler: Sampler | None = None

    def run(self, data: Batches, validation: Batches | None) -> Outcome:
        """Steps until train.steps, until all ranks agree to stop or validations no longer improve; checkpoints and
        validations on the way."""
        recipe, state = self.recipe, self.state
        loss, validated, saved = float("nan"), None, state.step
        if validation is not None:
            self.evaluator = Evaluator(
                recipe, self.device, self.model, validation, self.watchdog.beat, self.stop_wanted
            )
            if recipe.validation.samples or recipe.validation.prompts:
                self.sampler = Sampler(recipe, self.device, self.model, validation, self.watchdog.beat)
        data.check_vocabulary(recipe.model.vocab_size)
        batches = data.prefetch(state.consumed_samples, recipe.data.prefetch)
        self.stop.working = True
        # Asked while all this was being set up: nothing new is there to save.
        self.stopping = self.agree_to_stop()
        gc.collect()
        gc.disable()  # collected on all ranks at the same step instead, so that no rank makes the others wait
        try:
            if recipe.validation.at_start and state.step == 0 and not self.stopping:
                validated = self.validate()
            while state.step < recipe.train.steps and not self.stopping and not given_up(state, recipe.validation):
                before = validated
                started = time.monotonic()
                report = self.step(batches)
                self.step_seconds.append(time.monotonic() - started)
                self.watchdog.beat(f"step {state.step + 1}", recipe.resilience.hang_timeout)
                loss = report.loss
                due = self.metrics.due(state.step)
                self.metrics.step(report, self.parameter_norm() if due else None)
                if report.skipped:
                    self.guard.check(state.step, report.skipped)
                if self.every(recipe.validation.interval) and not self.stopping:
                    validated = self.validate()
                if self.graphs is not None and (trouble := self.graphs.after_step(validated is not before)):
                    self.metrics.say(f"warning: {trouble}")
                best = recipe.checkpoint.keep_best and state.best_step == state.step
                if self.every(recipe.checkpoint.interval) or best:
                    self.save()
                    saved = state.step
                if state.step % recipe.train.garbage_collection_steps == 0:
                    gc.collect()
            # What validations have said is in the checkpoint: a run that gave up must not go on when it is started again.
            reason = None if self.stopping or state.step == recipe.train.steps else given_up(state, recipe.validation)
            if state.step != saved and (recipe.checkpoint.at_end or self.stopping or reason):
                self.save()
            self.watchdog.beat("the last checkpoint")
            self.checkpoints.wait()
        except UserError:
            self.checkpoints.wait()  # the process ends without waiting for threads
            raise
        finally:
            gc.enable()
            batches.close()
        if self.graphs is not None:
            self.metrics.say(f"graphs of this attempt: {self.graphs.count()}")
        stopped_by = (self.stop.name or "another rank's signal") if self.stopping else None
        if stopped_by:
            self.metrics.say(f"stopped by {stopped_by} after step {state.step}; the same command goes on from here")
        if reason:
            self.metrics.give_up(state.step, reason)
        return Outcome(state.step, loss, validated, stopped_by, reason)

    def every(self, interval: int) -> bool:
        """Whether the step just done is a multiple of `interval`; 0 is never."""
        return bool(interval) and self.state.step % interval == 0

    def step(self, batches: Generator[list[Batch], None, None]) -> StepReport:
        """One optimizer step: gradients of a global batch, one all-reduce, judge, scale and clip, update."""
        recipe, state = self.recipe, self.state
        started = time.perf_counter()
        micro_batches = next(batches)
        data_time = time.perf_counter() - started

        named = self.model.optimized_parameters()
        own_loss = self.model.forward_backward([batch.to(self.device.torch()) for batch in micro_batches])
        settle_gradients(named)
        loss_sum, tokens, squared, stops = self.total(own_loss, micro_batches, self.gradient_square())
        loss, norm = loss_sum / max(tokens, 1), squared**0.5 / max(tokens, 1)

        lr = learning_rate(state.step, recipe)
        objection = self.guard.objection(loss, norm, tokens)
        if not objection:
            scale_gradients(named, clip_factor(norm, recipe.optimizer.clip_norm) / tokens)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            state.updates += 1
        self.optimizer.zero_grad(set_to_none=True)

        self.stopping = stops > 0
        state.step += 1
        state.consumed_samples += recipe.train.global_batch_size
        state.trained_tokens += round(tokens)
        return StepReport(
            step=state.step,
            loss=loss,
            gradient_norm=norm,
            lr=lr,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_samples * recipe.data.seq_length,
            trained_tokens=state.trained_tokens,
            skipped_steps=state.skipped_steps,
            data_time=data_time,
            skipped=objection,
        )

    def total(self, loss_sum: torch.Tensor, batches: Sequence[Batch], squared: torch.Tensor) -> list[float]:
        """Over all ranks: summed loss, trained tokens, squared gradient norm, and how many were asked to stop."""
        layout = self.model.mesh.layout
        share = 1.0 if self.model.mesh.speaks_for_data else 0.0  # tensor ranks hold the same loss and tokens
        tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches) / layout.pipeline
        mine = torch.zeros(4, dtype=self.device.wide, device=loss_sum.device)
        mine[0] = loss_sum * share
        mine[1] = tokens * share
        mine[2] = squared
        mine[3] = float(self.stop_wanted())
        return total_over_ranks(mine)

    def agree_to_stop(self) -> bool:
        """Whether any rank is asked to stop; told to all."""
        mine = torch.tensor([float(self.stop_wanted())], dtype=self.device.wide, device=self.device.torch())
        return total_over_ranks(mine)[0] > 0

    def stop_wanted(self) -> bool:
        """Whether this rank is asked to stop."""
        return self.stop.wanted(self.needed())

    def needed(self) -> float:
        """Seconds that another step, what is due after it and a save would take at worst, with the recipe's margin."""
        step = max(self.step_seconds, default=0.0)
        following = self.state.step + 2  # counted after this step's collective: the one after it is judged
        interval = self.recipe.validation.interval
        validation = self.validation_seconds if interval and following % interval <= 1 else 0.0
        return 1.5 * (step + validation + self.checkpoints.seconds) + self.recipe.resilience.stop_margin

    def gradient_square(self) -> torch.Tensor:
        """This rank's share of the squared norm of the summed gradients."""
        gradients = [p.grad for _, p in self.model.counted_parameters() if p.grad is not None]
        return squared_norm(gradients, self.ranks_of_stage, self.device.wide)

    def parameter_norm(self) -> float:
        """Norm of all weights."""
        weights = [p.detach() for _, p in self.model.counted_parameters()]
        share = squared_norm(weights, self.ranks_of_stage, self.device.wide).reshape(1).to(self.device.torch())
        return total_over_ranks(share)[0] ** 0.5

    @property
    def ranks_of_stage(self) -> int:
        layout = self.model.mesh.layout
        return layout.world // layout.pipeline

    def validate(self) -> float | None:
        """Mean loss over the same held-out samples each time, with all that the recipe wants measured beside it.

        None when a rank was asked to stop meanwhile.
        """
        assert self.evaluator is not None
        started, step, what = time.perf_counter(), self.state.step, f"validation after step {self.state.step}"
        found = self.evaluator.run(what)
        if found is None:
            self.stopping = True
            return None
        self.metrics.validation(step, found)
        if step and judge(
            self.state, found.whole.loss, self.recipe.validation
        ):  # before any step there is nothing to keep
            self.metrics.best(step, found.whole.loss)
        if self.sampler is not None:
            self.metrics.samples(step, self.sampler.run(what))
        self.validation_seconds = time.perf_counter() - started
        self.watchdog.beat(f"step {step + 1}")
        self.metrics.restart_clock()
        return found.whole.loss

    def save(self) -> None:
        """Write a checkpoint, in the background where the recipe says so."""
        self.metrics.flush()  # what leads to a checkpoint is as safe as the checkpoint
        self.watchdog.beat(f"the checkpoint of step {self.state.step}")
        self.checkpoints.save(self.state)
        self.watchdog.beat(f"step {self.state.step + 1}")
        self.metrics.say(f"step {self.state.step}: checkpoint")
        self.metrics.restart_clock()
