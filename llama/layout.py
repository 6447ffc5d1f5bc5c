"""A recipe laid over a number of ranks: the size of each mesh axis, and whether the global batch divides."""

from __future__ import annotations

from llama.config import Recipe, Section


class Layout(Section):
    """The sizes of the mesh axes for a given number of ranks, and what a step needs from them."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int
    accumulation: int
    """Micro-batches that each data rank computes in one step."""

    @property
    def data(self) -> int:
        """Data ranks: groups of ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def name(self) -> str:
        """Short form such as pp2_fsdp2_tp2."""
        parts = {"pp": self.pipeline, "rep": self.replicate, "fsdp": self.shard, "cp": self.context, "tp": self.tensor}
        return "_".join(f"{key}{size}" for key, size in parts.items() if size > 1) or "single"


def layout(recipe: Recipe, world_size: int) -> Layout:
    """Lay the recipe over `world_size` ranks.

    Raises ValueError, naming a remedy, when the axes or the global batch do not divide.
    """
    p, t = recipe.parallel, recipe.train
    fixed = p.pipeline_parallel * p.context_parallel * p.tensor_parallel * p.replicate
    if world_size % fixed:
        raise ValueError(
            f"{world_size} ranks are not a multiple of pipeline {p.pipeline_parallel} × replicate {p.replicate} × "
            f"context {p.context_parallel} × tensor {p.tensor_parallel} = {fixed}; start {-(-world_size // fixed) * fixed} ranks"
        )
    shard = p.shard or world_size // fixed
    if fixed * shard != world_size:
        raise ValueError(
            f"the layout needs {fixed * shard} ranks (pipeline {p.pipeline_parallel} × replicate {p.replicate} × shard {shard} × "
            f"context {p.context_parallel} × tensor {p.tensor_parallel}), but {world_size} were started; "
            f"leave parallel.shard out and it takes what remains"
        )
    data = p.replicate * shard
    if t.global_batch_size % (data * t.micro_batch_size):
        unit = data * t.micro_batch_size
        raise ValueError(
            f"train.global_batch_size={t.global_batch_size} is not a multiple of {data} data ranks × micro_batch_size "
            f"{t.micro_batch_size} = {unit}; {-(-t.global_batch_size // unit) * unit} would be"
        )
    accumulation = t.global_batch_size // (data * t.micro_batch_size)
    if p.pipeline_parallel > 1 and accumulation < p.pipeline_parallel:
        raise ValueError(
            f"a pipeline of {p.pipeline_parallel} needs at least {p.pipeline_parallel} micro-batches a step and has {accumulation}; "
            f"raise train.global_batch_size to {p.pipeline_parallel * data * t.micro_batch_size} or lower micro_batch_size"
        )
    if p.pipeline_schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and accumulation % p.pipeline_parallel:
        raise ValueError(
            f"{p.pipeline_schedule} needs micro-batches ({accumulation}) in multiples of the pipeline "
            f"({p.pipeline_parallel}); change train.global_batch_size or micro_batch_size"
        )
    return Layout(
        pipeline=p.pipeline_parallel, replicate=p.replicate, shard=shard, context=p.context_parallel,
        tensor=p.tensor_parallel, accumulation=accumulation,
    )  # fmt: skip
