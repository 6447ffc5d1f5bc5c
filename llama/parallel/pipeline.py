"""Pipeline parallelism: layers over ranks, micro-batches in flight, on torch.distributed.pipelining's schedules.

GPipe (Huang et al. 2019), 1F1B and interleaved 1F1B (Narayanan et al. 2021), zero bubble (Qi et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from llama.config import Parallel, Recipe
from llama.data.batches import Batch
from llama.model.llama import Llama
from llama.parallel.mesh import Mesh

SCHEDULES: dict[str, Any] = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": torch_schedules.ScheduleZBVZeroBubble,
}


def stage_layers(stage: int, stages: int, num_layers: int) -> range:
    """The blocks of one stage: contiguous, as even as can be; the last stage, which has the output, is the last to get one more."""
    base, extra = divmod(num_layers, stages)
    sizes = [base + (1 if i < extra else 0) for i in range(stages)]
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


def rank_stages(rank: int, parallel: Parallel) -> list[int]:
    """The stages on one pipeline rank: looped round the ranks, or laid as a V (first and last on rank 0)."""
    ranks = parallel.pipeline_parallel
    if parallel.pipeline_schedule == "zbv_zero_bubble":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * i for i in range(parallel.rank_stages)]


class Pipeline:
    """Runs the micro-batches of a step through this rank's stages.

    Args:
        parts: this rank's stages, in the order of `rank_stages`, already cut, sharded and on the device.
    """

    def __init__(self, parts: Sequence[Llama], recipe: Recipe, mesh: Mesh, device: torch.device, dtype: torch.dtype):
        parallel, self.micro_batches = recipe.parallel, mesh.layout.accumulation
        self.document_mask = recipe.data.document_mask
        held = rank_stages(mesh.stage_rank, parallel)
        self.first, self.last = 0 in held, parallel.stages - 1 in held
        B, S, D = recipe.train.micro_batch_size, recipe.data.seq_length, recipe.model.hidden_size
        cut = parallel.tensor_parallel if parallel.sequence_parallel else 1
        tokens = torch.empty(B, S, dtype=torch.int64, device="meta")
        hidden = torch.empty(B, S // cut, D, dtype=dtype, device="meta", requires_grad=True)
        loss = torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                part,
                index,
                parallel.stages,
                device,
                input_args=tokens if index == 0 else hidden,
                output_args=loss if index == parallel.stages - 1 else hidden,
                group=mesh.pp.get_group(),
            )
            for part, index in zip(parts, held, strict=True)
        ]
        kind = SCHEDULES[parallel.pipeline_schedule]
        single = issubclass(kind, torch_schedules.PipelineScheduleSingle)
        # The last stage returns the summed loss itself; sums need no scaling by the number of micro-batches.
        self.schedule = kind(
            stages[0] if single else stages,
            n_microbatches=self.micro_batches,
            loss_fn=lambda loss_sum, labels: loss_sum.sum(),
            scale_grads=False,
        )

    def _run(self, run: Any, batches: Sequence[Batch]) -> torch.Tensor:
        keys = ("tokens", "labels", "positions", *(("documents",) if self.document_mask else ()))
        joined = {key: torch.cat([getattr(batch, key) for batch in batches]) for key in keys}
        tokens, labels = joined.pop("tokens"), joined["labels"]
        losses: list[torch.Tensor] = []
        run(
            *((tokens,) if self.first else ()),
            **joined,
            **({"target": labels, "losses": losses} if self.last else {}),
        )
        return (
            torch.stack([loss.detach() for loss in losses]).sum()
            if self.last
            else torch.zeros((), device=tokens.device)
        )

    def forward_backward(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Gradients of one step's micro-batches; the summed loss on the rank with the last stage, else 0."""
        return self._run(lambda *a, **k: self.schedule.step(*a, return_outputs=False, **k), batches)

    def evaluate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The summed loss without gradients, on the rank with the last stage, else 0."""
        return self._run(self.schedule.eval, batches)


class TiedEnds:
    """An embedding shared by the first and the last stage: two copies whose gradients are summed.

    Collective to make: every rank of the mesh must.
    """

    def __init__(self, parts: Sequence[Llama], recipe: Recipe, mesh: Mesh):
        self.copies = [
            end.weight for part in parts for end in (part.embed, part.head) if end is not None
        ]  # fmt: skip
        self.group: dist.ProcessGroup | None = None
        if recipe.parallel.pipeline_schedule == "zbv_zero_bubble":
            return  # both ends are on one rank
        ranks = mesh.devices.mesh.flatten(1)  # (pipeline, everything else)
        for pair in torch.stack((ranks[0], ranks[-1]), dim=1).tolist():
            group = dist.new_group(pair)
            if dist.get_rank() in pair:
                self.group = group

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Make both copies' gradients their sum."""
        gradients = [copy.grad for copy in self.copies]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients if g is not None]
        if self.group is not None:
            for gradient in local:
                dist.all_reduce(gradient, group=self.group)
        elif len(local) == 2:
            total = local[0] + local[1]
            for gradient in local:
                gradient.copy_(total)
