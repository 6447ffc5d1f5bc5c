"""Floating-point operations that a run's model needs for a token, where part of the weights is frozen.

A matrix of n weights takes 2·n forward, 2·n for the gradient of its input, which is needed where something trained lies
below, and 2·n for its own gradient, where it is trained: 6·n in all for a trained one (Kaplan et al. 2020, section 2.1;
PaLM, Chowdhery et al. 2022, appendix B). What is frozen below everything trained has no backward; a frozen base under
adapters takes 4·n, and the adapters 6·n of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llama.config import Recipe
from llama.freeze import frozen
from llama.targets import HEAD, adapted, linear_shape


class Product(NamedTuple):
    """A matrix (or a norm's weights, which the N of 6·N counts too)."""

    name: str
    weights: int
    input_gradient: bool
    own_gradient: bool

    @property
    def flops(self) -> int:
        return 2 * self.weights * (1 + self.input_gradient + self.own_gradient)


def products(recipe: Recipe) -> Iterator[Product | str]:
    """Every product of a forward in its order; between them `attention` or `frozen attention`, by whether it has a
    backward. The embedding is a look-up and none."""
    model, lora = recipe.model, recipe.lora
    still = set(frozen(recipe.train.freeze, model))
    targets = set(adapted(lora.targets, model.num_layers)) if lora.rank else set()

    def trained(name: str) -> bool:
        tied = name == HEAD and model.tie_embeddings
        return not lora.rank and ("embed.weight" if tied else f"{name}.weight") not in still

    def norm(name: str, below: bool) -> tuple[bool, list[Product]]:
        return below or trained(name), [Product(name, model.hidden_size, below, trained(name))]

    def linear(name: str, below: bool) -> tuple[bool, list[Product]]:
        out, width = linear_shape(name, model)
        found = [Product(name, out * width, below, trained(name))]
        if name in targets:
            found += [Product(f"{name}.lora_a", lora.rank * width, below, True)]
            found += [Product(f"{name}.lora_b", out * lora.rank, True, True)]
        return below or trained(name) or name in targets, found

    below = trained("embed")  # whether what comes in now needs a gradient
    for i in range(model.num_layers):
        at = f"layers.{i}"
        normed, found = norm(f"{at}.attention_norm", below)
        yield from found
        inside = normed
        for part in ("q", "k", "v"):
            needs, found = linear(f"{at}.attention.{part}", normed)
            inside |= needs
            yield from found
        yield "attention" if inside else "frozen attention"
        needs, found = linear(f"{at}.attention.o", inside)
        yield from found
        below |= needs
        normed, found = norm(f"{at}.mlp_norm", below)
        yield from found
        inside = normed
        for part in ("gate", "up"):
            needs, found = linear(f"{at}.mlp.{part}", normed)
            inside |= needs
            yield from found
        needs, found = linear(f"{at}.mlp.down", inside)
        yield from found
        below |= needs
    below, found = norm("norm", below)
    yield from found
    yield from linear(HEAD, below)[1]


def trained_flops_per_token(recipe: Recipe, causal: bool) -> float:
    """Of forward and backward for one token of a sequence; recomputation is not counted.

    Attention's two products take 4·s·d forward and twice that backward; with `causal` only the half of its matrix that
    is needed counts. With nothing frozen this is llama.model.llama.flops_per_token.
    """
    model, total = recipe.model, 0.0
    attention = 4 * model.num_heads * model.head_size * recipe.data.seq_length * (0.5 if causal else 1.0)
    for product in products(recipe):
        if isinstance(product, str):
            total += attention * (3 if product == "attention" else 1)
        else:
            total += product.flops
    return total
