"""Packing: nothing lost, nothing over, hardly any room left; the same for the same seed; samples by number alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat.packing import apart, pack


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(0, 9))
def test_each_example_is_in_one_sequence_and_none_is_too_full(lengths: list[int], seed: int) -> None:
    packs = pack(lengths, 50, seed)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in packs[k]) for k in range(len(packs))]
    assert all(0 < total <= 50 for total in sums)
    # Two sequences that would fit into one are never left (any-fit).
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > 50


def chat_lengths(count: int) -> np.ndarray:
    """Log-normal, mean about 1,040 tokens, as chat data have it."""
    return np.clip(np.random.default_rng(0).lognormal(6.6, 0.9, count), 8, 4096).astype(int)


def test_chat_data_fill_999_thousandths_of_a_hundred_thousand_examples_in_seconds() -> None:
    lengths, started = chat_lengths(100_000), time.perf_counter()
    packs = pack(lengths, 4096, 1)
    assert time.perf_counter() - started < 5
    assert lengths.sum() / (len(packs) * 4096) > 0.999


def test_the_seed_decides_and_nothing_else() -> None:
    lengths = chat_lengths(2000)
    first, again, other = pack(lengths, 4096, 1), pack(lengths, 4096, 1), pack(lengths, 4096, 2)
    assert (first.members == again.members).all() and (first.starts == again.starts).all()
    assert (first.members != other.members).any()


def test_what_does_not_fit_is_refused_and_apart_is_one_each() -> None:
    for wrong in ([0, 3], [51]):
        with pytest.raises(ValueError, match="do not fit"):
            pack(wrong, 50, 0)
    assert len(pack([], 50, 0)) == 0
    assert [apart([3, 4])[k].tolist() for k in range(2)] == [[0], [1]]
