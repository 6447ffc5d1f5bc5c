"""Rotary position embedding (Su et al. 2021), with Llama 3.1's frequency scaling (Llama 3 paper, section 3.4).

Real-valued, in the half-split convention of Hugging Face: element i turns with element i + H/2. Weights need no permutation.
"""

from __future__ import annotations

import math

import torch

from llama.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> torch.Tensor:
    """Radians per token of each pair, fp32, shape (head_dim/2,)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (steps / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, blended, stretched)


def rotation(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each position's angles, fp32, shapes (B, S, 1, head_dim/2), from positions (B, S)."""
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of x (B, S, heads, head_dim) by its position's angle; in fp32 or more, returned in x's type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
