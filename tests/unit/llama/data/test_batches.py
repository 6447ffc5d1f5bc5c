"""Batches: Megatron's slice of samples for each rank, its labels, positions and masks; read ahead without surprises."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from llama.data.batches import IGNORED, Batches
from llama.data.samples import Samples

EOD = 0


class Counting:
    """Sample i is i × 10 … i × 10 + seq_length; reading sample `fails_at` raises."""

    seq_length = 4
    fingerprint = "counting"

    def __init__(self, fails_at: int = -1):
        self.fails_at = fails_at
        self.read: list[int] = []

    def __getitem__(self, i: int) -> Any:
        if i == self.fails_at:
            raise UserError(f"sample {i} is gone")
        self.read.append(i)
        return np.arange(i * 10, i * 10 + 5, dtype=np.int64)

    def source(self, i: int) -> str:
        return "counted"


def sampler_of_megatron(consumed: int, micro: int, rank: int, size: int, count: int) -> list[list[int]]:
    """MegatronPretrainingSampler in words: fill micro × ranks samples, hand each rank its stretch, begin again."""
    unit = micro * size
    return [[consumed + m * unit + rank * micro + k for k in range(micro)] for m in range(count)]


@pytest.mark.parametrize(("micro", "size"), [(1, 1), (2, 1), (1, 4), (2, 3), (4, 2)])
def test_each_rank_reads_megatrons_samples(micro: int, size: int) -> None:
    for rank in range(size):
        batches = Batches(Counting(), 24, micro, rank, size)
        numbers = batches.sample_numbers(48)
        assert numbers == sampler_of_megatron(48, micro, rank, size, 24 // (micro * size))
        step = batches.step(48)
        assert len(step) == batches.micro_batches == 24 // (micro * size)
        assert [[int(x) // 10 for x in batch.tokens[:, 0]] for batch in step] == numbers
        assert {batch.cursor for batch in step} == {48}


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_step_reads_the_same_samples_whatever_the_layout(size: int) -> None:
    read = [i for rank in range(size) for m in Batches(Counting(), 12, 2, rank, size).sample_numbers(36) for i in m]
    assert sorted(read) == list(range(36, 48))


def test_shapes_and_types_are_the_ones_agreed() -> None:
    (batch,) = Batches(Counting(), 3, 3).step(0)
    for tensor, dtype in (
        (batch.tokens, torch.int64), (batch.labels, torch.int64),
        (batch.positions, torch.int32), (batch.documents, torch.int32),
    ):  # fmt: skip
        assert tensor.shape == (3, 4) and tensor.dtype == dtype and tensor.is_contiguous()
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 3 and not batch.documents.any()


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("mask_eod_loss", [False, True])
def test_positions_labels_and_masks_are_megatrons(
    token_file: Callable[..., str], megatron: SimpleNamespace, document_mask: bool, mask_eod_loss: bool
) -> None:
    prefix = token_file(np.random.default_rng(1).integers(1, 30, 200))
    their = megatron.build(
        (100, 0, 0), random_seed=3, sequence_length=64, blend=([prefix], None), split="1",
        reset_position_ids=document_mask, reset_attention_mask=document_mask,
        eod_mask_loss=mask_eod_loss, create_attention_mask=True,
    )[0]  # fmt: skip
    dataset = IndexedDataset(prefix)
    samples = Samples(dataset, (0, len(dataset)), 64, 100, 3)
    batches = Batches(samples, 4, 4, document_mask=document_mask, eod=EOD, mask_eod_loss=mask_eod_loss)
    for cursor in (0, 4, 96):
        (batch,) = batches.step(cursor)
        for row in range(4):
            want = their[cursor + row]
            trained = want["loss_mask"].bool()
            assert torch.equal(batch.tokens[row], want["tokens"])
            assert torch.equal(batch.labels[row], torch.where(trained, want["labels"], IGNORED))
            assert torch.equal(batch.positions[row].long(), want["position_ids"])
            document = batch.documents[row]
            seen = (document[:, None] == document[None, :]) & torch.ones(64, 64).tril().bool()
            assert torch.equal(~seen, want["attention_mask"][0])


def test_prefetch_gives_the_steps_in_order() -> None:
    batches = Batches(Counting(), 4, 2)
    ahead = batches.prefetch(8, depth=3)
    for k in range(20):
        got = next(ahead)
        assert [b.tokens.tolist() for b in got] == [b.tokens.tolist() for b in batches.step(8 + 4 * k)]
        assert got[0].cursor == 8 + 4 * k
    ahead.close()


def test_prefetch_reads_at_most_depth_and_one_steps_ahead_and_ends_when_closed() -> None:
    source = Counting()
    ahead = Batches(source, 4, 4).prefetch(0, depth=2)
    next(ahead)
    deadline = time.monotonic() + 5
    while len(source.read) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(source.read) == 16  # one taken, two waiting, one in hand
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
    assert len(source.read) <= 20


def test_prefetch_delivers_an_error_after_the_steps_before_it() -> None:
    ahead = Batches(Counting(fails_at=9), 4, 4).prefetch(0)
    assert [next(ahead)[0].cursor for _ in range(2)] == [0, 4]
    with pytest.raises(UserError, match="sample 9 is gone"):
        next(ahead)
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_ids_beyond_the_vocabulary_name_file_id_and_remedy(token_file: Callable[..., str]) -> None:
    dataset = IndexedDataset(token_file([50] * 40, vocab=600))
    batches = Batches(Samples(dataset, (0, 40), 16, 50, 1), 4, 4)
    batches.check_vocabulary(600)
    batches.step(0)
    message = (
        r"text holds token id \d+ \(sample 0\), but the model's ids are 0\.\.299; set model\.vocab_size .*tokenize"
    )
    with pytest.raises(UserError, match=message):
        batches.check_vocabulary(300)
    counted = Batches(Counting(), 4, 4)
    counted.check_vocabulary(20)  # the first sample ends with id 4; the second is read later, and refused then
    with pytest.raises(UserError, match=r"counted holds token id 24 \(sample 2\)"):
        counted.step(0)


def test_negative_ids_are_refused(token_file: Callable[..., str], tmp_path: Any) -> None:
    prefix = token_file([50] * 4, dtype=np.int32)
    np.memmap(f"{prefix}.bin", np.int32, "r+")[:] = -3
    batches = Batches(Samples(IndexedDataset(prefix), (0, 4), 16, 5, 1), 1, 1)
    with pytest.raises(UserError, match="holds token id -3"):
        batches.check_vocabulary(10)


def test_a_batch_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(
        UserError, match=r"global_batch_size=10 is not a multiple of 2 data ranks × .* 3 = 6; 12 would be"
    ):
        Batches(Counting(), 10, 3, 1, 2)


@pytest.mark.parametrize("option", ["document_mask", "mask_eod_loss"])
def test_masks_need_the_end_of_document_id(option: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{option} needs the id of the end-of-document token; set data\.eod"):
        Batches(Counting(), 1, 1, **{option: True})  # type: ignore[arg-type]
