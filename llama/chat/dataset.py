"""Batches of packed conversations: sample i is a pure function of the encoded set, the seed and i.

The examples are packed once. An epoch reads every packed sequence once, in an order of its own drawn from (seed, epoch);
sample i is sequence i mod their number of epoch i div their number. The cursor is one number, as with token files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from llama.chat.encoded import EncodedSet, open_encoded
from llama.chat.packing import Packs, apart, pack
from llama.config import Recipe
from llama.data.batches import IGNORED, Arrays, Batches
from llama.data.samples import split_ranges


class PackedSamples:
    """Sequences of packed examples.

    Args:
        encoded: the set; `examples`: numbers of those that are read.
        packed: several in a sequence; otherwise each is padded.
    """

    def __init__(
        self, encoded: EncodedSet, examples: NDArray[np.int64], seq_length: int, seed: int, packed: bool = True
    ):
        self.encoded, self.examples, self.seq_length, self.seed, self.packed = (
            encoded,
            examples,
            seq_length,
            seed,
            packed,
        )
        # The last token of an example is nobody's input: an example of n tokens takes n - 1 positions.
        self.positions = encoded.lengths[examples].astype(np.int64) - 1
        self.packs: Packs = pack(self.positions, seq_length, seed) if packed else apart(self.positions)
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread and the main one may ask at once

    def __len__(self) -> int:
        """Sequences of an epoch."""
        return len(self.packs)

    @property
    def fill(self) -> float:
        """Share of an epoch's positions that hold a token."""
        return int(self.positions.sum()) / max(1, len(self) * self.seq_length)

    def members(self, i: int) -> NDArray[np.int64]:
        """Numbers in the set of the examples in sample i, in their order."""
        epoch, inside = divmod(int(i), len(self))
        with self._lock:
            if epoch not in self._orders:
                self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self))
                if len(self._orders) > 2:
                    self._orders.popitem(last=False)
            k = int(self._orders[epoch][inside])
        return self.examples[self.packs[k]]

    def row(self, i: int) -> Arrays:
        """tokens, labels, positions, documents of sample i, each (seq_length,). Room left over is a document of its own."""
        length = self.seq_length
        tokens, labels = np.zeros(length, np.int64), np.full(length, IGNORED, np.int64)
        positions, documents = np.empty(length, np.int32), np.empty(length, np.int32)
        at, number = 0, 0
        for example in self.members(i).tolist():
            ids = self.encoded.tokens.get(example).astype(np.int64)
            trained = self.encoded.trained.get(example).astype(bool)
            here = slice(at, at + len(ids) - 1)
            tokens[here] = ids[:-1]
            labels[here] = np.where(trained[1:], ids[1:], IGNORED)
            positions[here] = np.arange(len(ids) - 1)
            documents[here] = number
            at, number = here.stop, number + 1
        positions[at:] = np.arange(length - at)
        documents[at:] = number
        return tokens, labels, positions, documents

    def spread(self, i: int, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each position of sample i the entry of `values` (one an example of the set) that its example has; 0 in
        room left over. (seq_length,)"""
        members, row = self.members(i), np.zeros(self.seq_length, np.int64)
        whole = np.repeat(values[members], self.encoded.lengths[members] - 1)
        row[: len(whole)] = whole
        return row

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        """Token ids of sample i."""
        return self.row(i)[0]

    def source(self, i: int) -> str:
        """Where sample i comes from, for messages."""
        return ", ".join(self.encoded.facts["files"])

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change when any sample could."""
        chosen = hashlib.blake2b(self.examples.tobytes(), digest_size=16).hexdigest()
        facts = [self.encoded.fingerprint, chosen, self.seq_length, self.seed, self.packed]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


class ChatBatches(Batches):
    """The batches of one data rank, out of packed conversations."""

    samples: PackedSamples

    def _arrays(self, numbers: list[int]) -> Arrays:
        rows = [self.samples.row(i) for i in numbers]
        tokens, labels, positions, documents = (np.stack(column) for column in zip(*rows, strict=True))
        return tokens, labels, positions, documents

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a set with an id that the model lacks. Raises UserError."""
        largest = self.samples.encoded.facts["largest_id"]
        if largest >= vocab_size:
            raise UserError(
                f"the conversations hold token id {largest}, but the model's ids are 0..{vocab_size - 1}; "
                f"{self.samples.encoded.facts['tokenizer']} is not the model's tokenizer, or its template adds tokens",
                2,
            )


def chat_samples(
    recipe: Recipe, say: Callable[[str], None] | None = None, opened: Callable[..., EncodedSet] = open_encoded
) -> tuple[PackedSamples, PackedSamples | None]:
    """What the recipe trains on, and what it validates on where validation.interval is set.

    data.validation's files, or the part of the conversations that data.split cuts off after a shuffle by data.seed.
    Conversations go to one part whole, with all their examples. Raises UserError.
    """
    data, chat = recipe.data, recipe.chat
    assert chat is not None
    train = opened(recipe, data.train, say=say)
    conversations = np.random.default_rng(data.seed).permutation(len(train.tokens.documents) - 1)
    split = "1" if data.validation else data.split
    parts = [np.sort(conversations[begin:end]) for begin, end in split_ranges(split, len(conversations))]
    sets = [(train, _examples(train, parts[0]))]
    if recipe.validation.interval:
        if data.validation:
            held_out = opened(recipe, data.validation, say=say)
            sets.append((held_out, np.arange(len(held_out.tokens))))
        else:
            sets.append((train, _examples(train, parts[1])))
    built = []
    for (encoded, examples), what in zip(sets, ("training", "validation"), strict=False):
        if not len(examples):
            raise UserError(
                f"data.split={data.split!r} leaves no {what} part of {len(conversations)} conversations; change its "
                "shares, name files in data.validation, or set validation.interval=0",
                2,
            )
        built.append(PackedSamples(encoded, examples, data.seq_length, data.seed, chat.pack))
    return built[0], built[1] if len(built) > 1 else None


def _examples(encoded: EncodedSet, conversations: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the examples of some conversations."""
    documents = encoded.tokens.documents
    begins, counts = documents[conversations], documents[conversations + 1] - documents[conversations]
    firsts = np.cumsum(counts) - counts
    return np.repeat(begins - firsts, counts) + np.arange(int(counts.sum()))


def build_chat(
    recipe: Recipe, data_rank: int, data_size: int, say: Callable[[str], None] | None = None
) -> tuple[ChatBatches, ChatBatches | None]:
    """Training and validation batches of one data rank; see llama/data/build.py."""
    train, validation = chat_samples(recipe, say)
    if say is not None:
        say(in_words(recipe, train))
    t = recipe.train
    made = [
        None if s is None else ChatBatches(s, t.global_batch_size, t.micro_batch_size, data_rank, data_size)
        for s in (train, validation)
    ]
    for batches in made:
        if batches is not None:
            batches.check_vocabulary(recipe.model.vocab_size)
    assert made[0] is not None
    return made[0], made[1]


def in_words(recipe: Recipe, samples: PackedSamples) -> str:
    """What an epoch is, in a line."""
    facts, t = samples.encoded.facts, recipe.train
    steps = len(samples) / t.global_batch_size
    left_out = "".join(f"; {count:,} {what}" for what, count in facts["counts"].items())
    return (
        f"{len(samples.examples):,} examples in {len(samples):,} sequences of {samples.seq_length:,} ({samples.fill:.2%} "
        f"filled), {steps:,.1f} steps an epoch, {t.steps / steps:.2f} epochs in {t.steps:,} steps{left_out}"
    )
