"""Series whose statistics are known."""

from __future__ import annotations

import numpy as np

from llama.compare.statistics import Series


def wandering(points: int, memory: float, seed: int) -> Series:
    """A series of variance 1 in which each point keeps `memory` of the one before (AR(1))."""
    random = np.random.default_rng(seed)
    shocks = random.normal(size=points) * np.sqrt(1 - memory**2)
    out = np.empty(points)
    out[0] = random.normal()
    for i in range(1, points):
        out[i] = memory * out[i - 1] + shocks[i]
    return out
