"""AdamW (Loshchilov and Hutter 2019) on sharded weights, the global gradient norm, and stochastic rounding for bf16."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llama.config import Recipe
from llama.device import Device
from llama.parallel.apply import ParallelLlama
from llama.parallel.shards import local_part, plain

Named = Sequence[tuple[str, torch.nn.Parameter]]
UNIT = 4096.0


def build_optimizer(model: ParallelLlama, recipe: Recipe, device: Device) -> torch.optim.Optimizer:
    """AdamW over this rank's shards: decay on matrices, none on norms (Megatron-LM's and the Llama papers' convention)."""
    config = recipe.optimizer
    named = model.optimized_parameters()
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # A pipeline stage may hold no norm, or be frozen whole.
    groups = [group for group in groups if group["params"]] or groups[:1]
    if recipe.train.precision == "bf16_sr":
        # Both copies of a tied embedding round by one name, or they would drift apart.
        tied = recipe.model.tie_embeddings
        names = {p: "embed.weight" if tied and name == "head.weight" else name for name, p in named}
        dtype = torch.float32 if config.state_dtype == "float32" else torch.bfloat16
        seed = None if device.able.rounds_itself else recipe.train.seed
        return StochasticAdamW(groups, config.lr, config.betas, config.eps, dtype, names, seed)
    kind = {"fused": True} if device.fused_adamw else {"foreach": True}
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, **kind)


def settle_gradients(named: Named) -> None:
    """Bring every gradient to its parameter's layout; a replicated norm's comes as a sum still to be made.

    Raises RuntimeError naming parameters that have none: they would silently never be trained.
    """
    missing = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached {len(missing)} trainable parameters: {', '.join(missing[:8])}")
    for _, parameter in named:
        gradient = parameter.grad
        if (
            isinstance(gradient, DTensor)
            and isinstance(parameter, DTensor)
            and gradient.placements != parameter.placements
        ):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


@torch.no_grad()
def squared_norm(
    tensors: Sequence[torch.Tensor], ranks_of_stage: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """This rank's share of the squared norm of the whole `tensors`: summed over all ranks it is exact. `dtype`, shape ().

    A tensor cut into n pieces over `ranks_of_stage` ranks is held ranks_of_stage / n times over, so each copy counts that
    much less.
    """
    if not tensors:
        return torch.zeros((), dtype=dtype)
    copies = []
    for tensor in tensors:
        pieces = 1
        if isinstance(tensor, DTensor):
            # Gradients are settled: what is not replicated is cut (torch's strided shard does not call itself one).
            shards = [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]
            pieces = math.prod(tensor.device_mesh.size(d) for d in shards)
        copies.append(ranks_of_stage / pieces)
    local = [plain(tensor) for tensor in tensors]
    wide = torch.promote_types(local[0].dtype, torch.float32)  # a norm of bf16 numbers would be rounded to bf16
    norms = torch.stack(torch._foreach_norm(local, 2, dtype=wide)).to(dtype)
    return (norms.square() / torch.tensor(copies, dtype=dtype, device=norms.device)).sum()


def clip_factor(norm: float, limit: float | None) -> float:
    """What brings a gradient of this norm down to `limit`; the small term is torch's and Megatron-LM's own."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


@torch.no_grad()
def scale_gradients(named: Named, factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    local = [plain(p.grad) for _, p in named if p.grad is not None]
    if local:  # a pipeline stage may be frozen whole
        torch._foreach_mul_(local, factor)


def total_over_ranks(values: torch.Tensor) -> list[float]:
    """Sum of `values` (n,) over all ranks, on the host: the one collective and the one wait of a step.

    float32 counts to 2^24 only, which the tokens of a large step pass. Such values are therefore summed in two parts,
    multiples of 4,096 and the rest: whole numbers below 2^24 on each rank have an exact sum on up to 4,096 ranks.
    """
    if values.dtype != torch.float32:
        if dist.is_initialized():
            dist.all_reduce(values)
        return [float(value) for value in values.tolist()]
    units = (values / UNIT).floor()
    parts = torch.cat((units, values - units * UNIT))
    if dist.is_initialized():
        dist.all_reduce(parts)
    whole = parts.tolist()
    return [units * UNIT + rest for units, rest in zip(whole[: len(values)], whole[len(values) :], strict=True)]


def stochastic_round(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 to bf16, up or down with a chance proportional to nearness, so that the mean is exact (Gupta et al. 2015).

    bf16 is the upper half of fp32's bits: a random lower half is added and what is below is cut off.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = (x.contiguous().view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32)
    # Adding to the bits of inf or nan could change what they say.
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights: arithmetic in fp32, the new weight rounded stochastically.

    Without that an update smaller than half a bf16 step is lost whole, and training stalls as the learning rate falls.
    The noise is a pure function of (seed, step, parameter, place of the shard): copies of a weight round alike, and a
    resumed run rounds as the uninterrupted one. Without a seed the device rounds so whatever it makes bf16 (Trainium's
    runtime does), and a plain copy is all there is to do.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
        names: dict[torch.nn.Parameter, str],
        seed: int | None,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.state_dtype, self.names, self.seed = state_dtype, names, seed
        self.corners: dict[torch.nn.Parameter, str] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        state["step"] = state["step"] + 1  # anew: a dry run knows the values of such tensors alone
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        weight = plain(parameter)
        assert parameter.grad is not None
        gradient = plain(parameter.grad).float()
        first, second = (plain(state[key]) for key in ("exp_avg", "exp_avg_sq"))
        mean = first.float().lerp(gradient, 1 - beta1)
        square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
        if self.seed is None:
            for kept, value in ((weight, new), (first, mean), (second, square)):
                kept.copy_(value)
            return
        if parameter not in self.corners:
            self.corners[parameter] = ",".join(str(part.start) for part in local_part(parameter)[1])
        key = f"{self.seed}/{step}/{self.names[parameter]}/{self.corners[parameter]}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        generator = torch.Generator(device=weight.device).manual_seed(seed)
        weight.copy_(stochastic_round(new, generator))
        if self.state_dtype == torch.bfloat16:
            first.copy_(stochastic_round(mean, generator))
            second.copy_(stochastic_round(square, generator))
        else:
            first.copy_(mean)
            second.copy_(square)
