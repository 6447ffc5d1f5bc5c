"""Batches from samples: which rank reads which, labels shifted, documents told apart; a pure function of the cursor.

The cursor is the number of samples that all ranks together have consumed. A step reads samples cursor to
cursor + global_batch_size; micro-batch m of data rank r of R reads the micro_batch_size samples from
cursor + (m × R + r) × micro_batch_size on. Source: Megatron-LM, megatron/training/datasets/data_samplers.py
(MegatronPretrainingSampler); positions and masks: megatron/core/datasets/gpt_dataset.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError

IGNORED = -100  # the label of what is not trained, as torch's cross_entropy has it
Arrays = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]
"""tokens, labels, positions, documents, as in Batch."""


class SampleSource(Protocol):
    """What Samples and Blend have in common."""

    seq_length: int

    def __getitem__(self, i: int) -> NDArray[np.int64]: ...

    def source(self, i: int) -> str: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank, made on the CPU; every tensor is (B, S).

    tokens (int64): inputs. labels (int64): the token that follows each, IGNORED where it is not trained.
    positions (int32): from 0, and from 0 again in each document when documents are kept apart.
    documents (int32): number of the document inside its row, from 0; all 0 when they are not kept apart.
    cursor: samples consumed before this step, the same in all its micro-batches and on all ranks.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    cursor: int

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tokens, labels, positions, documents = (
            part.to(device, non_blocking=True) for part in (self.tokens, self.labels, self.positions, self.documents)
        )
        return Batch(tokens, labels, positions, documents, self.cursor)


class Batches:
    """The batches of one data rank.

    document_mask: keep documents apart; one ends with `eod`, which still belongs to it. mask_eod_loss: do not train
    what follows `eod` (Megatron's --eod-mask-loss: the next document's first token cannot be known).
    Raises UserError when the global batch does not divide over ranks and micro-batches.
    """

    def __init__(
        self,
        samples: SampleSource,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        document_mask: bool = False,
        eod: int | None = None,
        mask_eod_loss: bool = False,
    ):
        unit = micro_batch_size * data_size
        assert 0 <= data_rank < data_size
        if global_batch_size % unit:
            raise UserError(
                f"global_batch_size={global_batch_size} is not a multiple of {data_size} data ranks × micro_batch_size "
                f"{micro_batch_size} = {unit}; {-(-global_batch_size // unit) * unit} would be",
                2,
            )
        if eod is None and (document_mask or mask_eod_loss):
            option = "document_mask" if document_mask else "mask_eod_loss"
            raise UserError(f"data.{option} needs the id of the end-of-document token; set data.eod", 2)
        self.samples, self.global_batch_size, self.micro_batch_size = samples, global_batch_size, micro_batch_size
        self.data_rank, self.data_size = data_rank, data_size
        self.document_mask, self.eod, self.mask_eod_loss = document_mask, eod, mask_eod_loss
        self._vocab_size: int | None = None

    @property
    def seq_length(self) -> int:
        return self.samples.seq_length

    @property
    def fingerprint(self) -> str:
        """Changes when any sample could; the same on all ranks and layouts. Worth a place in each checkpoint."""
        return self.samples.fingerprint

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def sample_numbers(self, cursor: int) -> list[list[int]]:
        """Absolute sample numbers this rank reads in the step at `cursor`: one list a micro-batch."""
        firsts = (
            cursor + (m * self.data_size + self.data_rank) * self.micro_batch_size for m in range(self.micro_batches)
        )
        return [list(range(first, first + self.micro_batch_size)) for first in firsts]

    def step(self, cursor: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins at sample `cursor`; the same whenever it is asked."""
        return [self._batch(numbers, cursor) for numbers in self.sample_numbers(cursor)]

    def _batch(self, numbers: list[int], cursor: int) -> Batch:
        tokens, labels, positions, documents = map(torch.from_numpy, self._arrays(numbers))
        return Batch(tokens, labels, positions, documents, cursor)

    def _arrays(self, numbers: list[int]) -> Arrays:
        """What the samples of one micro-batch are, each array (B, S)."""
        samples = np.stack([self.samples[i] for i in numbers])
        self._check_ids(samples, numbers)
        tokens, labels = samples[:, :-1].copy(), samples[:, 1:].copy()
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        documents = np.zeros(tokens.shape, np.int32)
        if self.mask_eod_loss:
            labels[tokens == self.eod] = IGNORED
        if self.document_mask:
            begins = np.zeros(tokens.shape, bool)
            begins[:, 1:] = tokens[:, :-1] == self.eod
            documents = np.cumsum(begins, axis=1, dtype=np.int32)
            positions = positions - np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
        return tokens, labels, positions, documents

    def check_vocabulary(self, vocab_size: int) -> None:
        """From now on refuse ids outside 0..vocab_size - 1 when a batch is read; the first sample is looked at now.

        On a GPU such an id is an assertion deep inside the embedding that names neither file nor id. A look at the
        maximum costs microseconds a batch. Raises UserError that names the file, the ids and the remedy.
        """
        self._vocab_size = vocab_size
        first = self.sample_numbers(0)[0][:1]
        self._check_ids(self.samples[first[0]][None], first)

    def _check_ids(self, samples: NDArray[np.int64], numbers: list[int]) -> None:
        if self._vocab_size is None or (samples.max() < self._vocab_size and samples.min() >= 0):
            return
        low, high = samples.min(axis=1), samples.max(axis=1)
        row = int(np.flatnonzero((high >= self._vocab_size) | (low < 0))[0])
        wrong = int(low[row] if low[row] < 0 else high[row])
        raise UserError(
            f"{self.samples.source(numbers[row])} holds token id {wrong} (sample {numbers[row]}), but the model's "
            f"ids are 0..{self._vocab_size - 1}; set model.vocab_size to the tokenizer's size, or tokenize again with "
            f"the model's tokenizer: herd prep tokenize"
        )

    def prefetch(self, cursor_start: int, depth: int = 2) -> Generator[list[Batch], None, None]:
        """step(cursor_start), step(cursor_start + global_batch_size), … without end, read ahead by a thread.

        At most `depth` steps wait, and one more is being read. What the thread raises is raised here, after the steps
        before it. Closing or dropping the generator ends the thread.
        """
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, depth))
        stop = threading.Event()
        reader = threading.Thread(
            target=self._read_ahead, args=(cursor_start, ready, stop), daemon=True, name="batches"
        )
        reader.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while not ready.empty():  # a reader that waits for room must wake to see the stop
                ready.get_nowait()
            reader.join(timeout=5)  # a stalled disk must not hold up a stop; the thread is a daemon

    def _read_ahead(self, cursor: int, ready: queue.Queue[list[Batch] | BaseException], stop: threading.Event) -> None:
        """Fill `ready` step by step until `stop` is set or an exception has been handed over."""
        while not stop.is_set():
            item: list[Batch] | BaseException
            try:
                item = self.step(cursor)
            except BaseException as error:
                item = error
            ready.put(item)
            if isinstance(item, BaseException):
                return
            cursor += self.global_batch_size
