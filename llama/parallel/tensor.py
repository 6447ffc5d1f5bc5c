"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022) with DTensor styles.

Column-parallel q, k, v, gate, up; row-parallel o, down; embedding and output rows shared over the vocabulary. Under
sequence parallelism what lies between (residuals, norms) is cut along the sequence. The vocabulary's parts are ours:
torch's loss_parallel keeps whole logits and is not exact on every backend.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from llama.model.llama import Embedding, Head, Llama
from llama.model.lora import Adapter, FrozenLinear, Whole
from llama.model.loss import Vocabulary
from llama.model.nf4 import QuantizedLinear


class SharedVocabulary(Vocabulary):
    """Embedding and output rows cut over the tensor ranks, first rows on the first rank.

    Args:
        mesh: the tensor axis.
        outside: how hidden states are laid out after the embedding: Shard(1) under sequence parallelism, else Replicate.
        rows: rows that each rank holds.
    """

    def __init__(self, mesh: DeviceMesh, outside: Placement, rows: int):
        self.mesh, self.outside = mesh, outside
        self.first_row = rows * mesh.get_local_rank()
        self.group = mesh.get_group()

    @staticmethod
    def _rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.to_local(grad_placements=[Shard(0)]) if isinstance(weight, DTensor) else weight

    def embed(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = self._rows(weight)
        local = tokens - self.first_row
        mine = (local >= 0) & (local < rows.shape[0])
        found = nn.functional.embedding(local.clamp(0, rows.shape[0] - 1), rows) * mine[..., None]
        # Each id is found on one rank and zero on the others: their sum is exact in any type.
        joined = DTensor.from_local(found, self.mesh, [Partial()], run_check=False)
        # clone() waits for the collective: an asynchronous result loses its gradient on entering a compiled block.
        return joined.redistribute(placements=[self.outside]).to_local().clone()

    def enter(self, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(hidden, DTensor):
            hidden = DTensor.from_local(hidden, self.mesh, [self.outside], run_check=False)
        whole = hidden.redistribute(placements=[Replicate()])
        # Every rank finds the part of the gradient that comes through its rows.
        return whole.to_local(grad_placements=[Partial()]), self._rows(weight)

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(logits, self.mesh, [Shard(2)], run_check=False).full_tensor()


class VocabularyParallel(ParallelStyle):
    """Cuts an Embedding's or a Head's rows over the tensor ranks."""

    def __init__(self, outside: Placement):
        self.outside = outside

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, (Embedding, Head))
        rows = module.weight.shape[0] // device_mesh.size()
        if isinstance(module, Adapter):
            _cut(module, device_mesh, COLUMN)
            module.cut = Cut(device_mesh, COLUMN)
        else:
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, device_mesh, [Shard(0)]))
        module.vocabulary = SharedVocabulary(device_mesh, self.outside, rows)
        return module


class ReplicatedNorm(ParallelStyle):
    """Holds a norm's weight as a replicated DTensor, so that all parameters of a block live on one mesh."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
        for name, parameter in list(module.named_parameters()):
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, device_mesh, [Replicate()])))
        return style._apply(module, device_mesh)


COLUMN: dict[str, Placement] = {"lora_a": Replicate()}
ROW: dict[str, Placement] = {
    "weight": Shard(1), "packed": Shard(1), "absmax": Shard(1), "lora_a": Shard(1), "lora_b": Replicate(),
    "magnitude": Replicate(),
}  # fmt: skip
"""How a linear's parameters are cut along its output or its input; what is not named is cut by rows."""


def _cut(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Distribute the module's own parameters, in place."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter.data, mesh, [placements.get(name, Shard(0))])
        setattr(module, name, nn.Parameter(spread, parameter.requires_grad))


class Cut(Whole):
    """A linear whose output is cut over the tensor ranks: everyone reads the whole input and writes some columns."""

    def __init__(self, mesh: DeviceMesh, placements: dict[str, Placement]):
        self.mesh, self.placements = mesh, placements

    def own(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return parameter
        # What every rank holds whole gets from each the part of its gradient that comes through the rank's share.
        placement = self.placements.get(name, Shard(0))
        return parameter.to_local(grad_placements=[Partial() if placement.is_replicate() else placement])

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        if not x.placements[0].is_replicate():
            x = x.redistribute(placements=[Replicate()])
        # Their gradients stay parts, which are summed once for all linears that read x.
        return x.to_local(grad_placements=[Partial()])


class RowCut(Cut):
    """A linear whose input is cut: each rank has some columns of x, and what they give is summed with what the
    adapter's give, which is linear too."""

    def __init__(self, mesh: DeviceMesh, outside: Placement):
        super().__init__(mesh, ROW)
        self.outside = outside

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        joined = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return joined.redistribute(placements=[self.outside]).to_local()

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(x, self.mesh, [Partial()], run_check=False).full_tensor()


class FrozenParallel(ParallelStyle):
    """Cuts a FrozenLinear and its adapter along its output, or its input where `outside` says how its output is laid."""

    def __init__(self, outside: Placement | None = None):
        self.outside = outside

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, FrozenLinear)
        placements = COLUMN if self.outside is None else ROW
        if isinstance(module, QuantizedLinear):
            if self.outside is not None and module.absmax.ndim == 1:  # a scale a row, which all ranks need
                placements = ROW | {"absmax": Replicate()}
            part = device_mesh.get_local_rank(), device_mesh.size()
            rows, blocks = module.out_features // part[1], module.blocks // part[1]
            module.origin = (rows * part[0], 0) if self.outside is None else (0, blocks * part[0])
        _cut(module, device_mesh, placements)
        module.cut = Cut(device_mesh, COLUMN) if self.outside is None else RowCut(device_mesh, self.outside)
        return module


def tensor_parallel(model: Llama, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut `model` (a stage or the whole) over the tensor axis, in place."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    outside: Placement = Shard(1) if sequence_parallel else Replicate()
    norm: ParallelStyle = SequenceParallel() if sequence_parallel else ReplicatedNorm()
    block_plan: dict[str, ParallelStyle] = {
        "attention_norm": norm,
        "attention": PrepareModuleInput(
            input_layouts=(outside, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=outside),
        "mlp_norm": norm,
        "mlp": PrepareModuleInput(input_layouts=(outside,), desired_input_layouts=(Replicate(),)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=outside),
    }
    for block in model.layers.values():
        plan = block_plan | {
            name: FrozenParallel(outside if isinstance(style, RowwiseParallel) else None)
            for name, style in block_plan.items()
            if isinstance(block.get_submodule(name), FrozenLinear)
        }
        parallelize_module(block, mesh, plan)
    ends = {"embed": VocabularyParallel(outside), "norm": norm, "head": VocabularyParallel(outside)}
    parallelize_module(model, mesh, {name: style for name, style in ends.items() if getattr(model, name) is not None})
    model.tie()  # cutting a shared weight makes two of it
    for name, parameter in model.named_parameters():  # torch's styles make every parameter anew, to be trained
        parameter.requires_grad_(name not in frozen)
