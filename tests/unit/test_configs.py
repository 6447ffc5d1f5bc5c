"""Every recipe in configs/: it validates, lays out where it says, and has the shape that was published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
import yaml

from llama.hf.config import model_config
from llama.model.llama import count_parameters
from llama.plan.estimate import Place, estimate
from llama.plan.nodes import node_type
from llama.plan.speed import rates_of
from llama.plan.suggest import ROOM
from llama.recipe import CONFIGS, dump, lay_out, load, save

RECIPES = sorted(path.name.removesuffix(".yaml") for path in CONFIGS.glob("*.yaml"))
NODES = re.compile(r"^# nodes: (\d+(?:, \d+)*) x (\d+) ranks$", re.MULTILINE)
PLACED = {"trn2": 64, "gpu": 8}
"""Ends of the names of recipes that are laid out for a kind of node, and its ranks."""

# Facts of the published config.json files; the number of parameters is that of the published checkpoint.
LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
LLAMA3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA32 = LLAMA3 | {"rope_scaling": LLAMA3["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True}
OPENLLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def _shape(common: dict, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads} | ({"num_key_value_heads": kv_heads} if kv_heads else {})
    return common | sizes | heads_of


PUBLISHED = {
    "llama2_7b": (_shape(LLAMA2, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "llama2_13b": (_shape(LLAMA2, 5120, 13824, 40, 40, 40), 13_015_864_320),
    "llama2_70b": (_shape(LLAMA2, 8192, 28672, 80, 64, 8), 68_976_648_192),
    "llama3.1_8b": (_shape(LLAMA3, 4096, 14336, 32, 32), 8_030_261_248),
    "llama3.1_70b": (_shape(LLAMA3, 8192, 28672, 80, 64), 70_553_706_496),
    "llama3.1_405b": (_shape(LLAMA3, 16384, 53248, 126, 128), 405_853_388_800),
    "llama3.2_1b": (_shape(LLAMA32, 2048, 8192, 16, 32), 1_235_814_400),
    "llama3.2_3b": (_shape(LLAMA32, 3072, 8192, 28, 24), 3_212_749_824),
    "openllama_3b_v2": (_shape(OPENLLAMA, 3200, 8640, 26, 32, 32), 3_426_473_600),
}


def _text(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def test_every_published_shape_has_a_recipe_and_one_for_each_kind_of_node() -> None:
    assert {f"{name}{end}" for name in PUBLISHED for end in ("", *(f"_{kind}" for kind in PLACED))} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_as_its_file_and_explains_itself_first(name: str) -> None:
    assert load(name).name == name == name.lower()
    assert _text(name).startswith("# ")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(tuple(PLACED))])
def test_a_recipe_lays_out_on_each_number_of_nodes_that_it_states(name: str) -> None:
    recipe, kind = load(name), name.rpartition("_")[2]
    stated = NODES.findall(_text(name))
    assert len(stated) == 1, f"{name}.yaml needs one line such as '# nodes: 1, 2, 4 x {PLACED[kind]} ranks'"
    counts, ranks = [int(count) for count in stated[0][0].split(",")], int(stated[0][1])
    assert ranks == PLACED[kind]
    for nodes in counts:
        layout = lay_out(recipe, nodes * ranks)
        assert layout.world == nodes * ranks
        assert layout.data * layout.accumulation * recipe.train.micro_batch_size == recipe.train.global_batch_size
        assert layout.tensor <= (4 if kind == "trn2" else 8), "tensor ranks talk most: one chip, or one GPU node"
    # The comment speaks of one of these counts, with the numbers that it then has.
    laid_out = re.search(r"^# Laid out for (\d+) nodes? \((?:\d+ ranks, )?(\d+)", _text(name), re.MULTILINE)
    assert laid_out and int(laid_out[1]) in counts
    layout = lay_out(recipe, int(laid_out[1]) * ranks)
    assert int(laid_out[2]) == layout.data
    assert f"{layout.accumulation} micro-batches a step" in _text(name)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(tuple(PLACED))])
def test_a_recipe_fits_on_each_number_of_nodes_that_it_states(name: str) -> None:
    """By the formulas of `herd plan`, with the room that its suggestions leave."""
    node = node_type({"trn2": "trn2.48xlarge", "gpu": "8xh100"}[name.rpartition("_")[2]])
    for nodes in map(int, NODES.findall(_text(name))[0][0].split(",")):
        found = estimate(load(name), Place(node, nodes), rates_of(node))
        assert found.fits and found.share <= ROOM, f"{nodes} nodes: {found.share:.0%} of a rank"


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_trn2")])
def test_a_trainium_recipe_keeps_to_what_trainium_does(name: str) -> None:
    recipe = load(name)
    assert recipe.train.precision == "bf16_sr"
    assert recipe.parallel.pipeline_parallel == 1, "no pipeline was ever seen to run there"
    assert recipe.data.seq_length % 2048 == 0, "its attention kernel takes multiples of 2048"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_counts_as_many_parameters_as_the_published_checkpoint(name: str) -> None:
    assert count_parameters(load(name).model)[0] == PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_shape_that_transformers_reads_from_the_published_config(name: str, tmp_path: Path) -> None:
    transformers.LlamaConfig(**PUBLISHED[name][0]).save_pretrained(tmp_path)
    published, ours = model_config(tmp_path), load(name).model
    chosen = {"init_std", "scaled_residual_init", "vocab_multiple"}  # a run's choices, not the architecture
    assert ours.kv_heads == published.kv_heads and ours.head_size == published.head_size
    derived = chosen | {"num_kv_heads", "head_dim"}
    assert ours.model_dump(exclude=derived) == published.model_dump(exclude=derived)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith(tuple(PLACED))])
def test_a_placed_recipe_trains_as_its_base_does(name: str) -> None:
    placed, base = load(name), load(name.rpartition("_")[0])
    for part in ("model", "data", "optimizer", "schedule"):
        assert getattr(placed, part) == getattr(base, part)
    for key in ("steps", "global_batch_size", "seed"):
        assert getattr(placed.train, key) == getattr(base.train, key)
    own = yaml.safe_load(_text(name))
    assert set(own) <= {"base", "name", "train", "parallel"}, "shape and training are given once, in the base"


@pytest.mark.parametrize("name", RECIPES)
def test_a_dumped_recipe_loads_to_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe, path = load(name), tmp_path / "recipe.yaml"
    save(recipe, path)
    assert load(str(path)) == recipe
    assert dump(load(str(path))) == dump(recipe)
