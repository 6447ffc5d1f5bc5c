"""torch's attention over sequences end to end (torch.nn.attention.varlen), whose arguments differ between versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
TAKES = (torch.bfloat16, torch.float16)  # what flash attention computes in


@cache
def kernel() -> Attend | None:
    """Causal attention inside each sequence; None where this torch has no such kernel.

    (q (T, H, head_dim), k and v (T, K, head_dim), ends (N + 1) int32 from 0 to T, longest) to (T, H, head_dim).
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )  # the former from 2.11 on
    shares: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}  # from 2.12 on

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        if not shares and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, ends, ends, longest, longest, **causal, **shares)
        assert isinstance(out, torch.Tensor)
        return out

    return attend
