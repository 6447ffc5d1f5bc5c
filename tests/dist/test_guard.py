"""Steps that must not be taken are skipped by all ranks in agreement, whichever rank saw the trouble."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama.config import Recipe
from llama.parallel.shards import local_part
from llama.run_folder import complete, step_of
from llama.train import loop
from tests.dist import harness
from tests.dist.runs import Record, run_recipe, spied_train, write_tokens


def _poisoned(rank: int, config: Recipe, poisoned: tuple[int, ...]) -> tuple[Record, list[float]]:
    """A run whose last rank finds NaN in a weight that every token meets in the `poisoned` steps alone; sums of its weights by step."""
    kept: dict[str, torch.Tensor] = {}
    sums: list[float] = []

    def act(trainer: loop.Trainer, step: int) -> None:
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        norms = (p for name, p in trainer.model.optimized_parameters() if name.endswith("attention_norm.weight"))
        shard = local_part(next(norms))[0].detach()
        if "value" in kept:
            shard.view(-1)[0] = kept.pop("value")
        parts = [local_part(p)[0].detach().double().sum() for _, p in trainer.model.optimized_parameters()]
        sums.append(float(torch.stack(parts).sum()))
        if last and step in poisoned:
            kept["value"] = shard.view(-1)[0].clone()
            shard.view(-1)[0] = torch.nan

    return spied_train(rank, config, act), sums


@pytest.mark.parametrize(
    ("layout", "axis"), [("fsdp2", {}), ("sp2", {"parallel__tensor_parallel": 2}), ("pp2", {"parallel__pipeline_parallel": 2})]
)  # fmt: skip
def test_nan_on_one_rank_is_skipped_by_all_and_changes_no_weight(
    layout: str, axis: dict[str, int], tmp_path: Path
) -> None:
    config = run_recipe(tmp_path, write_tokens(tmp_path), train__steps=4, checkpoint__interval=0, **axis)
    results = harness.run(2, _poisoned, config, (2,))
    for record, sums in results:
        assert [bool(report.skipped) for report in record.reports] == [False, True, False, False]
        assert "is nan" in (record.reports[1].skipped or "")
        assert sums[2] == sums[1]  # steps 2 and 3 begin with the same weights
        assert sums[1] != sums[0] and sums[3] != sums[2]
        assert record.state is not None
        assert (record.state.step, record.state.updates, record.state.skipped_steps) == (4, 3, 1)
        assert record.state.consumed_samples == 4 * 8  # the skipped step's samples are not read again
        assert all(value.isfinite().all() for _, value in record.weights.values())
    assert results[0][0].losses[2:] == results[1][0].losses[2:]


def test_too_many_skips_in_a_row_end_the_run_with_one_clear_error(tmp_path: Path) -> None:
    guard = {"train__guard": {"max_skips": 2}, "train__steps": 9, "checkpoint__interval": 4}
    config = run_recipe(tmp_path, write_tokens(tmp_path), **guard)
    for record, _ in harness.run(2, _poisoned, config, (2, 4, 5)):
        assert len(record.reports) == 5
        assert record.error is not None and "stopped at step 5: 2 steps in a row were skipped" in record.error
        assert "optimizer.lr" in record.error and "\n" not in record.error
    assert [step_of(folder) for folder in complete(tmp_path)] == [4]  # what was being written is on disk


def _without_gradient(rank: int, config: Recipe) -> str:
    def act(trainer: loop.Trainer, step: int) -> None:
        trainer.model.parts[0].extra = torch.nn.Parameter(torch.zeros(3))

    with pytest.raises(RuntimeError) as error:
        spied_train(rank, config, act)
    return str(error.value)


def test_a_trainable_parameter_that_no_gradient_reaches_is_an_error_by_name(tmp_path: Path) -> None:
    config = run_recipe(tmp_path, write_tokens(tmp_path), checkpoint__interval=0, checkpoint__at_end=False)
    (text,) = harness.run(1, _without_gradient, config)
    assert text == "no gradient reached 1 trainable parameters: extra"
