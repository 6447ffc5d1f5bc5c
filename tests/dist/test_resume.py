"""Runs that stop go on: on any layout, with the same samples in the same order, the same losses and weights."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llama.checkpoint_format import TrainState
from llama.config import Recipe
from llama.device import find_device
from llama.parallel.apply import parallelize
from llama.parallel.mesh import build_mesh
from llama.recipe import lay_out
from llama.run_folder import complete, step_of
from llama.train.checkpoint import Checkpoints
from llama.train.optim import build_optimizer
from tests.dist import harness
from tests.dist.layouts import recipe
from tests.dist.runs import (
    Record,
    run_recipe,
    samples_of,
    spied_train,
    spied_train_stopped,
    whole_weights,
    write_tokens,
)

TIED = {"model__tie_embeddings": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "fsdp2": (2, {}),
    "sp2": (2, {"parallel__tensor_parallel": 2}),
    "pp2": (2, {"parallel__pipeline_parallel": 2}),
    "pp2_zbv": (2, {"parallel__pipeline_parallel": 2, "parallel__pipeline_schedule": "zbv_zero_bubble"}),
    "fsdp2_sp2": (4, {"parallel__tensor_parallel": 2}),
    "replicate2": (2, {"parallel__replicate": 2}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def uninterrupted(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name, tied -> (run folder, records) of six steps with a checkpoint at the third."""
    done: dict[tuple[str, bool], tuple[Path, list[Record]]] = {}

    def run(name: str, tied: bool) -> tuple[Path, list[Record]]:
        if (name, tied) not in done:
            folder = tmp_path_factory.mktemp(name)
            world, changes = LAYOUTS[name]
            config = run_recipe(folder, prefix, **changes, **(TIED if tied else {}))
            done[name, tied] = folder, harness.run(world, spied_train, config)
        return done[name, tied]

    return run


def _resumed(folder: Path, at: int, target: Path) -> Path:
    """A copy of the run as it was when it had just saved step `at`."""
    shutil.copytree(folder, target)
    for checkpoint in complete(target):
        if step_of(checkpoint) > at:
            shutil.rmtree(checkpoint)
    return target


@pytest.mark.parametrize(
    ("saved", "tied", "resumed"),
    [
        ("fsdp2", False, "single"),
        ("fsdp2", False, "sp2"),
        ("fsdp2", False, "pp2"),
        ("fsdp2", False, "fsdp2_sp2"),
        ("pp2", True, "fsdp2"),
        ("pp2", True, "pp2_zbv"),
        ("pp2", True, "sp2"),
    ],
)
def test_a_run_goes_on_over_another_layout(
    saved: str, tied: bool, resumed: str, uninterrupted: Any, prefix: str, tmp_path: Path
) -> None:
    if "zbv" in resumed and not find_device("cpu").zero_bubble:
        pytest.skip("zero-bubble pipelines need torch 2.13 or newer")
    folder, whole = uninterrupted(saved, tied)
    world, changes = LAYOUTS[resumed]
    config = run_recipe(
        _resumed(folder, 3, tmp_path / "run"), prefix, **changes, **(TIED if tied else {})
    )  # fmt: skip
    second = harness.run(world, spied_train, config)

    assert [r.step for r in second[0].reports] == [4, 5, 6]
    expected = {n: value for n, value in samples_of(whole).items() if n >= 3 * 8}
    assert samples_of(second) == expected and len(expected) == 3 * 8
    for record in second:
        assert record.losses == pytest.approx(whole[0].losses[3:], rel=1e-5)
        assert record.state is not None and record.state.trained_tokens == whole[0].state.trained_tokens
        assert [r.lr for r in record.reports] == [r.lr for r in whole[0].reports[3:]]
    before, after = whole_weights(whole), whole_weights(second)
    for name, value in after.items():
        same = before.get(name, before["embed.weight"])
        assert torch.allclose(value, same, rtol=1e-3, atol=2e-5), f"{name}: {(value - same).abs().max():.1e}"
    if tied and "head.weight" in after:
        assert torch.equal(after["head.weight"], after["embed.weight"])


BIT_EQUAL = {
    "fsdp2": ("fsdp2", {}),
    "pp2_tied": ("pp2", TIED),
    "fsdp2_bf16_mixed": ("fsdp2", {"train__precision": "bf16_mixed"}),
    "fsdp2_bf16_sr": ("fsdp2", {"train__precision": "bf16_sr"}),
    "pp2_tied_bf16_sr_states": ("pp2", {"train__precision": "bf16_sr", "optimizer__state_dtype": "bfloat16", **TIED}),
    "replicate2_bf16_sr": ("replicate2", {"train__precision": "bf16_sr"}),
}


@pytest.mark.parametrize("name", BIT_EQUAL)
def test_on_the_same_layout_a_resumed_run_is_bit_equal_and_its_loss_falls(
    name: str, prefix: str, tmp_path: Path
) -> None:
    layout, changes = BIT_EQUAL[name]
    world, axes = LAYOUTS[layout]
    config = run_recipe(tmp_path / "whole", prefix, **axes, **changes)
    whole = harness.run(world, spied_train, config)
    assert whole[0].losses[-1] < whole[0].losses[0] - 0.1
    folder = _resumed(tmp_path / "whole", 3, tmp_path / "second")
    second = harness.run(world, spied_train, config.model_copy(update={"run_dir": str(folder)}))
    for before, after in zip(whole, second, strict=True):
        assert before.losses[3:] == after.losses
        assert before.state == after.state
        for key, (box, value) in after.weights.items():
            assert before.weights[key][0] == box
            assert torch.equal(before.weights[key][1], value), key
    _expect_equal_copies(whole, layout)


def _expect_equal_copies(records: list[Record], layout: str) -> None:
    """Ranks that hold copies hold the same bits, stochastic rounding or not."""
    first, last = records[0].weights, records[-1].weights
    if layout == "replicate2":
        assert all(torch.equal(first[name][1], last[name][1]) for name in first)
    if layout == "pp2":
        assert torch.equal(first["embed.weight"][1], last["head.weight"][1])


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_a_signal_on_one_rank_stops_all_after_the_same_step_and_the_run_goes_on(
    layout: str, uninterrupted: Any, prefix: str, tmp_path: Path
) -> None:
    world, changes = LAYOUTS[layout]
    config = run_recipe(tmp_path, prefix, checkpoint__interval=0, **changes)
    first = harness.run(world, spied_train_stopped, config)
    assert [record.outcome.step for record in first if record.outcome] == [3, 3]
    assert first[1].outcome is not None and first[1].outcome.stopped_by == "SIGTERM"
    assert first[0].outcome is not None and first[0].outcome.stopped_by == "another rank's signal"
    assert [step_of(folder) for folder in complete(tmp_path)] == [3]
    second = harness.run(world, spied_train, config)
    whole = uninterrupted(layout, False)[1]
    assert first[0].losses + second[0].losses == whole[0].losses
    assert [step_of(folder) for folder in complete(tmp_path)] == [3, 6]


def test_validation_between_steps_changes_nothing_of_the_training(
    uninterrupted: Any, prefix: str, tmp_path: Path
) -> None:
    for layout in ("fsdp2", "pp2"):
        world, changes = LAYOUTS[layout]
        changes = changes | {"validation__interval": 2, "validation__batches": 1}
        validated = harness.run(world, spied_train, run_recipe(tmp_path / layout, prefix, **changes))
        plain = uninterrupted(layout, False)[1]
        for with_it, without in zip(validated, plain, strict=True):
            assert with_it.outcome is not None and 0 < with_it.outcome.validation_loss < 10
            assert with_it.losses == without.losses
            assert all(torch.equal(v, without.weights[k][1]) for k, (_, v) in with_it.weights.items())


def _save_then_change(rank: int, folder: Path, background: bool) -> float:
    """Save, change every value right after save() has returned, and let only then the writing begin."""
    config = recipe(checkpoint__save_async=background).model_copy(update={"run_dir": str(folder)})
    mesh = build_mesh(lay_out(config, torch.distributed.get_world_size()), "cpu")
    model = parallelize(config, mesh, find_device("cpu"))
    optimizer = build_optimizer(model, config, find_device("cpu"))
    changed = threading.Event()

    class Late(Checkpoints):
        def _write(self, *args: Any) -> None:
            assert not background or changed.wait(30)
            super()._write(*args)

    state = TrainState(step=1, updates=1, recent_losses=[4.0])
    checkpoints = Late(folder, config, model, optimizer)
    for number, tensor in enumerate(checkpoints._tensors().values()):
        tensor.fill_(number)
    for turn in range(2):  # the second time the copies of the first are used again
        changed.clear()
        state.step += turn
        checkpoints.save(state)
        for tensor in checkpoints._tensors().values():
            tensor.add_(1000) if turn else tensor.add_(0.5)
        state.updates, state.recent_losses[0] = 99, 7.0
        changed.set()
        checkpoints.wait()
        state.updates = 1
    return 0.0


def test_a_checkpoint_in_the_background_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    for name, background in (("async", True), ("sync", False)):
        harness.run(2, _save_then_change, tmp_path / name, background)
    for step, extra in (("step-00000001", 0.0), ("step-00000002", 0.5)):
        folders = [tmp_path / name / "checkpoints" / step for name in ("async", "sync")]
        found = [_read_plain(folder) for folder in folders]
        assert found[0].keys() == found[1].keys() and len(found[0]) > 50
        for number, key in enumerate(found[0]):
            assert torch.equal(found[0][key], found[1][key])
            assert found[0][key].unique().tolist() == [list(found[0]).index(key) + extra], number
    manifest = (tmp_path / "async/checkpoints/step-00000001/herd.json").read_text()
    assert '"updates": 1,' in manifest and "7.0" not in manifest


def _read_plain(folder: Path) -> dict[str, torch.Tensor]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: torch.full(value.size, torch.nan) for key, value in metadata.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    order = list(_names())
    return {key: tensors[key] for key in sorted(tensors, key=order.index)}


def _names() -> Any:
    from llama.model.llama import Llama

    with torch.device("meta"):
        for name, _ in Llama(recipe().model).named_parameters():
            yield f"model.{name}"
            yield f"optimizer.{name}.exp_avg"
            yield f"optimizer.{name}.exp_avg_sq"


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HERD_DEVICE", "cpu")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _steps(config: Recipe) -> list[int]:
    return [step_of(folder) for folder in complete(Path(config.run_dir))]


def test_the_last_checkpoints_are_kept_and_every_nth(one_rank: None, prefix: str, tmp_path: Path) -> None:
    changes = {"train__steps": 9, "checkpoint__interval": 1, "checkpoint__keep_last": 2, "checkpoint__keep_every": 4}
    config = run_recipe(tmp_path, prefix, **changes)
    spied_train(0, config)
    assert _steps(config) == [4, 8, 9]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{n:08d}" for n in (4, 8, 9)}


def test_no_checkpoint_is_written_when_none_is_wanted(one_rank: None, prefix: str, tmp_path: Path) -> None:
    config = run_recipe(tmp_path, prefix, train__steps=2, checkpoint__interval=0, checkpoint__at_end=False)
    assert spied_train(0, config).error is None
    assert _steps(config) == []


def test_a_finished_run_started_again_does_nothing(one_rank: None, prefix: str, tmp_path: Path) -> None:
    config = run_recipe(tmp_path, prefix, train__steps=2)
    spied_train(0, config)
    again = spied_train(0, config)
    assert again.reports == [] and again.outcome is not None and again.outcome.step == 2


def test_the_guards_memory_survives(one_rank: None, prefix: str, tmp_path: Path) -> None:
    config = run_recipe(tmp_path, prefix, train__steps=3)
    first = spied_train(0, config)
    assert first.state is not None and first.state.recent_losses == first.losses
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    second = spied_train(0, longer)
    assert second.state is not None and second.state.recent_losses == first.losses + second.losses


def test_a_longer_run_goes_on_in_the_order_it_began_with(one_rank: None, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path, documents=8)
    short = run_recipe(tmp_path / "a", prefix, train__steps=2)
    first = spied_train(0, short)
    longer = run_recipe(tmp_path / "a", prefix, train__steps=8)  # 64 samples, past what was laid out
    second = spied_train(0, longer.model_copy(update={"schedule": short.schedule}))
    assert second.error is None and second.state is not None and second.state.order_samples == 16
    at_once = spied_train(0, run_recipe(tmp_path / "b", prefix, train__steps=8, data__order_samples=16))
    assert samples_of([first, second]) == samples_of([at_once])
    refused = spied_train(0, run_recipe(tmp_path / "a", prefix, train__steps=9, data__order_samples=72))
    assert refused.error is not None and "this run began with 16" in refused.error
