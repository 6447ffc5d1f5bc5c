"""Every recipe for Trainium at its real number of ranks: the real code builds and steps, and what a rank holds fits.

The code runs on a fake process group, without memory (llama/plan/dry.py); depths are foreseen by formulas, which
tests/unit/llama/plan holds to the counts.
"""

from __future__ import annotations

import re

import pytest

from llama.config import Recipe
from llama.plan.analytic import foresee
from llama.plan.dry import count
from llama.plan.nodes import node_type
from llama.recipe import CONFIGS, lay_out, load
from tests.unit.test_configs import NODES

RANKS, NODE = 64, node_type("trn2.48xlarge")
RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*_trn2.yaml"))}
STATED = {name: [int(count) for count in NODES.findall(text)[0][0].split(",")] for name, text in RECIPES.items()}


def short(recipe: Recipe, world: int) -> Recipe:
    """The recipe with two layers and two micro-batches a step."""
    batch = 2 * lay_out(recipe, world).data * recipe.train.micro_batch_size
    changes = {"model": {"num_layers": 2}, "train": {"global_batch_size": batch}}
    return recipe.model_copy(update={key: getattr(recipe, key).model_copy(update=new) for key, new in changes.items()})


@pytest.mark.parametrize("name", RECIPES)
def test_the_code_steps_on_as_many_ranks_as_the_recipe_states_at_most(name: str) -> None:
    recipe, world = load(name), STATED[name][-1] * RANKS
    layout = lay_out(recipe, world)
    counted = count(short(recipe, world), world, world - 1, "neuron")
    sizes = {collective.axis: collective.ranks for collective in counted.collectives}
    assert sizes == {"tp": layout.tensor, "dp_shard": layout.shard, "world": world}
    kinds = {collective.kind for collective in counted.collectives}
    assert kinds == {"all_gather", "reduce_scatter", "all_reduce"}, "no send, no all_to_all: see docs/trainium.md"


def test_the_code_steps_at_full_depth_too() -> None:
    recipe = load("llama3.2_1b_trn2", ["train.global_batch_size=32"])
    counted, foreseen = count(recipe, RANKS, 0, "neuron"), foresee(recipe, RANKS)
    assert counted.memory.peak == pytest.approx(foreseen.memory.peak, rel=0.1)
    assert counted.memory.peak < NODE.memory


@pytest.mark.parametrize("name", RECIPES)
def test_a_rank_has_room_on_each_number_of_nodes_that_the_recipe_states(name: str) -> None:
    recipe = load(name)
    for nodes in STATED[name]:
        assert nodes * NODE.ranks == nodes * RANKS
        peak = foresee(recipe, nodes * RANKS).memory.peak
        assert peak < NODE.memory, f"{name} on {nodes} nodes: {peak / 2**30:.1f} GiB of a rank's 24"


@pytest.mark.parametrize("name", [name for name, text in RECIPES.items() if "of state" in text])
def test_a_recipe_s_comment_says_what_a_rank_holds(name: str) -> None:
    text = RECIPES[name]
    nodes = int(re.search(r"^# Laid out for (\d+) node", text, re.M)[1])  # type: ignore[index]
    memory, recipe = foresee(load(name), nodes * RANKS).memory, load(name)
    state = float(re.search(r"([\d.]+) GB of state", text)[1])  # type: ignore[index]
    assert (memory.weights + memory.gradients + memory.optimizer) / 1e9 == pytest.approx(state, abs=0.06)
    if inputs := re.search(r"([\d.]+) GB of block inputs", text):
        cut = recipe.train.micro_batch_size * recipe.data.seq_length // recipe.parallel.tensor_parallel
        held = recipe.model.num_layers * cut * recipe.model.hidden_size * 2
        assert held / 1e9 == pytest.approx(float(inputs[1]), abs=0.06) and held < memory.activations
