"""The mesh of ranks: axes pp, dp_replicate, dp_shard, cp, tp, outermost first, and the flattened views that are used."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama.config import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The device mesh with what the rest of the code asks of it."""

    layout: Layout
    devices: DeviceMesh
    """All five axes."""
    fsdp: DeviceMesh
    """dp_replicate × (dp_shard × cp) when there are copies, else dp_shard × cp flattened: FSDP2 shards over the last axis."""

    @property
    def tp(self) -> DeviceMesh:
        return self.devices["tp"]

    @property
    def pp(self) -> DeviceMesh:
        return self.devices["pp"]

    @property
    def data_rank(self) -> int:
        """Which slice of a global batch this rank reads; all ranks of a cp × tp × pp group read the same."""
        return self.devices.get_local_rank("dp_replicate") * self.layout.shard + self.devices.get_local_rank("dp_shard")

    @property
    def stage_rank(self) -> int:
        return self.devices.get_local_rank("pp")


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Lay the started ranks (layout.world of them) into the mesh. Collective over all ranks."""
    sizes = (layout.pipeline, layout.replicate, layout.shard, layout.context, layout.tensor)
    devices = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    shard = devices["dp_shard", "cp"]._flatten("fsdp")
    # HSDP takes a two-axis mesh: copies over the first, shards over the second.
    fsdp = devices["dp_replicate", "fsdp"] if layout.replicate > 1 else shard
    devices["dp_replicate", "dp_shard", "cp"]._flatten("loss")  # ranks whose token sums make up a step's loss
    return Mesh(layout, devices, fsdp)
