"""What a model answers while it trains: greedy generation on any layout, out of the forward that validation runs.

No cache of keys and values: under sequence parallelism a lone token cannot be cut over ranks, and a pipeline takes one
shape. Each new token is a forward over the whole text so far, which is little beside training for a few short texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist

from data_prep.conversations import Conversation, Location, Message
from data_prep.errors import UserError
from data_prep.parts_file import read_meta
from data_prep.tokenizers import Tokenizer, load_tokenizer
from llama.config import Recipe
from llama.data.batches import IGNORED, Batch, Batches
from llama.data.blend_file import prefixes
from llama.device import Device
from llama.parallel.apply import ParallelLlama
from llama.train.evaluate import Beat, noted

ROUND = 64
"""Texts are filled up to a multiple of this, so that few shapes are computed."""


@dataclass(frozen=True)
class Prompt:
    """What is answered: ids as training sees them before an answer, and the answer that the data has, if any."""

    ids: tuple[int, ...]
    wanted: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt with what the model wrote, control tokens spelled out."""

    prompt: str
    answer: str
    wanted: str | None

    def markdown(self) -> str:
        """For TensorBoard, which renders Markdown: indented, so that nothing of a text is taken for it."""
        parts = {"prompt": self.prompt, "answer": self.answer, "wanted": self.wanted}
        given = {name: text for name, text in parts.items() if text is not None}
        return "\n\n".join(f"**{name}**\n\n    " + text.replace("\n", "\n    ") for name, text in given.items())


class Sampler:
    """Answers the recipe's prompts. Collective: every rank makes the same calls and gets the same answers."""

    def __init__(self, recipe: Recipe, device: Device, model: ParallelLlama, data: Batches, beat: Beat):
        self.recipe, self.device, self.model, self.beat = recipe, device, model, beat
        self.tokenizer = _tokenizer(recipe)
        self.prompts = [*_held_out(recipe, data), *_own(recipe, self.tokenizer)]
        odd = next((p for p in self.prompts if not 0 < len(p.ids) <= recipe.data.seq_length), None)
        if odd is not None:
            raise UserError(
                f"validation.prompts: {_spelled(self.tokenizer, odd.ids)[:40]!r}… has {len(odd.ids)} tokens; 1 to "
                f"data.seq_length={recipe.data.seq_length} can be answered",
                2,
            )
        ends = {prompt.wanted[-1] for prompt in self.prompts if prompt.wanted} & set(self.tokenizer.control.values())
        self.ends = ends | ({self.tokenizer.eod} if self.tokenizer.eod is not None else set())

    def run(self, what: str) -> list[Sample]:
        """An answer to each prompt, of at most validation.sample_tokens; `what` is told to `beat`."""
        rows = self.recipe.train.micro_batch_size * self.model.mesh.layout.accumulation
        written = [
            ids
            for start in range(0, len(self.prompts), rows)
            for ids in self._write([list(prompt.ids) for prompt in self.prompts[start : start + rows]], what)
        ]
        return [
            Sample(
                _spelled(self.tokenizer, prompt.ids),
                _spelled(self.tokenizer, ids),
                None if prompt.wanted is None else _spelled(self.tokenizer, prompt.wanted),
            )
            for prompt, ids in zip(self.prompts, written, strict=True)
        ]

    def _write(self, texts: list[list[int]], what: str) -> list[list[int]]:
        """What follows each text, ended by an end of turn, the longest that is wanted or the room of a sequence."""
        begins, live = [len(text) for text in texts], set(range(len(texts)))
        for _ in range(self.recipe.validation.sample_tokens):
            self.beat(what)
            for i, token in enumerate(self._next(texts)):
                # A logit that is no number has no likeliest id.
                if i in live and token < self.tokenizer.vocab_size:
                    texts[i].append(token)
                if (
                    token in self.ends
                    or token >= self.tokenizer.vocab_size
                    or len(texts[i]) > self.recipe.data.seq_length
                ):
                    live.discard(i)
            if not live:
                break
        return [text[begin:] for text, begin in zip(texts, begins, strict=True)]

    def _next(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest id after each text, agreed on by all ranks: where rounding differs, they still go on alike."""
        batches = self._batches([text[: self.recipe.data.seq_length] for text in texts])
        notes = noted(self.model, [batch.to(self.device.torch()) for batch in batches])
        found = torch.full((len(texts),), -1, dtype=torch.int64)
        if notes is not None:
            likeliest = notes[1].cpu().reshape(-1, batches[0].tokens.shape[1])
            for i, text in enumerate(texts):
                found[i] = likeliest[i, min(len(text), likeliest.shape[1]) - 1]
        found = found.to(self.device.torch())
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()  # type: ignore[no-any-return]

    def _batches(self, texts: Sequence[Sequence[int]]) -> list[Batch]:
        """The texts as micro-batches, filled up on the right, where causal attention does not look.

        A pipeline and compiled graphs get the shapes of training.
        """
        train, length = self.recipe.train, self.recipe.data.seq_length
        piped = self.recipe.parallel.pipeline_parallel > 1
        if not piped and not train.compile and self.device.able.dynamic_shapes:
            unit = ROUND * self.recipe.parallel.tensor_parallel
            length = min(length, -(-max(map(len, texts)) // unit) * unit)
        count = self.model.mesh.layout.accumulation if piped else -(-len(texts) // train.micro_batch_size)
        tokens = torch.zeros(count * train.micro_batch_size, length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        for row, label, text in zip(tokens, labels, texts, strict=False):
            row[: len(text)] = torch.tensor(text)
            label[len(text) - 1] = 0  # any: what follows is asked for here alone
        positions = torch.arange(length, dtype=torch.int32).repeat(len(tokens), 1)
        parts = (tokens, labels, positions, torch.zeros_like(positions))
        split = zip(*(part.split(train.micro_batch_size) for part in parts), strict=True)
        return [Batch(ids, wanted, at, documents, cursor=0) for ids, wanted, at, documents in split]


def _tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer. Raises UserError where none is known."""
    if recipe.chat is not None:
        from llama.chat.encoded import tokenizer_of  # only here: most runs need no templates

        return tokenizer_of(recipe)
    named = recipe.data.tokenizer or _meta(recipe).get("tokenizer")
    if named is None:
        raise UserError("validation.prompts need a tokenizer and the token files name none; set data.tokenizer", 2)
    return load_tokenizer(str(named))


def _meta(recipe: Recipe) -> dict[str, object]:
    """What is noted about the first token file."""
    return read_meta(prefixes(recipe.data.train[0])[0]) or {}


def _held_out(recipe: Recipe, data: Batches) -> Iterator[Prompt]:
    """Held-out conversations up to their last answer, spread evenly over all there are."""
    if not recipe.validation.samples:
        return
    samples = data.samples
    examples, encoded = samples.examples, samples.encoded  # type: ignore[attr-defined]
    count = min(recipe.validation.samples, len(examples))
    for example in examples[np.arange(count) * len(examples) // count].tolist():
        ids, trained = encoded.tokens.get(example), encoded.trained.get(example).astype(bool)
        begin = int(np.flatnonzero(~trained[1:])[-1]) + 2 if not trained[1:].all() else 1
        yield Prompt(tuple(ids[:begin].tolist()), tuple(ids[begin:].tolist()))


def _own(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """validation.prompts: under the chat template as the user's first turn, else plain text."""
    if recipe.chat is None:
        begin = [tokenizer.bos] if tokenizer.bos is not None and _meta(recipe).get("prepend_bos") else []
        for text in recipe.validation.prompts:
            yield Prompt((*begin, *tokenizer.encode(text)))
    elif recipe.validation.prompts:
        from llama.chat.encode import Encoder
        from llama.chat.encoded import template_of

        encoder = Encoder(tokenizer, template_of(recipe, tokenizer), "last", "error", recipe.data.seq_length + 1)
        for text in recipe.validation.prompts:
            # What stands before an answer is what training sees before one, whatever the answer.
            turns = Message("user", text), Message("assistant", "x")
            example = encoder.whole([Conversation(turns, Location("validation.prompts"))])[0]
            if example is None or not example.trained.any():
                raise UserError(f"validation.prompts: the chat template refuses {text!r}; leave it out", 2)
            yield Prompt(tuple(example.ids[: int(np.argmax(example.trained))].tolist()))


def _spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of ids with control tokens by their names, which decoding leaves out."""
    names = {number: text for text, number in tokenizer.control.items()}
    parts = groupby(ids, key=lambda number: names.get(number))
    return "".join(tokenizer.decode(run) if name is None else name * len(list(run)) for name, run in parts)
