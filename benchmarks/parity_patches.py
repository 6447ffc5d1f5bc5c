"""Faults of parity_faults.py, each a patch over the trainer; package code knows nothing of them.

The first six were there when the tolerances of `herd compare` were chosen. The others are of the held-out set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import llama.data.batches as batches
import llama.model.attention as attention
import llama.model.llama as llama_module
import llama.parallel.apply as apply
import llama.train.loop as loop
import llama.train.optim as optim

EOD = 2
"""Token that ends a document, in all data of these benchmarks."""
Patch = contextlib.AbstractContextManager[None]


@contextlib.contextmanager
def patched(place: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`place.name` replaced by make(its old value)."""
    old = getattr(place, name)
    setattr(place, name, make(old))
    try:
        yield
    finally:
        setattr(place, name, old)


def gradients_too_large(factor: float = 1.02, after: int = 50) -> Patch:
    """Every gradient multiplied once the run is `after` steps old, before its norm is taken."""

    def make(old: Any) -> Any:
        def forward_backward(self: Any, parts: Any) -> torch.Tensor:
            loss: torch.Tensor = old(self, parts)
            if parts[0].cursor >= after * self.recipe.train.global_batch_size:
                for _, parameter in self.optimized_parameters():
                    parameter.grad.mul_(factor)
            return loss

        return forward_backward

    return patched(apply.ParallelLlama, "forward_backward", make)


def halves_swapped() -> Patch:
    """Rotary embedding takes the second half of each head for the first."""

    def make(old: Any) -> Any:
        def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return old(torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), cos, sin)

        return rotate

    return patched(attention, "rotate", make)


def rounded_to_nearest() -> Patch:
    """bf16 weights take the nearest value instead of a random neighbour: small updates are lost."""
    return patched(optim, "stochastic_round", lambda old: lambda x, generator: x.to(torch.bfloat16))


def mask_shifted() -> Patch:
    """The mask of labels lies one token too early."""

    def make(old: Any) -> Any:
        def arrays(self: Any, numbers: list[int]) -> Any:
            tokens, labels, positions, documents = old(self, numbers)
            true = self.samples
            whole = torch.from_numpy(tokens).roll(-1, 1).numpy()
            labels = whole.copy()
            for row, number in enumerate(numbers):
                labels[row] = true[number][1:]
            masked = tokens == self.eod
            masked[:, :-1] = masked[:, 1:]
            labels[masked] = batches.IGNORED
            return tokens, labels, positions, documents

        return arrays

    return patched(batches.Batches, "_arrays", make)


def rank_reads_anothers() -> Patch:
    """Data rank 1 reads the samples of data rank 0."""

    def make(old: Any) -> Any:
        def sample_numbers(self: Any, cursor: int) -> list[list[int]]:
            own, self.data_rank = self.data_rank, 0
            try:
                return old(self, cursor)  # type: ignore[no-any-return]
            finally:
                self.data_rank = own

        return sample_numbers

    return patched(batches.Batches, "sample_numbers", make)


def everything_decays() -> Patch:
    """Weight decay reaches the norms' scales too."""

    def make(old: Any) -> Any:
        def build_optimizer(*args: Any) -> Any:
            optimizer = old(*args)
            for group in optimizer.param_groups:
                group["weight_decay"] = max(g["weight_decay"] for g in optimizer.param_groups)
            return optimizer

        return build_optimizer

    return patched(loop, "build_optimizer", make)


# Of the held-out set.


def rank_dropped() -> Patch:
    """The gradient of data rank 1 is missing from the sum; its loss and tokens are counted."""

    def make(old: Any) -> Any:
        def forward(self: Any, *args: Any) -> torch.Tensor:
            out: torch.Tensor = old(self, *args)
            return out * 0 + out.detach() if dist.get_rank() == 1 else out

        return forward

    return patched(llama_module.Llama, "forward", make)


def epsilon_inside() -> Patch:
    """AdamW adds epsilon to the second moment, under the root."""

    class Inside(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                (first, second), lr = group["betas"], group["lr"]
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state |= {"step": torch.tensor(0.0), "exp_avg": p * 0, "exp_avg_sq": p * 0}
                    state["step"] += 1
                    m, v, t = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
                    m.mul_(first).add_(p.grad, alpha=1 - first)
                    v.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                    root = (v / (1 - second**t) + group["eps"]).sqrt()
                    p.mul_(1 - lr * group["weight_decay"]).sub_(m / root, alpha=lr / (1 - first**t))

    def make(old: Any) -> Any:
        def build_optimizer(model: Any, recipe: Any, device: Any) -> Any:
            right, config = old(model, recipe, device), recipe.optimizer
            groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in right.param_groups]
            return Inside(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps})

        return build_optimizer

    return patched(loop, "build_optimizer", make)


def norm_epsilon() -> Patch:
    """RMSNorm with epsilon 1e-3 in place of 1e-5."""

    def make(old: Any) -> Any:
        return lambda self, x: F.rms_norm(x, self.normalized_shape, self.weight, 1e-3)

    return patched(torch.nn.RMSNorm, "forward", make)


def first_half_again(half: int) -> Patch:
    """After `half` samples the order begins again."""

    def make(old: Any) -> Any:
        return lambda self, cursor: old(self, cursor % half)

    return patched(batches.Batches, "step", make)


def last_micro_batch_light(weight: float = 0.5) -> Patch:
    """The gradient of each step's last micro-batch counts half."""

    def make(old: Any) -> Any:
        def forward_backward(self: Any, parts: Any) -> torch.Tensor:
            loss: torch.Tensor = old(self, parts[:-1])
            before = [p.grad.clone() for _, p in self.optimized_parameters()]
            loss = loss + old(self, parts[-1:])
            for (_, p), known in zip(self.optimized_parameters(), before, strict=True):
                p.grad.sub_(known).mul_(weight).add_(known)
            return loss

        return forward_backward

    return patched(apply.ParallelLlama, "forward_backward", make)


def dropout_left_on() -> Patch:
    """One in ten outputs of the feed-forward layers is dropped."""

    def make(old: Any) -> Any:
        return lambda self, x: F.dropout(old(self, x), 0.1)

    return patched(llama_module.SwiGLU, "forward", make)


def theta_wrong() -> Patch:
    """RoPE with base 500,000 in place of 10,000."""

    def make(old: Any) -> Any:
        return lambda head_dim, theta, scaling, device: old(head_dim, 500_000.0, scaling, device)

    return patched(llama_module, "inverse_frequencies", make)


def input_embedding_still() -> Patch:
    """A tied embedding is trained as the output alone: what reaches it as the input is lost."""

    def make(old: Any) -> Any:
        return lambda self, tokens: self.vocabulary.embed(tokens, self.weight.detach())

    return patched(llama_module.Embedding, "forward", make)
