"""What a model does on held-out samples: loss and perplexity, of each source too, and answers that are right.

The same samples each time and the same sums on every layout: the ranks that hold the output note the loss and the
likeliest id of each token (llama/model/loss.py), and sums go over all ranks once a batch.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llama.config import Recipe
from llama.data.batches import IGNORED, Batch, Batches
from llama.data.origins import Origins
from llama.device import Device
from llama.model.loss import Note
from llama.parallel.apply import ParallelLlama
from llama.train.optim import total_over_ranks

Beat = Callable[[str], None]


@dataclass(frozen=True)
class Figures:
    """Sums over held-out tokens and answers."""

    loss_sum: float
    """In nats."""
    tokens: float
    right: float = 0.0
    """Answers that the model would give word for word."""
    answers: float = 0.0

    @property
    def loss(self) -> float:
        return self.loss_sum / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def accuracy(self) -> float | None:
        return self.right / self.answers if self.answers else None

    def points(self) -> dict[str, float]:
        """The figures by name."""
        found = {"loss": self.loss, "perplexity": self.perplexity}
        return found if self.accuracy is None else found | {"accuracy": self.accuracy}

    def in_words(self) -> str:
        right = f", accuracy {self.right / self.answers:.1%} of {self.answers:.0f} answers" if self.answers else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{right}"


@dataclass(frozen=True)
class Evaluation:
    """One validation."""

    whole: Figures
    """Of all tokens, so sources count by their tokens."""
    sources: dict[str, Figures] = field(default_factory=dict)
    """Of each source where there are several."""
    baseline: Baseline | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Baseline:
    """What giving the most frequent answer always would reach."""

    ids: tuple[int, ...]
    accuracy: float


class Evaluator:
    """Validates `data` on this rank's part of the model. Collective: every rank makes the same calls.

    Args:
        beat: told what is at work, so that it does not count as stuck.
        wants_stop: whether this rank is asked to stop.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: Device,
        model: ParallelLlama,
        data: Batches,
        beat: Beat,
        wants_stop: Callable[[], bool],
    ):
        self.recipe, self.device, self.model, self.data = recipe, device, model, data
        self.beat, self.wants_stop = beat, wants_stop
        self.origins = Origins(recipe, data)
        self.held_out: int | None = None if recipe.chat is None else len(data.samples)  # type: ignore[arg-type]
        """Sequences of conversations, of which each counts once; token files go on without end."""
        batch, wanted = recipe.train.global_batch_size, recipe.validation.batches
        self.batches = wanted if self.held_out is None else min(wanted, -(-self.held_out // batch))
        self.baseline: Baseline | None = None

    def run(self, what: str) -> Evaluation | None:
        """All figures; None where some rank was asked to stop: half a validation is none. `what` is told to `beat`."""
        started, names = time.perf_counter(), self.origins.names
        sums = np.zeros((len(names), 4))
        for i in range(self.batches):
            self.beat(what)
            mine = self._batch(i * self.recipe.train.global_batch_size)
            told = torch.tensor([*mine.flatten().tolist(), float(self.wants_stop())], dtype=self.device.wide)
            *totals, stops = total_over_ranks(told.to(self.device.torch()))
            if stops:
                return None
            sums += np.array(totals).reshape(sums.shape)
        if self.recipe.validation.accuracy and self.baseline is None:
            self.baseline = self._most_frequent()
        by_source = {name: Figures(*row) for name, row in zip(names, sums.tolist(), strict=True)}
        return Evaluation(
            Figures(*sums.sum(axis=0).tolist()),
            by_source if len(names) > 1 else {},
            self.baseline,
            time.perf_counter() - started,
        )

    def _batch(self, cursor: int) -> NDArray[np.float64]:
        """What this rank adds to the sums of the global batch at `cursor`: (sources, 4) as in Figures."""
        numbers = [n for micro in self.data.sample_numbers(cursor) for n in micro]
        batches = self._once(self.data.step(cursor), numbers)
        notes = noted(self.model, [batch.to(self.device.torch()) for batch in batches])
        count = len(self.origins.names)
        if notes is None or not self.model.mesh.speaks_for_data:  # tensor ranks note the same
            return np.zeros((count, 4))
        labels, documents = (
            np.concatenate([getattr(b, key).numpy() for b in batches]) for key in ("labels", "documents")
        )
        losses, likeliest = (part.cpu().numpy().reshape(labels.shape) for part in notes)
        trained = labels != IGNORED
        source = np.stack([self.origins.of(n) for n in numbers])
        sums = np.zeros((count, 4))
        sums[:, 0] = np.bincount(source[trained], losses[trained], count)
        sums[:, 1] = np.bincount(source[trained], minlength=count)
        if self.recipe.validation.accuracy:
            answers = last_answers(labels, documents)
            of = source.flatten()[answers.firsts]
            sums[:, 2] = np.bincount(of, exact(likeliest, labels, answers), count)
            sums[:, 3] = np.bincount(of, minlength=count)
        return sums

    def _once(self, batches: Sequence[Batch], numbers: Sequence[int]) -> list[Batch]:
        """The batches with nothing to predict in sequences past the last that is held out, which were counted already."""
        if self.held_out is None or max(numbers) < self.held_out:
            return list(batches)
        rows, out = iter(numbers), []
        for batch in batches:
            again = torch.tensor([next(rows) >= self.held_out for _ in batch.labels])
            out.append(replace(batch, labels=batch.labels.masked_fill(again[:, None], IGNORED)))
        return out

    def _most_frequent(self) -> Baseline | None:
        """The answer that is right most often; read by each rank for itself. None where no two are alike."""
        counts: Counter[tuple[int, ...]] = Counter()
        assert self.held_out is not None
        for number in range(min(self.held_out, self.batches * self.recipe.train.global_batch_size)):
            _, labels, _, documents = self.data.samples.row(number)  # type: ignore[attr-defined]
            counts.update(answer_ids(labels[None], documents[None]))
        ids, most = counts.most_common(1)[0] if counts else ((), 0)
        return Baseline(ids, most / counts.total()) if most > 1 else None


def noted(model: ParallelLlama, batches: Sequence[Batch]) -> Note | None:
    """Loss and likeliest id of each token of the batches that has a label, (tokens,) both, rows end to end; of others 0
    and any id. None on a rank without the output. Nothing is kept for backward. Collective."""
    notes: list[Note] = []
    heads = [part.head for part in model.parts if part.head is not None]
    for head in heads:
        head.vocabulary.notes = notes
    try:
        model.evaluate(batches)
    finally:
        for head in heads:
            head.vocabulary.notes = None
    if not heads:
        return None
    trained = torch.cat([batch.labels.flatten() for batch in batches]) != IGNORED
    if sum(len(losses) for losses, _ in notes) == len(trained):
        return torch.cat([losses for losses, _ in notes]), torch.cat([ids for _, ids in notes])
    losses, likeliest = torch.zeros(len(trained), device=trained.device), torch.zeros_like(trained, dtype=torch.int64)
    if notes:  # of labelled tokens alone: see Head.skip_untrained
        losses[trained] = torch.cat([chunk for chunk, _ in notes]).to(losses.dtype)
        likeliest[trained] = torch.cat([ids for _, ids in notes])
    return losses, likeliest


class Answers(NamedTuple):
    """The last answer of each document, over rows that lie end to end."""

    places: NDArray[np.int64]
    """Positions of their tokens."""
    numbers: NDArray[np.int64]
    """Which answer each of these positions belongs to."""
    firsts: NDArray[np.int64]
    """Position of each answer's first token."""


def last_answers(labels: NDArray[np.int64], documents: NDArray[np.int32]) -> Answers:
    """The last unbroken stretch of trained labels in each document; (B, S) both.

    It is what the model writes after the last prompt: the assistant's last turn with the token that ends it.
    """
    rows = np.arange(len(labels), dtype=np.int64)[:, None]
    document = (documents + rows * (int(documents.max(initial=0)) + 1)).flatten()
    trained = (labels != IGNORED).flatten()
    begins = trained.copy()
    begins[1:] &= ~(trained[:-1] & (document[1:] == document[:-1]))
    stretch = np.cumsum(begins) - 1  # of each trained position
    owner = document[begins]
    last = np.r_[owner[1:] != owner[:-1], np.ones(min(1, len(owner)), bool)]
    chosen = trained.copy()
    chosen[trained] = last[stretch[trained]]
    places = np.flatnonzero(chosen)
    return Answers(places, (np.cumsum(last) - 1)[stretch[places]], np.flatnonzero(begins)[last])


def exact(likeliest: NDArray[np.int64], labels: NDArray[np.int64], answers: Answers) -> NDArray[np.bool_]:
    """Whether the model would give each answer word for word when it generates greedily, (answers,).

    Given the true prefix, every token of the answer is the likeliest. By induction that is the same as generating: the
    first token is chosen after the same prompt; where it is right the second is chosen after the same prefix, and so on
    up to the token that ends the turn. One wrong token and the generated text is another. One forward so counts what
    would take as many as the answer has tokens. In bf16, near-ties may fall another way in a generator that computes
    one token at a time.
    """
    wrong = (likeliest.flatten() != labels.flatten())[answers.places]
    return np.bincount(answers.numbers, wrong, len(answers.firsts)) == 0


def answer_ids(labels: NDArray[np.int64], documents: NDArray[np.int32]) -> list[tuple[int, ...]]:
    """The ids of each document's last answer."""
    answers = last_answers(labels, documents)
    ids, cuts = labels.flatten()[answers.places], np.cumsum(np.bincount(answers.numbers, minlength=len(answers.firsts)))
    return [tuple(part.tolist()) for part in np.split(ids, cuts[:-1])] if len(cuts) else []
