"""bf16 on several layouts stays near fp32 on one process: sums differ in order, so bounds, not equality."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist import harness
from tests.dist.layouts import recipe
from tests.dist.test_parity import _reference, _train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "replicate2_tied": (2, {"parallel__replicate": 2, "model__tie_embeddings": True}),
    "fsdp2_accumulated": (2, {"train__micro_batch_size": 1}),
    "sp2_masked": (2, {"parallel__tensor_parallel": 2, "data__document_mask": True}),
    "pp2_tied": (2, {"parallel__pipeline_parallel": 2, "model__tie_embeddings": True}),
    "fsdp2_sp2_remat": (4, {"parallel__tensor_parallel": 2, "train__activation_checkpointing": "selective"}),
}


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16_sr"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_stays_near_fp32(name: str, precision: str) -> None:
    world, changes = LAYOUTS[name]
    config = recipe(**changes, train__precision=precision, optimizer__lr=1e-3)
    weights = torch.bfloat16 if precision == "bf16_sr" else torch.float32
    ranks = harness.run(world, _train, config, weights)
    plain = config.model_copy(update={"parallel": recipe().parallel})
    reference = _reference(plain.model_dump_json(), torch.float32)
    for seen in ranks:
        assert seen["loss"] == pytest.approx(reference["loss"], rel=5e-3)  # all three steps
        assert seen["norm"] == pytest.approx(reference["norm"], rel=3e-2)
        for name_, (box, gradient) in seen["gradients"].items():
            own = "embed.weight" if name_ == "head.weight" and name_ not in reference["gradients"] else name_
            expected = reference["gradients"][own][box].flatten().double()
            likeness = torch.nn.functional.cosine_similarity(gradient.flatten().double(), expected, dim=0).item()
            assert likeness > 0.995, f"{name_}: cosine {likeness:.4f}"
            size = gradient.double().norm().item() / expected.norm().item()
            assert size == pytest.approx(1, abs=5e-2), f"{name_}: {size:.3f} of its length"
