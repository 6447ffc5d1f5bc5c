"""Initial weights as a pure function of (seed, parameter name): every layout and every device starts from the same.

A parameter is drawn in blocks of rows, each from its own counter-based stream (Philox, Salmon et al. 2011), so a rank
draws only the rows of its shard.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from llama.config import Model

BLOCK = 1 << 18
"""Elements drawn from one stream; changing it changes every initial weight."""


def standard_deviation(name: str, config: Model) -> float | None:
    """Of the parameter's initial weights; None for norms, which start at one."""
    if "norm" in name:
        return None
    if config.scaled_residual_init and name.endswith(("attention.o.weight", "mlp.down.weight")):
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std


def _draw(seed: int, name: str, block: int, size: int) -> np.ndarray:
    key = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).standard_normal(
        size, dtype=np.float32
    )


def initial_rows(name: str, config: Model, seed: int, start: int, stop: int, width: int) -> torch.Tensor:
    """Rows [start, stop) of a matrix `width` wide, fp32; for a norm (width 1) its elements.

    `name` is the parameter's name in the whole model. A tied output is drawn as the embedding, whose weights it shares;
    rows past the tokenizer's vocabulary are zero.
    """
    if config.tie_embeddings and name == "head.weight":
        name = "embed.weight"
    std = standard_deviation(name, config)
    if std is None:
        return torch.ones(stop - start, width)
    rows = max(1, BLOCK // width)
    out = np.empty((stop - start, width), dtype=np.float32)
    for block in range(start // rows, -(-stop // rows)):
        values = _draw(seed, name, block, rows * width).reshape(rows, width)
        low, high = max(start, block * rows), min(stop, (block + 1) * rows)
        out[low - start : high - start] = values[low - block * rows : high - block * rows]
    if name in ("embed.weight", "head.weight") and stop > config.vocab_size:
        out[max(0, config.vocab_size - start) :] = 0
    return torch.from_numpy(out).mul_(std)
