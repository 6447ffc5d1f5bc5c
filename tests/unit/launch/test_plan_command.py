"""herd plan: what fits and what does not, what is refused, the search's order and reasons, its picture and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from launch.plan import command
from llama.plan.estimate import Place, estimate
from llama.plan.nodes import node_type
from llama.plan.speed import rates_of
from llama.plan.suggest import CLOSE, reasons, suggest
from llama.recipe import load

TRN2 = ["--nodes", "4", "--node-type", "trn2.48xlarge", "--formulas"]
GPU = ["--nodes", "4", "--node-type", "8xh100", "--formulas"]
ZERO_BUBBLE = [
    "parallel.pipeline_parallel=2", "parallel.pipeline_schedule=interleaved_zero_bubble", "parallel.stages_per_rank=2",
    "train.activation_checkpointing=none", "train.micro_batch_size=1",
]  # fmt: skip


def plan(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, list(words))
    if isinstance(done.exception, UserError):
        return done.exception.code, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_a_recipe_that_fits_is_told_with_memory_time_and_cost() -> None:
    code, out = plan("llama3.1_8b_trn2", *TRN2)
    assert code == 0
    for said in (
        "256 ranks, fsdp64_tp4",
        "it fits",
        "tokens/s",
        "node-hours",
        "checkpoint",
        "assumed",
        "of 24.0 GiB a rank",
    ):
        assert said in out


def test_json_holds_all_of_it_and_adds_up() -> None:
    code, out = plan("llama3.1_70b_gpu", *GPU, "--json")
    found: dict[str, Any] = json.loads(out)
    memory = found["memory"]
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "fragments", "base")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert code == (0 if found["fits"] else 1) and found["fits"] == (memory["total"] <= memory["limit"])
    steps = found["step_seconds"]
    assert steps["total"] == pytest.approx(sum(v for k, v in steps.items() if k not in ("total", "overlapped")))


def test_what_does_not_fit_ends_with_1_and_says_where_to_look() -> None:
    code, out = plan("llama3.1_405b_gpu", "--nodes", "8", "--node-type", "8xa100-40", "--formulas")
    assert code == 1 and "IT DOES NOT FIT" in out and "--suggest" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama3.1_8b_trn2", "--node-type", "trn9"], "trn9"),
        (["llama3.1_8b_trn2", *TRN2, "train.global_batch_size=1000"], "is not a multiple of"),
        (["llama3.1_8b_trn2", *TRN2, "parallel.pipeline_parallel=2"], "nobody has shown on neuron"),
        (["llama3.1_8b_trn2", *TRN2, "parallel.tensor_parallel=16"], "does not divide model.num_kv_heads"),
        (["no_such_recipe", *TRN2], "no recipe"),
        (["llama3.1_8b_gpu", "--mfu", "0.4", "--node-type", "cpu"], "--calibrate"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(words: list[str], said: str) -> None:
    code, out = plan(*words)
    assert code == 2 and said in out and "Traceback" not in out


def test_a_schedule_that_this_torch_cannot_run_dry_is_planned_by_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.device._ZERO_BUBBLE", False)
    words = ["llama3.2_1b_gpu", *GPU, *ZERO_BUBBLE]
    code, out = plan(*(word for word in words if word != "--formulas"))
    assert code == 1 and "older than 2.13" in out and "--formulas" in out
    assert plan(*words)[0] == 0


def test_a_machine_that_nobody_measured_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    code, out = plan("tiny_cpu", "--processes", "2")
    assert code == 2 and "herd plan --calibrate --processes 2" in out


def test_a_shell_recipe_is_planned_as_it_would_be_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3] / "slurm")
    code, out = plan("./llama_7b.sh", *GPU)
    assert code == 0 and "llama2_7b_gpu" in out


@pytest.mark.parametrize(("name", "node"), [("llama3.2_1b_gpu", "8xh100"), ("llama3.1_8b_trn2", "trn2.48xlarge")])
def test_the_search_finds_no_worse_than_the_recipe_and_keeps_its_numbers(name: str, node: str) -> None:
    recipe, place = load(name), Place(node_type(node), 2)
    found = suggest(recipe, place, rates_of(place.node))
    assert 1 < len(found.best) <= 5 and found.own is not None
    first = found.best[0].found
    assert first.step.total <= (1 + CLOSE) * found.own.found.step.total
    for candidate in found.best:
        tried = candidate.found.recipe
        assert candidate.found.fits and candidate.found.step.total >= first.step.total * (1 - CLOSE)
        assert tried.train.global_batch_size == recipe.train.global_batch_size and tried.model == recipe.model
        words = [f"{key}={json.dumps(value)}" for key, value in candidate.changes.items()]
        assert estimate(load(name, words), place, rates_of(place.node)).step == candidate.found.step, (
            "its overrides make it"
        )
        assert candidate is found.best[0] or reasons(found.best[0], candidate)
    assert len({c.words for c in found.best}) == len(found.best)
    assert node != "trn2.48xlarge" or all(c.found.layout.pipeline == 1 for c in found.best)


def test_the_search_is_told_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    code, out = plan("llama3.2_1b_trn2", "--node-type", "trn2", "--formulas", "--suggest", "--picture", str(picture))
    assert code == 0 and "ways to lay it out were tried" in out and "\n1. " in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("busy", "warned"), [(0.1, False), (3.0, True)])
def test_a_machine_that_is_at_work_is_measured_with_a_warning(
    busy: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (busy, 0.0, 0.0))
    monkeypatch.setattr("llama.plan.calibrate.calibrate", lambda processes: None)
    monkeypatch.setattr("llama.plan.calibrate.save_rates", lambda rates: "rates.json")
    code, out = plan("--calibrate")
    assert code == 0 and ("measure again when it is quiet" in out) == warned
