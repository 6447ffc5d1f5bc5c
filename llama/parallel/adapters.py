"""Values of adapters: from a file or as they start, and what a run with adapters trains and holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama.config import Recipe
from llama.model.llama import count_parameters
from llama.model.lora import initial_a
from llama.parallel.shards import Box
from llama.targets import adapted, linear_shape

Read = Callable[[str, Box], torch.Tensor]
ADAPTER = ("lora_a", "lora_b", "magnitude")


def with_adapters(recipe: Recipe, base: Read, held: torch.dtype, adapter: Read | None = None) -> Read:
    """`read(name, box)` of base and adapters: these from `adapter`, or A drawn from train.seed, B zero, DoRA's lengths
    those of the base's rows as they are `held`."""

    def read(name: str, box: Box) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        if leaf not in ADAPTER:
            return base(name, box)
        if adapter is not None:
            return adapter(name, box)
        width = linear_shape(module, recipe.model)[1]
        if leaf == "lora_a":
            return initial_a(name, recipe.train.seed, recipe.lora.rank, width)[box]
        if leaf == "lora_b":
            return torch.zeros([part.stop - part.start for part in box])
        rows = base(f"{module}.weight", (box[0], slice(0, width)))
        return torch.linalg.vector_norm(rows.to(held), dim=1, dtype=torch.promote_types(held, torch.float32))

    return read


def adapter_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The adapters' parameters by our names, in the model's order, a vocabulary without its padding."""
    lora = recipe.lora
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapted(lora.targets, recipe.model.num_layers) if lora.rank else ():
        out, width = linear_shape(name, recipe.model)
        shapes[f"{name}.lora_a"] = (lora.rank, width)
        shapes[f"{name}.lora_b"] = (out, lora.rank)
        if lora.dora:
            shapes[f"{name}.magnitude"] = (out,)
    return shapes


def adapters_in_words(recipe: Recipe) -> list[str]:
    """How much is trained, as PEFT's print_trainable_parameters says it; nothing where all is."""
    if not recipe.lora.rank:
        return []
    trained = sum(torch.Size(shape).numel() for shape in adapter_shapes(recipe).values())
    total = count_parameters(recipe.model)[0] + trained
    return [f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"]
