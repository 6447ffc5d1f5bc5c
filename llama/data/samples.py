"""Samples of seq_length + 1 tokens from one token file, in the very order of Megatron's GPTDataset.

Documents are shuffled and laid end to end, cut every seq_length tokens (each sample also holds the next one's first
token, its last label), and the samples are shuffled again. Source: Megatron-LM, megatron/core/datasets/gpt_dataset.py
and helpers.cpp (core 0.16.1); tests compare all indices. Megatron's per-document loop is here a cumulative sum and a
binary search, with the same integers as result.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset

CHUNK = 1 << 22  # documents laid out at a time: about 100 MB of temporary memory however many there are
FINAL_EPOCH_SHARE = 0.80  # Megatron shuffles the final epoch by itself when less than this much of it is asked for


def split_ranges(split: str, count: int) -> list[tuple[int, int]]:
    """Cut `count` sequences into train, validation and test ranges (begin, end), from shares such as "969,30,1".

    The floating-point steps and the rounding to even are Megatron's. A share of zero gives an empty range.
    """
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f'split={split!r} is not up to three shares such as "969,30,1"', 2)
    parts = np.array(shares + [0.0] * (3 - len(shares)))
    edges = [0.0]
    for share in (parts / parts.sum()).tolist():
        edges.append(edges[-1] + share)
    cuts = [round(edge * float(count)) for edge in edges]
    return list(pairwise(cuts))


def cut_samples(lengths: NDArray[np.int32], order: NDArray[np.int32], seq_length: int, count: int) -> NDArray[Any]:
    """Where samples 0..count begin: (count + 1, 2) of index into `order`, offset in that sequence.

    lengths: tokens of each sequence; order: sequence numbers as they are laid end to end. Sample k begins at token
    k × seq_length. int32 where that holds all values, else int64, as in Megatron.
    """
    largest = max(len(order), int(lengths.max(initial=0)))
    cuts = np.zeros((count + 1, 2), np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    laid, sample = 0, 1  # sample 0 begins at (0, 0), be that sequence empty or not
    for first in range(0, len(order), CHUNK):
        sizes = lengths[order[first : first + CHUNK]]
        ends = np.cumsum(sizes, dtype=np.int64) + laid
        laid = int(ends[-1])
        stop = min(count + 1, -(-laid // seq_length))  # cuts below `laid` lie in this chunk
        if stop > sample:
            at = np.arange(sample, stop, dtype=np.int64) * seq_length
            inside = np.searchsorted(ends, at, side="right")  # the first that ends behind the cut: never an empty one
            cuts[sample:stop, 0] = inside + first
            cuts[sample:stop, 1] = at - (ends[inside] - sizes[inside])
            sample = stop
    assert sample == count + 1, "fewer tokens than samples were counted"
    return cuts


@dataclass(frozen=True)
class Order:
    """One block of the order. documents (int32): sequence numbers end to end; cuts: see cut_samples; shuffle: which
    sample comes i-th."""

    documents: NDArray[np.int32]
    cuts: NDArray[Any]
    shuffle: NDArray[Any]


class Samples:
    """Sample i of a token file's range of sequences, for any i ≥ 0.

    Megatron lays out as many whole epochs as num_samples needs (one epoch when None). That makes `period` samples, at
    least num_samples. Beyond them the order goes on with the next block of `period` samples, shuffled with seed + 1,
    and so on: sample i depends on (file, range, seq_length, num_samples, seed, i) alone, and a run that goes on past
    num_samples changes nothing of what came before.

    split_range: (begin, end) in sequences. Raises UserError when the range has fewer than seq_length + 1 tokens.
    """

    def __init__(
        self, dataset: IndexedDataset, split_range: tuple[int, int], seq_length: int, num_samples: int | None, seed: int
    ):
        self.dataset, self.range, self.seq_length, self.seed = dataset, split_range, seq_length, seed
        begin, end = split_range
        self.epoch_tokens = int(dataset.lengths[begin:end].sum(dtype=np.int64))
        if self.epoch_tokens < seq_length + 1:
            raise UserError(
                f"{dataset.prefix}: sequences {begin}..{end} hold {self.epoch_tokens} tokens, fewer than the "
                f"{seq_length + 1} of one sample; use more text, a larger share in data.split, or a smaller "
                f"data.seq_length"
            )
        per_epoch = (self.epoch_tokens - 1) // seq_length
        self.num_samples = per_epoch if num_samples is None else num_samples
        self.epochs = max(1, -(-(self.num_samples * seq_length + 1) // self.epoch_tokens))
        self.period = (self.epochs * self.epoch_tokens - 1) // seq_length
        before_last = ((self.epochs - 1) * self.epoch_tokens - 1) // seq_length
        wanted_of_last = self.num_samples - before_last
        self._separate = self.epochs > 1 and wanted_of_last < int(FINAL_EPOCH_SHARE * per_epoch)
        self._first_shuffled = before_last if self._separate else self.period
        self._orders: OrderedDict[int, Order] = OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread and the main one may ask at once

    def order(self, block: int = 0) -> Order:
        """The order of samples block × period and on; the two blocks used last stay in memory."""
        with self._lock:
            if block not in self._orders:
                self._orders[block] = self._build(self.seed + block)
                if len(self._orders) > 2:
                    self._orders.popitem(last=False)
            self._orders.move_to_end(block)
            return self._orders[block]

    def _build(self, seed: int) -> Order:
        random = np.random.RandomState(seed % 2**32)  # Megatron's generator, called in Megatron's order
        epoch = np.arange(*self.range, dtype=np.int32)
        documents = np.tile(epoch, self.epochs)
        together = len(documents) - len(epoch) * self._separate
        random.shuffle(documents[:together])
        if self._separate:
            random.shuffle(documents[together:])
        cuts = cut_samples(self.dataset.lengths, documents, self.seq_length, self.period)
        kind = np.uint32 if self.period < np.iinfo(np.uint32).max - 1 else np.int64
        shuffle = np.arange(self.period, dtype=kind)
        random.shuffle(shuffle[: self._first_shuffled])
        if self._first_shuffled < self.period:
            random.shuffle(shuffle[self._first_shuffled :])
        return Order(documents, cuts, shuffle)

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        """Token ids of sample i: int64 (seq_length + 1,)."""
        if i < 0:
            raise IndexError(f"sample {i}: samples are counted from 0")
        block, inside = divmod(int(i), self.period)
        order = self.order(block)
        k = int(order.shuffle[inside])
        (first, offset), (last, stop) = order.cuts[k].tolist(), order.cuts[k + 1].tolist()
        sample = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for position in range(first, last + 1):
            begin = offset if position == first else 0
            length = stop + 1 - begin if position == last else None
            part = self.dataset.get(int(order.documents[position]), begin, length)
            sample[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == len(sample), "a sample does not add up"
        return sample

    def source(self, i: int) -> str:
        """The token file that sample i comes from, for messages."""
        return self.dataset.prefix

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change when any sample could; path and machine do not enter."""
        facts = [self.dataset.fingerprint, *self.range, self.seq_length, self.num_samples, self.seed]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
