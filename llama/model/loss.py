"""Output projection and cross-entropy in one, a few tokens at a time, so that the logits never exist whole.

The gradient of a chunk's logits is known as soon as its loss is (softmax minus one-hot), so forward computes both
parameter gradients on the spot and backward only scales them: no logits are kept and none are computed twice
(as in Liger Kernel's fused linear cross-entropy, Hsu et al. 2024). `Vocabulary` is where tensor parallelism steps in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Label of a token that is not trained."""
Note = tuple[torch.Tensor, torch.Tensor]
"""Of a chunk of tokens: loss in nats, 0 where not trained, and the id that is likeliest, the first of equals; (N,).
Untrained tokens that are skipped are left out."""


class Vocabulary:
    """How embedding and output rows are held: all of them here. llama/parallel/tensor.py shares them over ranks."""

    first_row = 0
    notes: list[Note] | None = None
    """Where a loss that is computed without gradients notes each chunk of tokens, when it is to."""

    def embed(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, S) ids to (B, S, D)."""
        return nn.functional.embedding(tokens, weight)

    def enter(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of every token and this rank's rows, as plain tensors."""
        return hidden, weight

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """Greatest over the ranks that share the vocabulary."""
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that share the vocabulary."""
        return x

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Columns of all ranks, in order."""
        return logits


class LowRank(NamedTuple):
    """What an adapter adds to the output projection: logits = ratio · (hidden · weightᵀ + narrow · lastᵀ)."""

    narrow: torch.Tensor
    """(N, r)"""
    last: torch.Tensor
    """(rows, r)"""
    ratio: torch.Tensor | None
    """(rows,); None: 1."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        narrow: torch.Tensor | None,
        last: torch.Tensor | None,
        ratio: torch.Tensor | None,
        labels: torch.Tensor,
        vocab_size: int,
        chunk: int,
        vocabulary: Vocabulary,
        skip_untrained: bool,
    ) -> torch.Tensor:
        rows = weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants = ctx.needs_input_grad[:5]
        given = (hidden, weight, narrow, last, ratio)
        # Gradients of what has a row a token are filled chunk by chunk, the others are summed over the chunks.
        types = (hidden.dtype, wide, hidden.dtype, wide, wide)
        grads = [
            torch.zeros(x.shape, dtype=dtype, device=x.device) if want and x is not None else None
            for x, want, dtype in zip(given, wants, types, strict=True)
        ]
        grad_hidden, grad_weight, grad_narrow, grad_last, grad_ratio = grads
        total = torch.zeros(1, dtype=wide, device=hidden.device)
        padding = max(0, vocabulary.first_row + rows - vocab_size)  # rows past the tokenizer's ids are never predicted
        for part in _chunks(labels, chunk, skip_untrained):
            h, label, n = hidden[part], labels[part], None
            logits = h @ weight.t()
            if narrow is not None and last is not None:
                n = narrow[part]
                logits.addmm_(n, last.t())
            plain = logits = logits.to(wide)
            if ratio is not None:
                logits = plain * ratio
            if padding:
                logits[:, rows - min(padding, rows) :] = -torch.inf
            peak = vocabulary.maximum(logits.amax(dim=-1, keepdim=True))
            if vocabulary.notes is not None:
                likeliest = _likeliest(logits, peak, vocabulary)
            local = label - vocabulary.first_row
            mine = (local >= 0) & (local < rows)
            column = local.clamp(0, rows - 1)[:, None]
            target = logits.gather(1, column)[:, 0].sub_(peak[:, 0]).masked_fill_(~mine, 0.0)
            exponentials = logits.sub_(peak).exp_()
            scale = torch.stack((exponentials.sum(dim=-1), target))
            partition, target = vocabulary.total(scale).unbind()
            trained = label != IGNORED
            losses = torch.where(trained, partition.log() - target, 0.0)
            total += losses.sum()
            if vocabulary.notes is not None:
                vocabulary.notes.append((losses, likeliest))
            if not any(wants):
                del plain, logits, exponentials
                continue
            grad = exponentials.mul_((trained / partition)[:, None])
            grad.scatter_add_(1, column, -(mine & trained).to(wide)[:, None])
            if ratio is not None:
                if grad_ratio is not None:
                    grad_ratio += (grad * plain).sum(0)
                grad.mul_(ratio)
            grad = grad.to(hidden.dtype)
            # A name would hold this chunk's logits until the next one's are there.
            del plain, logits, exponentials
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_narrow is not None and last is not None:
                grad_narrow[part] = grad @ last
            for summed, x in ((grad_weight, h), (grad_last, n)):
                if summed is not None and x is not None and x.dtype == wide:
                    summed.addmm_(grad.t(), x)
                elif summed is not None and x is not None:
                    summed += grad.t() @ x
            del grad
        ctx.save_for_backward(
            *(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, given, strict=True))
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A zero-bubble pipeline asks twice, once for each gradient; what is saved must stay as it is.
        return (
            *(
                saved * grad_loss.to(saved.dtype) if saved is not None and needed else None
                for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            ),
            *(None,) * 5,
        )


def _chunks(labels: torch.Tensor, chunk: int, skip_untrained: bool) -> list[Any]:
    """What picks each chunk's tokens: slices of all, or the numbers of those that are trained."""
    if skip_untrained and not torch.compiler.is_compiling():
        trained = (labels != IGNORED).nonzero()[:, 0]
        return list(trained.split(chunk)) if len(trained) else []
    return [slice(start, start + chunk) for start in range(0, len(labels), chunk)]


def _likeliest(logits: torch.Tensor, peak: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """The first id over all ranks whose logit is the greatest, (N,), as argmax of the joined logits (N, V) would be.

    `peak` (N, 1): the greatest of all ranks. A rank names its first id that reaches it: where the vocabulary is shared
    one number a token is exchanged, not the logits.
    """
    first = logits.argmax(dim=-1)
    reaches = logits.gather(1, first[:, None])[:, 0] == peak[:, 0]
    # Trainium holds an int64 in 32 bits.
    ids = (first + vocabulary.first_row).masked_fill(~reaches, torch.iinfo(torch.int32).max)
    return -vocabulary.maximum(-ids)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    chunk: int,
    vocabulary: Vocabulary | None = None,
    adapter: LowRank | None = None,
    skip_untrained: bool = False,
) -> torch.Tensor:
    """Sum over trained tokens of the cross-entropy of softmax(hidden · weightᵀ), in nats; fp32 or more, shape (1,).

    hidden (N, D), weight (rows, D), labels (N,) with -100 where a token is not trained. `vocab_size` columns compete;
    later rows are padding. At most `chunk` × rows logits exist at once. `adapter` adds to the logits, and a weight that
    is frozen gets no gradient. With `skip_untrained` logits are made of trained tokens alone: the same sums, but shapes
    that differ from batch to batch, and on an accelerator a wait for the labels.
    """
    narrow, last, ratio = adapter or (None, None, None)
    total: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, weight, narrow, last, ratio, labels, vocab_size, chunk, vocabulary or Vocabulary(), skip_untrained
    )
    return total
