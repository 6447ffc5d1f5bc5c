"""The order of samples: the same integers as megatron-core, a pure function of the index, clear errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama.data.samples as samples_module
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from llama.data.samples import Samples, cut_samples, split_ranges

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# seq 64: lengths sum to about 60 000 tokens, hence about 930 samples an epoch
@pytest.mark.parametrize("num_samples", [1, 500, 930, 1000, 1900, 4200], ids=lambda n: f"{n}_samples")
@pytest.mark.parametrize("seed", [1234, 7])
def test_samples_come_in_megatrons_order(
    token_file: Callable[..., str], megatron: SimpleNamespace, num_samples: int, seed: int
) -> None:
    lengths = np.random.default_rng(3).integers(0, 400, 300)
    prefix = token_file(lengths)
    theirs = megatron.build(
        (num_samples, 7, 3), random_seed=seed, sequence_length=64, blend=([prefix], None), split="900,60,40"
    )
    dataset = IndexedDataset(prefix)
    for part, want, their in zip(split_ranges("900,60,40", len(dataset)), (num_samples, 7, 3), theirs, strict=True):
        ours = Samples(dataset, part, 64, want, seed)
        order = ours.order()
        np.testing.assert_array_equal(order.documents, their.document_index)
        np.testing.assert_array_equal(order.cuts, their.sample_index)
        assert order.cuts.dtype == their.sample_index.dtype
        np.testing.assert_array_equal(order.shuffle, their.shuffle_index)
        for i in {0, want - 1, want // 2, ours.period - 1}:
            batch = their[i]
            np.testing.assert_array_equal(ours[i][:-1], batch["tokens"].numpy())
            np.testing.assert_array_equal(ours[i][1:], batch["labels"].numpy())


@QUICK
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=60).filter(lambda x: sum(x) > 20),
    seq_length=st.integers(2, 19),
    num_samples=st.integers(1, 300),
    chunk=st.sampled_from([1, 3, 1 << 22]),
)
def test_cuts_equal_the_cpp_helper_for_any_lengths(
    megatron: SimpleNamespace, lengths: list[int], seq_length: int, num_samples: int, chunk: int
) -> None:
    sizes, total = np.array(lengths, np.int32), sum(lengths)
    epochs = max(1, -(-(num_samples * seq_length + 1) // total))
    order = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    np.random.RandomState(1).shuffle(order)
    theirs = megatron.helpers.build_sample_idx(sizes, order, seq_length, epochs, total)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "CHUNK", chunk)
        ours = cut_samples(sizes, order, seq_length, (epochs * total - 1) // seq_length)
    np.testing.assert_array_equal(ours, theirs)


@QUICK
@given(
    shares=st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda x: x[0] > 0.01),
    count=st.integers(1, 10**8),
)
def test_split_ranges_are_megatrons(megatron: SimpleNamespace, shares: list[float], count: int) -> None:
    text = ",".join(f"{share:.6f}" for share in shares)
    matrix = megatron.config(random_seed=1, sequence_length=8, blend=(["x"], None), split=text).split_matrix
    for ours, theirs in zip(split_ranges(text, count), matrix, strict=True):
        if theirs is None:
            assert ours[0] == ours[1]
        else:
            assert ours == (round(theirs[0] * float(count)), round(theirs[1] * float(count)))


def test_one_epoch_when_no_number_is_given(token_file: Callable[..., str], megatron: SimpleNamespace) -> None:
    prefix = token_file([50] * 40)
    (their, _, _) = megatron.build(
        (None, None, None), random_seed=5, sequence_length=16, blend=([prefix], None), split="1"
    )
    ours = Samples(IndexedDataset(prefix), (0, 40), 16, None, 5)
    assert ours.num_samples == ours.period == len(their) == (50 * 40 - 1) // 16
    np.testing.assert_array_equal(ours[7][:-1], their[7]["tokens"].numpy())


def test_the_order_goes_on_past_its_end_with_the_next_seed(token_file: Callable[..., str]) -> None:
    dataset = IndexedDataset(token_file([30] * 20))
    first, second = (Samples(dataset, (0, 20), 8, 60, seed) for seed in (11, 12))
    assert first.period >= 60
    for i in (0, 5, first.period - 1):
        np.testing.assert_array_equal(first[first.period + i], second[i])
    again = Samples(dataset, (0, 20), 8, 60, 11)  # asked in another order, and across three blocks
    for i in (3 * first.period, 0, first.period, 2):
        np.testing.assert_array_equal(again[i], first[i])


def test_every_token_of_an_epoch_is_read_once(token_file: Callable[..., str]) -> None:
    dataset = IndexedDataset(token_file([13, 0, 1, 40, 7, 22, 0, 18]))
    samples = Samples(dataset, (0, len(dataset)), 10, None, 3)
    stream = np.concatenate([dataset[int(d)] for d in samples.order().documents])
    read = sorted(tuple(samples[i]) for i in range(samples.period))
    assert read == sorted(tuple(stream[k * 10 : k * 10 + 11]) for k in range(samples.period))


def test_a_fingerprint_names_what_decides_the_samples_and_not_the_path(token_file: Callable[..., str]) -> None:
    one, two = (IndexedDataset(token_file([30] * 20, name)) for name in ("a", "b"))
    base = Samples(one, (0, 20), 8, 60, 11).fingerprint
    assert base == Samples(two, (0, 20), 8, 60, 11).fingerprint == pickle.loads(pickle.dumps(base))
    others = [
        Samples(one, (0, 19), 8, 60, 11), Samples(one, (0, 20), 9, 60, 11), Samples(one, (0, 20), 8, 61, 11),
        Samples(one, (0, 20), 8, 60, 12), Samples(IndexedDataset(token_file([31] * 20, "c")), (0, 20), 8, 60, 11),
    ]  # fmt: skip
    assert len({base, *(other.fingerprint for other in others)}) == 6


def test_too_few_tokens_for_one_sample_is_one_clear_line(token_file: Callable[..., str]) -> None:
    dataset = IndexedDataset(token_file([4, 4]))
    with pytest.raises(
        UserError, match=r"text: sequences 0\.\.2 hold 8 tokens, fewer than the 9 of one sample; use more"
    ):
        Samples(dataset, (0, 2), 8, 10, 1)
    assert Samples(dataset, (0, 2), 7, 10, 1)[25].shape == (8,)


@pytest.mark.parametrize("split", ["", "a,b", "0,0", "1,2,3,4", "-1,2", "nan"])
def test_a_senseless_split_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="is not up to three shares"):
        split_ranges(split, 10)
