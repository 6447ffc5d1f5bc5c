"""What a run shows and records: a line for people, points for TensorBoard and MLflow, speed and utilisation."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from llama.config import Recipe
from llama.device import Device, measure_flops
from llama.flops import trained_flops_per_token
from llama.train.evaluate import Evaluation
from llama.train.evaluate_samples import Sample
from llama.train.journal import Journal
from llama.train.optim import total_over_ranks
from llama.train.screen import Screen
from llama.train.sinks import Ended, Sink, TensorBoard


@dataclass(frozen=True)
class StepReport:
    """One step as all ranks know it."""

    step: int
    """Steps done, this one included."""
    loss: float
    gradient_norm: float
    lr: float
    consumed_samples: int
    consumed_tokens: int
    """Tokens read (samples × sequence length)."""
    trained_tokens: int
    """Tokens that had a label."""
    skipped_steps: int
    data_time: float
    """Seconds that this step waited for its batch."""
    skipped: str | None = None
    """Why the step was not taken."""


def si(value: float) -> str:
    """1234567 as 1.23M."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def _short(text: str, most: int = 120) -> str:
    """The end of a text on one line."""
    line = text.replace("\n", "⏎")
    return line if len(line) <= most else f"…{line[1 - most :]}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def utilisation_base(recipe: Recipe, device: Device, world: int) -> tuple[float, str]:
    """FLOP/s of one rank that model FLOPs are compared with, and in words where it comes from.

    Without a published peak: what matrix products reach when all ranks compute them at once, so that ranks which share
    cores share them here too. Collective then.
    """
    if device.peak_flops:
        return device.peak_flops, f"mfu is relative to {si(device.peak_flops)}FLOP/s, the published bf16 peak of a rank"
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    if dist.is_initialized():
        dist.barrier()
    speed = measure_flops(device, dtype)
    mean = total_over_ranks(torch.tensor([speed / world], dtype=device.wide, device=device.torch()))[0]
    kind = str(dtype).removeprefix("torch.")
    return mean, (
        f"mfu is relative to {si(mean)}FLOP/s, a rank's speed in {kind} matrix products measured just now; "
        f"no peak is published for {device.name}"
    )


class Metrics:
    """Writes on the first rank only; every rank may call it. Collective to make: without a published peak it measures."""

    def __init__(self, recipe: Recipe, device: Device, world: int, journal: Journal, first_step: int):
        self.recipe, self.device, self.world, self.journal = recipe, device, world, journal
        writes = journal.writes
        self.peak, self.peak_in_words = utilisation_base(recipe, device, world)
        self.screen = Screen(writes, first_step, recipe.train.steps)
        self.last_step = first_step
        self.sinks: list[Sink] = []
        if writes and recipe.log.tensorboard:
            self.sinks.append(TensorBoard(journal.run.tensorboard, first_step, self.say))
        if recipe.log.mlflow:
            from llama.train.mlflow_sink import Mlflow, tracking_uri

            tracking_uri(recipe.log.mlflow)  # a missing package is every rank's error
            if writes:
                facts = {"device": device.name, "ranks": str(world)}
                self.sinks.append(Mlflow(recipe, journal.run, facts, self.say))
        self.restart_clock()

    def say(self, text: str) -> None:
        """A line for people, on the first rank."""
        self.screen.say(text)

    def restart_clock(self) -> None:
        """Leave what happened since the last line (validation, saving) out of the next step's time."""
        self.since, self.steps_since, self.data_since = time.perf_counter(), 0, 0.0

    def step(self, report: StepReport, parameter_norm: float | None) -> None:
        """Record a step: a line and points every log.interval steps and at the last; a line at each skipped one."""
        self.last_step = report.step
        self.steps_since += 1
        self.data_since += report.data_time
        if report.skipped:
            self.say(f"step {report.step}: skipped, because {report.skipped} ({report.skipped_steps} skipped so far)")
            self.journal.event("skip", step=report.step, reason=report.skipped)
        if not self.due(report.step):
            return
        r, now = self.recipe, time.perf_counter()
        step_time = (now - self.since) / self.steps_since
        data_time = self.data_since / self.steps_since
        tokens = r.tokens_per_step / step_time / self.world
        values = {
            "reduced_train_loss": report.loss,
            "lr": report.lr,
            "gradient_norm": report.gradient_norm,
            "global_step": report.step,
            "consumed_samples": report.consumed_samples,
            "consumed_tokens": report.consumed_tokens,
            "skipped_steps": report.skipped_steps,
            "throughput": r.train.global_batch_size / step_time,
            "tokens_per_second_per_device": tokens,
            "step_time": step_time,
            "data_time": data_time,
            "memory_peak": self.device.peak_memory(),
        }
        if parameter_norm is not None:
            values["parameter_norm"] = parameter_norm
        for name, causal in (("mfu_full", False), ("mfu_causal", True)):
            values[name] = tokens * trained_flops_per_token(r, causal) / self.peak
        self.scalars(report.step, values)
        left = (r.train.steps - report.step) * step_time
        self.journal.status(
            last=report.step == r.train.steps, step=report.step, steps=r.train.steps, loss=report.loss,
            gradient_norm=report.gradient_norm, lr=report.lr, tokens_per_second=tokens * self.world,
            mfu=values["mfu_full"], step_time=step_time, seconds_left=left, skipped_steps=report.skipped_steps,
            trained_tokens=report.trained_tokens,
        )  # fmt: skip
        self.screen.step(
            report.step,
            f"loss {report.loss:.4f}  norm {report.gradient_norm:.3f}  lr {report.lr:.2e}  {step_time:.3g} s/step  "
            f"{si(tokens * self.world)} tokens/s  mfu {values['mfu_full']:.1%}  memory {si(values['memory_peak'])}B  "
            f"data {data_time / step_time:.0%}",
            clock(left),
        )
        self.restart_clock()

    def due(self, step: int) -> bool:
        """Whether this step is shown and recorded."""
        return step % self.recipe.log.interval == 0 or step == self.recipe.train.steps

    def validation(self, step: int, found: Evaluation) -> None:
        """Record what held-out samples say: of all, then of each source."""
        same = found.baseline
        beside = f" (always the same answer: {same.accuracy:.1%})" if same is not None else ""
        self.say(f"step {step}: validation {found.whole.in_words()}{beside}, {found.seconds:.1f} s")
        for name, figures in found.sources.items():
            self.say(f"step {step}: validation on {name}: {figures.in_words()}")
        points = found.whole.points() | ({} if same is None else {"baseline": same.accuracy})
        sources = {name: figures.points() for name, figures in found.sources.items()}
        of_source = {f"val_{key}/{name}": value for name, of in sources.items() for key, value in of.items()}
        self.scalars(step, {f"val_{key}": value for key, value in points.items()} | of_source)
        counts = {"answers": round(found.whole.answers)} if found.whole.answers else {}
        told = {name: {key: round(value, 6) for key, value in of.items()} for name, of in sources.items()}
        self.journal.event("validation", step=step, **points, **counts, **({"sources": told} if told else {}))
        self.journal.validated(found.whole.loss)

    def best(self, step: int, loss: float) -> None:
        """Record that this validation is the best so far."""
        self.journal.event("best", step=step, loss=loss)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record what the model wrote: whole in TensorBoard and samples.jsonl, a few words in the log."""
        for number, sample in enumerate(samples, 1):
            wanted = "" if sample.wanted is None else f"  wanted: {_short(sample.wanted)}"
            self.say(f"step {step}: sample {number}: {_short(sample.prompt)} → {_short(sample.answer)}{wanted}")
            self.text(step, f"samples/{number}", sample.markdown())
        self.journal.samples(step, [asdict(sample) for sample in samples])

    def give_up(self, step: int, reason: str) -> None:
        """The run is done before its last step."""
        self.last_step = self.recipe.train.steps
        self.say(f"ended after step {step}: {reason}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of a step, by name, for TensorBoard and MLflow."""
        for sink in self.sinks:
            sink.scalars(step, values)

    def text(self, step: int, tag: str, text: str) -> None:
        """A text of a step, such as what the model answers, for TensorBoard and MLflow."""
        for sink in self.sinks:
            sink.text(step, tag, text)

    def flush(self) -> None:
        """Have all points on disk."""
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Nothing comes any more: flush what is recorded. Called as the run ends, be it by an error."""
        ended: Ended = "finished" if self.last_step >= self.recipe.train.steps else "stopped"
        if sys.exception() is not None:
            ended = "failed"
        for sink in self.sinks:
            sink.close(ended)
        self.screen.close()
