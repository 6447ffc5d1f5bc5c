"""A PEFT adapter folded into its base: W + s·BA, with DoRA each row at its trained length; one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from llama.config import Lora, Model, Recipe
from llama.hf.export import write_directory
from llama.hf.weights import checkpoint_reader
from llama.model.llama import Llama
from llama.model.lora import adapt
from llama.parallel.adapters import ADAPTER, adapter_shapes
from llama.parallel.shards import Box, fill_parameters
from llama.targets import adapted

Read = Callable[[str, Box], torch.Tensor]


def merged_reader(recipe: Recipe, base: Read, adapter: Read) -> Read:
    """`read(name, box)` of the model with its adapters folded in, in fp32 where there is one.

    A whole row of the base is read for a part of it, since DoRA needs the row's length.
    """
    lora, shapes = recipe.lora, adapter_shapes(recipe)
    targets = set(adapted(lora.targets, recipe.model.num_layers))

    def whole(name: str, rows: slice | None = None) -> torch.Tensor:
        box = [slice(0, size) for size in shapes[name]]
        return adapter(name, (rows or box[0], *box[1:])).float()

    def read(name: str, box: Box) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in targets:
            return base(name, box)
        a = whole(f"{module}.lora_a")
        weight = base(name, (box[0], slice(0, a.shape[1]))).float()
        weight = weight.addmm(whole(f"{module}.lora_b", box[0]), a, alpha=lora.scale)
        if lora.dora:
            length = torch.linalg.vector_norm(weight, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            weight.mul_((whole(f"{module}.magnitude", box[0]) / length)[:, None])
        return weight[:, box[1]]

    return read


def whole_reader(model: Model, read: Read) -> Callable[[str], torch.Tensor]:
    """`read(name)` of whole parameters, as an export asks for them."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Llama(model).named_parameters()}
    return lambda name: read(name, tuple(slice(0, size) for size in shapes[name]))


def merge(
    recipe: Recipe,
    base: Read,
    adapter: Read,
    to: Path,
    dtype: str,
    tokenizer: Path | None,
    overwrite: bool,
    card: str | None = None,
) -> None:
    """Write `to`, a Hugging Face directory of base and adapters in one. Memory: one matrix in fp32. Raises UserError."""
    from llama.hf.export import MAX_SHARD_SIZE

    read = whole_reader(recipe.model, merged_reader(recipe, base, adapter))
    write_directory(to, recipe.model, read, dtype, tokenizer, True, overwrite, MAX_SHARD_SIZE, card)


class Check(NamedTuple):
    """How the merged model's logits compare with those of the base with its adapters, over some prompts."""

    difference: float
    """Largest."""
    size: float
    """Largest logit."""
    effect: float
    """Largest difference that the adapter makes to the base."""
    same: float
    """Share of tokens whose likeliest next token is the same."""


@torch.no_grad()
def compare(recipe: Recipe, base: Read, adapter: Read, merged: Path, prompts: list[list[int]]) -> Check:
    """The logits of both models in fp32, one model in memory at a time."""

    def logits(lora: Lora | None, read: Read) -> list[torch.Tensor]:
        with torch.device("meta"):
            model = Llama(recipe.model)
            if lora is not None:
                adapt(model, lora, torch.float32)
        model.to_empty(device="cpu")
        model.tie()
        fill_parameters(model, read)
        model.eval()
        return [model(torch.tensor([ids]))[0] for ids in prompts]

    def both(name: str, box: Box) -> torch.Tensor:
        return (adapter if name.rpartition(".")[2] in ADAPTER else base)(name, box)

    plain = logits(None, base)
    adapted_ = logits(recipe.lora, both)
    after = logits(None, checkpoint_reader(merged, recipe.model))
    pairs = list(zip(plain, adapted_, after, strict=True))
    return Check(
        max(float((a - c).abs().max()) for _, a, c in pairs),
        max(float(a.abs().max()) for _, a, _ in pairs),
        max(float((a - p).abs().max()) for p, a, _ in pairs),
        float(torch.cat([a.argmax(-1) == c.argmax(-1) for _, a, c in pairs]).float().mean()),
    )
