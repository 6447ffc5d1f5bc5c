"""The blend's order: the same integers as megatron-core, whatever the weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from llama.data.blend import Blend, lay_out, normalized, source_sizes
from llama.data.samples import Samples

WEIGHTS = {
    "one": [1.0],
    "halves": [1.0, 1.0],
    "thirds": [1.0] * 3,
    "whole_numbers": [30, 20, 50],
    "tenths": [0.1, 0.2, 0.3, 0.4],
    "tiny_beside_large": [1.0, 1e-5, 1e-3, 0.3, 2e-6],
    "forty": (1 / np.arange(1, 41)).tolist(),
}


def reference(megatron: SimpleNamespace, shares: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    source, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    megatron.helpers.build_blending_indices(source, sample, shares, len(shares), size, False)
    return source, sample


@pytest.mark.parametrize("size", [1, 255, 1024, 1025, 50_003])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_sources_are_taken_in_the_cpp_helpers_order(megatron: SimpleNamespace, weights: list[float], size: int) -> None:
    shares = normalized(weights)
    source, sample = reference(megatron, shares, size)
    ours, given_before = lay_out(shares, size)
    np.testing.assert_array_equal(ours, source)
    np.testing.assert_array_equal(given_before[-1], np.bincount(source, minlength=len(shares)))
    for block in range(0, size, 1024):
        assert given_before[block // 1024, source[block]] == sample[block]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=st.lists(st.floats(1e-6, 100), min_size=1, max_size=12), size=st.integers(1, 6000))
def test_any_weights_give_the_cpp_helpers_order(megatron: SimpleNamespace, weights: list[float], size: int) -> None:
    shares = normalized(weights)
    np.testing.assert_array_equal(lay_out(shares, size)[0], reference(megatron, shares, size)[0])


@pytest.mark.parametrize("num_samples", [3, 100, 2500])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [5, 1, 1], [0.2, 0.4, 0.05]], ids=str)
def test_a_blend_gives_the_samples_of_megatrons_builder(
    token_file: Callable[..., str], megatron: SimpleNamespace, weights: list[float], num_samples: int
) -> None:
    prefixes = [token_file([40 + 7 * k] * (60 + k), f"source{k}") for k in range(len(weights))]
    theirs = megatron.build(
        (num_samples, 10, 0), random_seed=9, sequence_length=32, blend=(prefixes, weights), split="90,10,0"
    )[0]
    sizes = source_sizes(weights, num_samples)[1]
    parts = []
    for prefix, size in zip(prefixes, sizes, strict=True):
        dataset = IndexedDataset(prefix)
        parts.append(Samples(dataset, (0, round(0.9 * len(dataset))), 32, size, 9))
    ours = Blend(parts, weights, num_samples)
    assert ours.period == len(theirs) >= num_samples
    assert [ours.locate(i) for i in range(ours.period)] == list(
        zip(theirs.dataset_index.tolist(), theirs.dataset_sample_index.tolist(), strict=True)
    )
    for i in {0, 1, num_samples - 1, ours.period - 1}:
        np.testing.assert_array_equal(ours[i][1:], theirs[i]["labels"].numpy())
        assert ours.source(i) == prefixes[theirs.dataset_index[i]]


def test_past_its_end_the_pattern_repeats_and_each_source_goes_on(token_file: Callable[..., str]) -> None:
    parts = [Samples(IndexedDataset(token_file([40] * 60, name)), (0, 60), 32, 80, 9) for name in ("a", "b")]
    blend = Blend(parts, [1, 3], 100)
    seen: list[int] = [0, 0]
    for i in range(3 * blend.period):
        source, sample = blend.locate(i)
        assert sample == seen[source]
        seen[source] += 1
    assert seen == [75, 225]
    assert blend.fingerprint != Blend(parts, [1, 2], 100).fingerprint
    assert blend[250].shape == (33,)


def test_a_million_samples_are_laid_out_in_seconds() -> None:
    start = time.perf_counter()
    lay_out(normalized([0.5, 0.3, 0.15, 0.05]), 1_000_000)
    assert time.perf_counter() - start < 5  # 0.07 s on the two shared cores this was written on


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_make_no_blend_are_refused(token_file: Callable[..., str], weights: list[float]) -> None:
    parts = [Samples(IndexedDataset(token_file([40] * 60, name)), (0, 60), 32, 80, 9) for name in ("a", "b")]
    with pytest.raises(UserError, match="one positive weight a source"):
        Blend(parts, weights, 10)
