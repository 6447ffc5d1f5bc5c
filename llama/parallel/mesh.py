"""The mesh of ranks: axes pp, dp_replicate, dp_shard, cp, tp, outermost first."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama.layout import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The device mesh with what the rest of the code asks of it."""

    layout: Layout
    devices: DeviceMesh
    """All five axes."""

    @property
    def tp(self) -> DeviceMesh:
        return self.devices["tp"]

    @property
    def pp(self) -> DeviceMesh:
        return self.devices["pp"]

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 takes: copies over the first of two axes and shards over the last, or shards alone."""
        # Context ranks, when they come, join dp_shard here, flattened.
        return self.devices["dp_replicate", "dp_shard"] if self.layout.replicate > 1 else self.devices["dp_shard"]

    @property
    def data_rank(self) -> int:
        """Which slice of a global batch this rank reads; all ranks of a cp × tp × pp group read the same."""
        return self.devices.get_local_rank("dp_replicate") * self.layout.shard + self.devices.get_local_rank("dp_shard")

    @property
    def stage_rank(self) -> int:
        """This rank's place in the pipeline."""
        return self.devices.get_local_rank("pp")

    @property
    def speaks_for_data(self) -> bool:
        """Whether this is the one rank of its tensor group, so that a sum over all ranks counts its samples once."""
        return self.devices.get_local_rank("tp") == 0


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Lay the started ranks into the mesh. Collective over all ranks; their number must be layout.world."""
    assert dist.get_world_size() == layout.world, f"{dist.get_world_size()} ranks for a layout of {layout.world}"
    sizes = (layout.pipeline, layout.replicate, layout.shard, layout.context, layout.tensor)
    return Mesh(layout, init_device_mesh(device_type, sizes, mesh_dim_names=AXES))
