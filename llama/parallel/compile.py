"""torch.compile of each block: the blocks are alike, so one graph serves them all."""

from __future__ import annotations

import torch

from llama.model.llama import Llama


def compile_blocks(model: Llama, backend: str) -> None:
    """Compile the blocks' forward in place; hooks of FSDP and tensor parallelism on the block itself stay outside."""
    # One code object serves every block of every stage; the limit guards against shapes that keep changing.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 32)
    for block in model.layers.values():
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
