"""Formulas against the real code run dry: the same products and collectives, nearly the same bytes at the worst moment."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest

from llama import recipe as recipes
from llama.config import Recipe
from llama.plan.analytic import foresee, host_memory, representatives
from llama.plan.counts import Counts
from tests.dist.layouts import skip_unless_trainable

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    },
    "data": {"seq_length": 128},
    "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "loss_chunk": 128},
}  # fmt: skip
FP32, FULL, SELECTIVE = (
    {"train.precision": "fp32"}, {"train.activation_checkpointing": "full"}, {"train.activation_checkpointing": "selective"},
)  # fmt: skip
TP, PIPE = {"parallel.tensor_parallel": 2}, {"parallel.pipeline_parallel": 2, "train.global_batch_size": 8}
ALL = {"lora.rank": 8, "lora.targets": ["all-linear"]}


def recipe(keys: dict[str, Any]) -> Recipe:
    raw: dict[str, Any] = {section: dict(v) if isinstance(v, dict) else v for section, v in RECIPE.items()}
    for key, value in keys.items():
        section, _, leaf = key.partition(".")
        raw.setdefault(section, {})[leaf] = value
    return Recipe.model_validate(raw)


# What each is about, overrides, ranks, the rank that is looked at.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "fp32": (FP32 | {"train.global_batch_size": 2}, 1, 0),
    "mixed_accumulating": ({}, 1, 0),
    "fsdp3_uneven_rows": (FP32 | {"train.global_batch_size": 12}, 3, 2),
    "hsdp2x2": ({"parallel.replicate": 2, "parallel.shard": 2, "train.global_batch_size": 16}, 4, 0),
    "tied_tp2_fsdp2": (TP | {"model.tie_embeddings": True}, 4, 0),
    "tp2_whole_sequences_fsdp2": (TP | {"parallel.sequence_parallel": False}, 4, 0),
    "full_tp2_fsdp2": (TP | FULL, 4, 0),
    "pp2_first": (PIPE | FP32, 2, 0),
    "pp2_last_fsdp2_selective": (PIPE | SELECTIVE | {"train.global_batch_size": 16}, 4, 2),
    "gpipe2_full_tp2": (PIPE | TP | FULL | {"parallel.pipeline_schedule": "gpipe"}, 4, 0),
    "interleaved2_fsdp2": (
        PIPE | {"parallel.pipeline_schedule": "interleaved_1f1b", "model.num_layers": 4, "train.global_batch_size": 16}, 4, 2,
    ),
    "zbv2_tied": (
        PIPE | FP32
        | {"parallel.pipeline_schedule": "zbv_zero_bubble", "model.num_layers": 4, "model.tie_embeddings": True}, 2, 0,
    ),
    "lora_tp2": (ALL | TP, 2, 0),
    "qlora_full_fsdp2": (ALL | FULL | {"lora.quantize": "nf4"}, 2, 0),
    "dora_dropout": ({"lora.rank": 8, "lora.dora": True, "lora.dropout": 0.1}, 1, 0),
    "frozen_ends": (FP32 | {"train.freeze": ["embed_tokens", "layers.0", "norms"]}, 1, 0),
}  # fmt: skip


def collectives(counts: Counts) -> Counter[tuple[str, str, int, int]]:
    """By what they are. Four bytes over a pipeline are torch's greeting in a schedule's first step, which a count sees."""
    found: Counter[tuple[str, str, int, int]] = Counter()
    for c in counts.collectives:
        if (c.axis, c.bytes) != ("pp", 4):
            found[c.kind, c.axis, c.ranks, c.bytes] += c.calls
    return found


@pytest.mark.parametrize("case", CASES)
def test_formulas_give_what_the_dry_run_counts(case: str) -> None:
    from llama.plan.dry import count

    keys, world, rank = CASES[case]
    tiny = recipe(keys)
    skip_unless_trainable(tiny)
    dry, mine = count(tiny, world, rank), foresee(tiny, world, rank)
    assert mine.stage == dry.stage
    products = [Counter({(p.kind, p.shape, p.dtype): p.calls for p in c.products}) for c in (mine, dry)]
    assert products[0] == products[1]
    assert mine.flops == dry.flops
    assert collectives(mine) == collectives(dry)
    a, b = mine.memory, dry.memory
    assert (a.weights, a.optimizer) == (b.weights, b.optimizer)
    if "zero_bubble" not in tiny.parallel.pipeline_schedule and "zbv" not in case:
        assert a.gradients == b.gradients  # those schedules set them where a count cannot see that they are gradients
    assert a.peak == pytest.approx(b.peak, rel=0.05)
    assert mine.moved == pytest.approx(dry.moved, rel=0.2 if tiny.lora.rank else 0.15)
    if not tiny.lora.rank:
        assert mine.operators == pytest.approx(dry.operators, rel=0.2)


def test_hundreds_of_layouts_of_a_large_model_take_a_moment_and_no_torch() -> None:
    large = recipes.load("configs/llama3.1_70b_gpu.yaml")
    started, counts = time.process_time(), 0
    for tp, pp, mode in itertools.product((1, 2, 4, 8), (1, 2, 8), ("none", "selective", "full")):
        parallel = large.parallel.model_copy(
            update={"tensor_parallel": tp, "pipeline_parallel": pp, "shard": None, "replicate": 1}
        )
        train = large.train.model_copy(update={"activation_checkpointing": mode, "micro_batch_size": 1})
        layout = large.model_copy(update={"parallel": parallel, "train": train})
        ranks = representatives(layout, 64)
        assert len(ranks) == pp
        counts += len([foresee(layout, 64, rank) for rank in ranks])
    assert counts == 132
    assert time.process_time() - started < 132 * 0.02
    code = "import sys, llama.plan.analytic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checkpointing_saves_memory_and_costs_products() -> None:
    none, selective, full = (
        foresee(recipe({"train.activation_checkpointing": mode, "model.num_layers": 8, "train.micro_batch_size": 4}), 1)
        for mode in ("none", "selective", "full")
    )
    assert none.memory.peak > selective.memory.peak > full.memory.peak
    assert none.flops == selective.flops < full.flops


def test_compiled_blocks_keep_of_selective_checkpointing_what_backward_reads() -> None:
    """Of each block neither the last product nor, under tensor parallelism, what is summed over the ranks."""
    for ranks, spared in ((1, 1), (2, 5)):  # in parts of a rank's stream: down; o and down whole, and what joins down
        keys = SELECTIVE | {"parallel.tensor_parallel": ranks, "model.num_layers": 8, "train.micro_batch_size": 4}
        eager, compiled = (foresee(recipe(keys | {"train.compile": c}), ranks).memory.peak for c in (False, True))
        stream = 2 * 4 * 128 * 64 // ranks
        assert eager - compiled == pytest.approx(8 * spared * stream, rel=0.2)


def test_a_first_stage_holds_as_many_micro_batches_as_the_pipeline_is_long() -> None:
    keys = {"parallel.pipeline_parallel": 4, "model.num_layers": 8, "train.global_batch_size": 32}
    activations = [foresee(recipe(keys), 4, rank).memory.activations for rank in representatives(recipe(keys), 4)]
    assert activations[:3] == sorted(activations[:3], reverse=True)
    gpipe = foresee(recipe(keys | {"parallel.pipeline_schedule": "gpipe"}), 4, 0)
    assert gpipe.memory.activations > 2 * activations[0]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_under_zero_bubble_is_refused_with_a_remedy(mode: str) -> None:
    keys = PIPE | {
        "parallel.pipeline_schedule": "interleaved_zero_bubble", "model.num_layers": 4, "train.activation_checkpointing": mode,
    }  # fmt: skip
    with pytest.raises(ValueError, match="none"):
        recipe(keys)


def test_a_node_needs_memory_for_each_of_its_processes() -> None:
    small = recipe(FP32 | {"train.global_batch_size": 8})
    one, four = host_memory(small, 4, 1, False), host_memory(small, 4, 4, False)
    assert four == {name: 4 * size for name, size in one.items()}
    # The staged copy: weights and both moments in fp32, a quarter of the rows on each rank.
    assert one["checkpoint"] == 3 * foresee(small, 4).memory.weights
    assert host_memory(small, 4, 4, True)["training"] == 4 * foresee(small, 4).memory.peak
