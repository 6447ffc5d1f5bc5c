"""Several token files in given proportions, in the very order of Megatron's BlendedDataset.

Megatron goes sample by sample and takes the source that lags furthest behind its share. Source: Megatron-LM,
megatron/core/datasets/{blended_dataset,blended_megatron_dataset_builder}.py and helpers.cpp (core 0.16.1); tests
compare both index arrays. That loop is sequential; `lay_out` runs it in parallel and still gets the same integers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from llama.data.samples import Samples

SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus: each source lays out half a percent more than its share
BLOCK = 1024  # samples of one block; a lookup counts inside one block, so it costs microseconds
WARM_UP = 256


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in double precision as numpy adds them: their last bits decide ties."""
    array = np.array(weights, dtype=np.float64)
    shares: list[float] = (array / np.sum(array)).tolist()
    return shares


def source_sizes(weights: Sequence[float], num_samples: int) -> tuple[list[int], list[int]]:
    """Samples each source shall give of `num_samples`, and samples it lays out to be sure (Megatron's surplus).

    The blend's length is the sum of the first list: rounding up makes it a little more than num_samples.
    """
    targets = [math.ceil(num_samples * share) for share in normalized(weights)]
    return targets, [math.ceil(target * (1 + SURPLUS)) for target in targets]


def lay_out(shares: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which source gives each of `size` samples: int16 (size,), and how many each gave before each block of BLOCK
    samples: int64 (blocks + 1, sources); the last row holds the totals.

    At sample n the rule takes the source with the largest share × max(n, 1) − given, the first one on a tie.
    All blocks run side by side, each from a guessed state that WARM_UP samples bring close to the true one: with equal
    sums, the distance of two states never grows under the rule. Then each block's start is compared with the end of
    the one before, and those that differ are run again from there, until all agree. The first differing block is
    always set right, so this ends; and what agrees everywhere is the sequential result, to the last tie.
    """
    share = np.array(shares, dtype=np.float64)
    blocks = -(-size // BLOCK)
    starts = np.arange(blocks, dtype=np.int64) * BLOCK
    choice = np.empty((blocks, BLOCK), np.int16)
    early = np.maximum(starts - WARM_UP, 0)
    state = _guess(share, early)
    warm = np.arange(blocks) >= -(-WARM_UP // BLOCK)  # block 0 starts from nothing given, which is known
    ends = state.copy()
    ends[warm] = _advance(share, early[warm], state[warm], WARM_UP, None)
    state, dirty = ends.copy(), np.arange(blocks)
    while dirty.size:
        part = choice[dirty]
        ends[dirty] = _advance(share, starts[dirty], state[dirty], BLOCK, part)
        choice[dirty] = part
        dirty = 1 + np.flatnonzero((ends[:-1] != state[1:]).any(axis=1))
        state[dirty] = ends[dirty - 1]
    flat = choice.reshape(-1)[:size]
    given = np.zeros((blocks + 1, len(share)), np.int64)
    given[:blocks] = state
    if blocks:
        given[blocks] = given[blocks - 1] + np.bincount(flat[starts[-1] :], minlength=len(share))
    return flat, given


def _guess(share: NDArray[np.float64], at: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each source may have given before samples `at`: shares rounded so that rows add up, (len(at), sources)."""
    exact = share * at[:, None]
    floor = np.floor(exact)
    missing = at - floor.sum(axis=1)
    rank = np.argsort(np.argsort(floor - exact, axis=1, kind="stable"), axis=1)  # 0: the largest remainder
    return floor + (rank < missing[:, None])


def _advance(
    share: NDArray[np.float64],
    at: NDArray[np.int64],
    state: NDArray[np.float64],
    steps: int,
    choice: NDArray[np.int16] | None,
) -> NDArray[np.float64]:
    """Apply the rule `steps` times to each row of state, from samples `at` on, noting each choice; the states after."""
    given = state.copy()  # float64 counts are exact up to 2**53
    rows = np.arange(len(at))
    error = np.empty_like(given)
    for step in range(steps):
        # Two roundings, product then difference, as the x86 build of the C++ helper has them.
        np.multiply(share, np.maximum(at + step, 1).astype(np.float64)[:, None], out=error)
        error -= given
        taken = error.argmax(axis=1)  # the first of equals
        given[rows, taken] += 1
        if choice is not None:
            choice[:, step] = taken
    return given


class Blend:
    """Sample i of a weighted blend of sources, for any i ≥ 0.

    parts: the sources, each laid out for its entry of source_sizes(...)[1]; weights: as given in the recipe.
    After `period` samples the pattern of sources repeats, and each source goes on where it stood.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float], num_samples: int):
        if len(parts) != len(weights) or not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"a blend needs one positive weight a source; found {list(weights)} for {len(parts)}", 2)
        if len(parts) >= 32767:
            raise UserError(f"{len(parts)} sources are more than a blend can hold; herd prep merge joins files", 2)
        self.parts, self.num_samples, self.seq_length = tuple(parts), num_samples, parts[0].seq_length
        # Megatron's builder divides by the sum, and its BlendedDataset once more: that may move the last bit.
        self.shares = normalized(normalized(weights))
        self.period = sum(source_sizes(weights, num_samples)[0])
        self._choice, self._given = lay_out(self.shares, self.period)

    def locate(self, i: int) -> tuple[int, int]:
        """(source, sample of that source) for sample i."""
        if i < 0:
            raise IndexError(f"sample {i}: samples are counted from 0")
        repeat, inside = divmod(int(i), self.period)
        source, block = int(self._choice[inside]), inside // BLOCK
        before = int(np.count_nonzero(self._choice[block * BLOCK : inside] == source))
        return source, repeat * int(self._given[-1, source]) + int(self._given[block, source]) + before

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        """Token ids of sample i: int64 (seq_length + 1,)."""
        source, sample = self.locate(i)
        return self.parts[source][sample]

    def source(self, i: int) -> str:
        """The token file that sample i comes from, for messages."""
        part, sample = self.locate(i)
        return self.parts[part].source(sample)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change when any sample could."""
        facts = [[part.fingerprint for part in self.parts], self.shares, self.period]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
