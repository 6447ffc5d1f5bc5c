"""A Hugging Face checkpoint imported over any layout, saved and exported comes back byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from llama import hf
from llama.config import Recipe
from llama.device import find_device
from llama.model.llama import Llama
from llama.parallel.apply import parallelize
from llama.parallel.mesh import build_mesh
from llama.parallel.shards import local_part
from llama.recipe import lay_out
from tests.dist import harness
from tests.dist.layouts import recipe

# name -> (ranks, what changes in the recipe); the vocabulary of 250 is cut unevenly and padded differently
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp3_uneven": (3, {"train__global_batch_size": 6, "model__vocab_multiple": 1}),
    "tp2_fsdp2_padded": (4, {"parallel__tensor_parallel": 2, "model__vocab_multiple": 128}),
    "tp2_fsdp2_tied": (4, {"parallel__tensor_parallel": 2, "model__tie_embeddings": True}),
    "hsdp2x2": (4, {"parallel__replicate": 2, "parallel__shard": 2}),
    "pp2_fsdp2_tied": (4, {"parallel__pipeline_parallel": 2, "model__tie_embeddings": True}),
    "pp2_zbv_tied": (
        2,
        {
            "parallel__pipeline_parallel": 2,
            "parallel__pipeline_schedule": "zbv_zero_bubble",
            "model__tie_embeddings": True,
        },
    ),
}


def _import_and_save(rank: int, config: Recipe, folder: Path, checkpoint: Path) -> list[tuple[str, Any, torch.Tensor]]:
    """Every part this rank holds, the second copy of a tied embedding included; saves a checkpoint."""
    mesh = build_mesh(lay_out(config, torch.distributed.get_world_size()), "cpu")
    model = parallelize(config, mesh, find_device("cpu"), hf.checkpoint_reader(folder, config.model))
    state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(state, checkpoint_id=checkpoint)
    parts = ((name, *local_part(parameter)) for name, parameter in model.optimized_parameters())
    return [(name, box, local.detach().clone()) for name, local, box in parts]


@pytest.mark.parametrize("name", LAYOUTS)
def test_import_over_a_layout_and_export(name: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[name]
    config = recipe(**changes)
    torch.manual_seed(3)
    model = Llama(config.model)
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter)
        if key in ("embed.weight", "head.weight"):
            parameter.data[config.model.vocab_size :] = 0
    hf.save_model(model, tmp_path / "in", "float32", max_shard_size=20_000)

    whole = model.state_dict()
    for parts in harness.run(ranks, _import_and_save, config, tmp_path / "in", tmp_path / "step"):
        for key, box, local in parts:
            assert torch.equal(local, whole[key][box]), (key, box)

    hf.export(tmp_path / "step", config, tmp_path / "out", "float32")
    before = {k: t for file in (tmp_path / "in").glob("*.safetensors") for k, t in load_file(file).items()}
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
