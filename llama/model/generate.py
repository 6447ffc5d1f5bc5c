"""Continue a sequence of tokens: greedy, or sampled with temperature and top-p (Holtzman et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from llama.model.attention import KeyValueCache
from llama.model.llama import Llama


def _pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
    # Keep the smallest set whose mass reaches top_p: drop an id when those before it already do.
    probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Llama,
    prompt: Sequence[int],
    max_tokens: int,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `max_tokens` ids after `prompt`, ending before an id in `stop` or at the model's max_position."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    caches = [KeyValueCache() for _ in model.layers]
    feed, seen = torch.tensor([list(prompt)], device=device), 0
    for _ in range(min(max_tokens, model.config.max_position - len(prompt))):
        positions = torch.arange(seen, seen + feed.shape[1], dtype=torch.int32, device=device)[None]
        logits = model(feed, positions, caches=caches)[0, -1]
        seen += feed.shape[1]
        token = _pick(logits, temperature, top_p, generator)
        if token in stop:
            return
        yield token
        feed = torch.tensor([[token]], device=device)
