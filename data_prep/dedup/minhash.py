"""MinHash signatures and LSH bands.

One permutation hashing (Li, Owen, Zhang 2012): each shingle falls into one of k bins, and each bin keeps its smallest
hash; one pass over the shingles where k permutations need k. A bin that stays empty takes another's value, tried in an
order fixed for each bin (Shrivastava 2017, "Optimal Densification"), so two documents agree in a bin with probability
J, their Jaccard similarity, however short they are. They share one of b bands of r rows with probability
1 - (1 - J**r)**b.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.shingles import MULTIPLIER, U64, mix

EMPTY = np.uint32(0xFFFFFFFF)
RANDOM_PROBES = 32  # then the bins in turn, which ends for certain
MOST_BANDS = 32


def share_band(jaccard: float, bands: int, rows: int) -> float:
    """The probability that a pair of this similarity shares a band."""
    return 1 - (1 - jaccard**rows) ** bands


def bands_for(threshold: float, recall: float) -> tuple[int, int]:
    """(bands, rows): the most rows, so the fewest false candidates, with which a pair exactly at the threshold is found
    with probability `recall` by at most 32 bands."""
    best = (1, 1)
    for rows in range(1, 17):
        miss = 1 - threshold**rows
        bands = 1 if miss <= 0 else max(1, math.ceil(math.log(1 - recall) / math.log(miss) - 1e-9))
        if rows == 1 or bands <= MOST_BANDS:
            best = (bands, rows)
    return best


@cache
def _probes(bins: int) -> NDArray[np.int64]:
    """(probes, bins): which bin an empty bin looks into at its first, second, ... try."""
    index = np.arange(RANDOM_PROBES * bins, dtype=np.uint64) + np.uint64(1)
    random = (mix(index * MULTIPLIER) >> np.uint64(32)) % np.uint64(bins)
    turn = (np.arange(bins)[None, :] + np.arange(1, bins)[:, None]) % bins
    return np.concatenate([random.astype(np.int64).reshape(RANDOM_PROBES, bins), turn])


def signatures(shingles: U64, counts: NDArray[np.int64], bins: int) -> NDArray[np.uint32]:
    """(documents, bins) of the documents' shingles end to end, `counts` of each; all EMPTY for one without any."""
    documents = len(counts)
    found = np.full(documents * bins, EMPTY, dtype=np.uint32)
    cell = ((shingles >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)).astype(np.int64)
    cell += np.repeat(np.arange(documents, dtype=np.int64) * bins, counts)
    np.minimum.at(found, cell, shingles.astype(np.uint32))  # the low half; the high half has chosen the bin
    empty = np.flatnonzero((found == EMPTY) & np.repeat(counts > 0, bins))
    filled = found.copy()
    for probe in _probes(bins):
        if not empty.size:
            break
        bin_of = empty % bins
        value = found[empty - bin_of + probe[bin_of]]
        hit = value != EMPTY
        filled[empty[hit]] = value[hit]
        empty = empty[~hit]
    return filled.reshape(documents, bins)


def band_hashes(signature: NDArray[np.uint32], bands: int, rows: int) -> U64:
    """(documents, bands) 64-bit hashes; equal hashes mean equal rows of the same band."""
    cells = signature[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), cells.shape[:2]).copy()
    for row in range(rows):
        hashes *= MULTIPLIER
        hashes += cells[:, :, row]
        hashes ^= hashes >> np.uint64(31)
    return mix(hashes)
