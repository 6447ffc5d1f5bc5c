"""How the work is laid over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llama.config.section import Count, Section

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"]
LOOPED = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble")


class Parallel(Section):
    """How the work is laid over ranks; mesh axes, outermost first: pp, dp_replicate, dp_shard, cp, tp."""

    tensor_parallel: Count = 1
    """Ranks that share each matrix."""
    sequence_parallel: bool = True
    """Also share norms and residuals over the tensor ranks, along the sequence; matters when tensor_parallel > 1."""
    pipeline_parallel: Count = 1
    """Ranks that share the layers."""
    pipeline_schedule: ScheduleName = "1f1b"
    stages_per_rank: Count | None = None
    """Layer groups on each pipeline rank; 1 for gpipe and 1f1b, 2 for the others when not given."""
    context_parallel: Count = 1
    """Ranks that share each sequence."""
    replicate: Count = 1
    """Ranks that hold copies of the weights (HSDP when `shard` is above 1, plain data parallel when it is 1)."""
    shard: Count | None = None
    """Ranks over which FSDP spreads weights and optimizer; all that remain when not given."""
    reshard_after_forward: bool | None = None
    """Free gathered weights between forward and backward; yes unless a pipeline runs when not given."""

    @property
    def stages(self) -> int:
        """Layer groups of the whole pipeline."""
        return self.pipeline_parallel * self.rank_stages

    @property
    def rank_stages(self) -> int:
        default = 2 if self.pipeline_schedule in LOOPED else 1
        return (self.stages_per_rank or default) if self.pipeline_parallel > 1 else 1

    @property
    def reshard(self) -> bool:
        return self.pipeline_parallel == 1 if self.reshard_after_forward is None else self.reshard_after_forward

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        if self.context_parallel > 1:
            raise ValueError(
                f"context_parallel={self.context_parallel} is not supported yet; use tensor_parallel with sequence_parallel=true"
            )
        if self.pipeline_parallel == 1:
            return self
        looped = self.pipeline_schedule in LOOPED
        if looped and self.rank_stages < 2:
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} needs stages_per_rank of 2 or more; 1f1b takes 1"
            )
        if not looped and self.rank_stages != 1:
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} takes stages_per_rank=1; interleaved_1f1b takes more"
            )
        if self.pipeline_schedule == "zbv_zero_bubble" and self.rank_stages != 2:
            raise ValueError("pipeline_schedule=zbv_zero_bubble lays the stages in a V and needs stages_per_rank=2")
        if self.reshard and self.pipeline_schedule in ZERO_BUBBLE:
            # Torch leaves gradients of the last stage unset then, silently.
            raise ValueError(
                f"reshard_after_forward=true loses gradients under pipeline_schedule={self.pipeline_schedule}; set it to false"
            )
        return self
