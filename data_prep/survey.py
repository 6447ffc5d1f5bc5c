"""How long the sequences of a token file are, in one pass of bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 22
EXACT = 1 << 16  # lengths counted one by one; longer ones in STEPS to each doubling, so within one percent
STEPS = 64
OCTAVES = 33  # lengths 0, 1, 2-3, 4-7, … up to what 31 bits hold


@dataclass(frozen=True)
class Lengths:
    """What is known of all lengths. octaves: how many are 0, 1, 2-3, 4-7, … long."""

    count: int
    tokens: int
    shortest: int
    longest: int
    octaves: NDArray[np.int64]
    _keys: NDArray[np.int64]

    def quantile(self, share: float) -> int:
        """The length that this share of the sequences does not exceed; 0 where there is none."""
        if not self.count:
            return 0
        rank = max(1, int(np.ceil(share * self.count)))
        key = int(np.searchsorted(np.cumsum(self._keys), rank))
        length = key if key < EXACT else int(EXACT * 2 ** ((key - EXACT) / STEPS))
        return min(max(length, self.shortest), self.longest)

    def facts(self) -> dict[str, Any]:
        quartiles = {name: self.quantile(share) for name, share in (("p25", 0.25), ("median", 0.5), ("p75", 0.75))}
        mean = round(self.tokens / max(1, self.count), 1)
        return {"min": self.shortest, "mean": mean, **quartiles, "p99": self.quantile(0.99), "max": self.longest}

    def bins(self) -> list[tuple[int, int, int]]:
        """(first, last, how many) of each octave from the shortest to the longest."""
        filled = np.flatnonzero(self.octaves)
        if not filled.size:
            return []
        borders = [0, *(1 << octave for octave in range(OCTAVES))]
        return [
            (borders[octave], borders[octave + 1] - 1, int(self.octaves[octave]))
            for octave in range(int(filled[0]), int(filled[-1]) + 1)
        ]


def survey_lengths(lengths: NDArray[np.int32]) -> Lengths:
    """Count all lengths, a chunk at a time."""
    octaves, keys = np.zeros(OCTAVES, np.int64), np.zeros(EXACT + 16 * STEPS, np.int64)
    tokens, shortest, longest = 0, np.iinfo(np.int32).max, 0
    for start in range(0, len(lengths), CHUNK):
        part = np.array(lengths[start : start + CHUNK])  # aligned
        tokens += int(part.sum(dtype=np.int64))
        shortest, longest = min(shortest, int(part.min())), max(longest, int(part.max()))
        octaves += np.bincount(np.frexp(part.astype(np.float64))[1], minlength=OCTAVES)
        short, long = part[part < EXACT], part[part >= EXACT]
        keys[:EXACT] += np.bincount(short, minlength=EXACT)
        steps = np.floor(STEPS * np.log2(long / EXACT)).astype(np.int64)
        keys[EXACT:] += np.bincount(steps, minlength=len(keys) - EXACT)
    return Lengths(len(lengths), tokens, shortest if len(lengths) else 0, longest, octaves, keys)


def bars(lengths: Lengths, width: int = 40) -> list[str]:
    """A line for each octave: lengths, how many, a bar of eighths of a character."""
    rows = lengths.bins()
    most = max((count for _, _, count in rows), default=1)
    lines = []
    for first, last, count in rows:
        eighths = -(-count * width * 8 // most)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        lines.append(f"{f'{first:,}–{last:,}' if first < last else str(first):>27} {count:>15,} {bar}".rstrip())
    return lines


def draw(lengths: Lengths, path: str | Path, title: str) -> None:
    """The same as a picture; raises OSError and ValueError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = lengths.bins()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.bar(range(len(rows)), [count for _, _, count in rows], width=0.95, color="#3b6ea5")
    axes.set_xticks(range(len(rows)), [f"{first:,}" for first, _, _ in rows], rotation=45, ha="right")
    axes.set(xlabel="tokens, from here to twice as many", ylabel="sequences", title=title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
