"""The one place that says in which order the techniques are laid over the network.

Pipeline splits the layers first of all; then, on each stage: adapters → tensor/sequence → selective checkpointing → compile per
block → full checkpointing → FSDP/HSDP → memory → weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llama.config import Recipe
from llama.data.batches import Batch
from llama.device import Device
from llama.freeze import frozen
from llama.model.init import initial_rows
from llama.model.llama import Llama
from llama.model.lora import adapt, set_dropout_key
from llama.parallel.adapters import fill_nested_scales, with_adapters
from llama.parallel.compile import compile_blocks
from llama.parallel.fsdp import last_micro_batch, reshard, shard
from llama.parallel.mesh import Mesh
from llama.parallel.pipeline import Pipeline, TiedEnds, rank_stages, stage_layers
from llama.parallel.remat import recompute
from llama.parallel.shards import Box, fill_parameters, trainable
from llama.parallel.tensor import tensor_parallel


class ParallelLlama:
    """The network as this rank holds it: its stages, and how a step's micro-batches run through them."""

    def __init__(self, parts: list[Llama], recipe: Recipe, mesh: Mesh, device: torch.device, compute: torch.dtype):
        self.parts, self.recipe, self.mesh = parts, recipe, mesh
        piped = recipe.parallel.pipeline_parallel > 1
        self.pipeline = Pipeline(parts, recipe, mesh, device, compute) if piped else None
        self.tied_ends = TiedEnds(parts, recipe, mesh) if piped and recipe.model.tie_embeddings else None

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Every parameter of this rank once, by its name in the whole model: what a checkpoint holds. Of a network with
        adapters they alone; a tied output goes by the embedding's name.

        Where both copies of a tied embedding are on this rank the first alone is named.
        """
        seen = set()
        for part in self.parts:
            for name, parameter in trainable(part) if self.recipe.lora.rank else part.named_parameters():
                if self.tied_ends is not None and name == "head.weight":
                    name = "embed.weight"
                if name not in seen:
                    seen.add(name)
                    yield name, parameter

    def optimized_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Every parameter that needs an optimizer step here; both copies of a tied embedding, which stay equal."""
        return [(name, parameter) for part in self.parts for name, parameter in trainable(part)]

    def counted_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What this rank adds to a norm over the whole model: a tied embedding counts on the first stage alone."""
        return [
            (name, parameter)
            for name, parameter in self.optimized_parameters()
            if not (self.tied_ends is not None and name == "head.weight")
        ]

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What the network takes; documents only when they are kept apart, so that attention stays plainly causal."""
        documents = batch.documents if self.recipe.data.document_mask else None
        return batch.tokens, batch.positions, documents, batch.labels

    def forward_backward(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Gradients (sums over the trained tokens, over all data ranks) of one step; this rank's summed loss, shape ()."""
        if self.recipe.lora.dropout:
            for part in self.parts:
                set_dropout_key(part.train(), self.recipe.train.seed, batches[0].cursor)
        if self.pipeline is not None:
            loss = self.pipeline.forward_backward(batches)
        else:
            loss, model = torch.zeros((), device=batches[0].tokens.device), self.parts[0]
            for i, batch in enumerate(batches):
                last_micro_batch(model, last=i == len(batches) - 1)
                part = model(*self._inputs(batch)).sum()
                part.backward()
                loss = loss + part.detach()
        if self.tied_ends is not None and not self.recipe.lora.rank:
            self.tied_ends.sum_gradients()
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """This rank's summed loss without gradients, shape ()."""
        if self.recipe.lora.dropout:
            for part in self.parts:
                part.eval()
        if self.pipeline is not None:
            loss = self.pipeline.evaluate(batches)
        else:
            loss = torch.stack([self.parts[0](*self._inputs(batch)).sum() for batch in batches]).sum()
        for part in self.parts:
            reshard(part)
        return loss


def parallelize(
    recipe: Recipe,
    mesh: Mesh,
    device: Device,
    read: Callable[[str, Box], torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    read_adapter: Callable[[str, Box], torch.Tensor] | None = None,
    unfilled: AbstractContextManager[Any] | None = None,
) -> ParallelLlama:
    """Build the network of `recipe` over `mesh`, with weights from `read` or, without it, drawn from train.seed.

    Never holds more than this rank's shard plus one parameter. `dtype` overrides the weights' type (float64 in tests).
    Under adapters the frozen base is held in the type that is computed with. `unfilled`: weights are made under it and
    never filled; a mode whose tensors have no memory, to count what a step does (llama/plan/dry.py).
    """
    p, t = recipe.parallel, recipe.train
    weights = dtype or (torch.bfloat16 if t.precision == "bf16_sr" else torch.float32)
    compute = torch.bfloat16 if t.precision == "bf16_mixed" else weights
    # Over one data rank FSDP would only copy, unless it is what casts weights to bf16.
    lora = recipe.lora
    base = compute if lora.rank else weights
    sharded = mesh.layout.data > 1 or compute != base
    read = read or initial_weights(recipe)
    if lora.rank:
        read = with_adapters(recipe, read, base, read_adapter)

    parts, still = [], frozen(t.freeze, recipe.model)
    for stage in rank_stages(mesh.stage_rank, p) if p.pipeline_parallel > 1 else [0]:
        with torch.device("meta"):
            part = Llama(recipe.model, stage_layers(stage, p.stages, recipe.model.num_layers)).to(base)
            if lora.rank:
                adapt(part, lora, weights)
            freeze(part, still)
        if part.head is not None:
            part.head.loss_chunk = t.loss_chunk
            # Where shapes must stay as they are, or all is trained, the untrained positions are not left out.
            part.head.skip_untrained = recipe.chat is not None and device.able.skips_untrained
        if p.tensor_parallel > 1:
            tensor_parallel(part, mesh.tp, p.sequence_parallel)
        if t.activation_checkpointing == "selective":  # inside the graph, whose operators it chooses from
            recompute(part, "selective")
        if t.compile:
            compile_blocks(part, device.compile_backend)
        if t.activation_checkpointing == "full":  # round it: inside, torch 2.13 fails under tensor parallelism
            recompute(part, "full")
        if sharded:
            # Of adapters FSDP casts nothing: they cast themselves, and the base is what it is computed with.
            shard(part, mesh.fsdp, "fp32" if lora.rank and t.precision == "bf16_mixed" else t.precision, p.reshard)
        with unfilled or nullcontext():
            part.to_empty(device=device.torch())
        part.tie()
        if unfilled is None:
            fill_parameters(part, read)
            if lora.quantize:
                fill_nested_scales(part, read)
        parts.append(part)
    return ParallelLlama(parts, recipe, mesh, device.torch(), compute)


def freeze(part: Llama, still: Sequence[str]) -> None:
    """Let the parameters called `still` in the whole model be as they are; a tied output goes by the embedding's name."""
    for name, parameter in part.named_parameters():
        tied = name == "head.weight" and part.config.tie_embeddings
        if ("embed.weight" if tied else name) in still:
            parameter.requires_grad_(False)


def initial_weights(recipe: Recipe) -> Callable[[str, Box], torch.Tensor]:
    """A reader of random initial weights for fill_parameters: a pure function of (seed, name)."""

    def read(name: str, box: Box) -> torch.Tensor:
        rows, columns = box[0], box[1] if len(box) > 1 else None
        width = recipe.model.hidden_size if columns is None else _width(name, recipe)
        values = initial_rows(
            name, recipe.model, recipe.train.seed, rows.start, rows.stop, 1 if columns is None else width
        )
        return values[:, 0] if columns is None else values[:, columns]

    return read


def _width(name: str, recipe: Recipe) -> int:
    """Columns of the whole matrix called `name`."""
    model = recipe.model
    if name.endswith("attention.o.weight"):
        return model.num_heads * model.head_size
    return model.intermediate_size if name.endswith("mlp.down.weight") else model.hidden_size
