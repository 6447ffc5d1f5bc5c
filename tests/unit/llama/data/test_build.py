"""From recipe to batches: Megatron's order end to end, and one clear line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import UserError
from llama.config import Recipe
from llama.data.build import build_data


def recipe(train: Any, **changes: Any) -> Recipe:
    """A small recipe; changes are section__key=value."""
    keys: dict[str, Any] = {
        "name": "test",
        "model": {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1},
        "data": {"train": train, "seq_length": 32, "seed": 9, "split": "90,10,0"},
        "train": {"steps": 20, "global_batch_size": 6, "micro_batch_size": 2},
        "validation": {"interval": 5, "batches": 2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        keys[section][name] = value
    return Recipe.model_validate(keys)


def note(prefix: str, **meta: Any) -> None:
    Path(f"{prefix}.meta.json").write_text(json.dumps(meta))


def rows(batches: Any, cursor: int) -> list[list[int]]:
    return [row.tolist() for batch in batches.step(cursor) for row in batch.tokens]


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]], ids=["one_file", "blend"])
@pytest.mark.parametrize("separate", [False, True], ids=["split", "separate_validation"])
def test_a_recipe_gives_megatrons_batches(
    token_file: Callable[..., str], megatron: SimpleNamespace, weights: list[float] | None, separate: bool
) -> None:
    prefixes = [token_file([40 + 7 * k] * (60 + k), f"source{k}") for k in range(len(weights or [1]))]
    held_out = token_file([33] * 30, "held_out")
    files = [{"path": p, "weight": w} for p, w in zip(prefixes, weights or [1.0], strict=True)]
    options: dict[str, Any] = {"blend": (prefixes, weights), "split": "90,10,0"}
    if separate:
        options = {"blend_per_split": [(prefixes, weights), ([held_out], None), None]}
    their_train, their_validation, _ = megatron.build((120, 12, 0), random_seed=9, sequence_length=32, **options)
    train, validation = build_data(recipe(files, **({"data__validation": held_out} if separate else {})), 0, 1)
    assert validation is not None
    for ours, theirs, cursors in ((train, their_train, (0, 6, 114)), (validation, their_validation, (0, 6))):
        for cursor in cursors:
            assert rows(ours, cursor) == [theirs[i]["tokens"].tolist() for i in range(cursor, cursor + 6)]


def test_ranks_share_a_step_and_no_validation_is_built_when_it_never_runs(token_file: Callable[..., str]) -> None:
    prefix = token_file([40] * 60)
    run = recipe(prefix, validation__interval=0)
    whole, none = build_data(run, 0, 1)
    assert none is None
    parts = [rows(build_data(run, rank, 3)[0], 12) for rank in range(3)]
    assert [row for part in parts for row in part] == rows(whole, 12)
    assert whole.fingerprint == build_data(run, 2, 3)[0].fingerprint


def test_a_longer_run_keeps_the_order_when_order_samples_is_kept(token_file: Callable[..., str]) -> None:
    prefix = token_file([40] * 60)
    short, long = (build_data(recipe(prefix, train__steps=n, data__order_samples=120), 0, 1)[0] for n in (20, 500))
    assert all(rows(short, cursor) == rows(long, cursor) for cursor in (0, 60, 114))
    assert short.fingerprint == long.fingerprint
    assert len(rows(long, 2994)) == 6


def test_the_end_of_document_id_comes_from_the_sidecar(token_file: Callable[..., str]) -> None:
    prefix = token_file([10] * 200)
    note(prefix, tokenizer="t.model", vocab_size=1000, eod=0)
    train, _ = build_data(recipe(prefix, data__document_mask=True), 0, 1)
    (batch, *_) = train.step(0)
    assert int(batch.documents.max()) >= 3 and int(batch.positions.max()) <= 9
    assert build_data(recipe(prefix, data__document_mask=True, data__eod=999), 0, 1)[0].eod == 999


def test_no_file_named_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.train names no token file; set data\.train=PREFIX, .*herd prep tokenize"
    ):
        build_data(recipe([]), 0, 1)


def test_a_missing_shard_is_told_with_the_command_that_makes_it(token_file: Callable[..., str], tmp_path: Path) -> None:
    prefix = token_file([40] * 60)
    with pytest.raises(UserError, match=rf"gone\.idx does not exist; .*herd prep tokenize .*--output {tmp_path}/gone$"):
        build_data(recipe([prefix, str(tmp_path / "gone")]), 0, 1)
    with pytest.raises(UserError, match=r"gone\.idx does not exist"):
        build_data(recipe(prefix, data__validation=str(tmp_path / "gone")), 0, 1)


def test_too_little_text_is_told(token_file: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"text: sequences 0\.\.3 hold 18 tokens, fewer than the 33 of one sample"):
        build_data(recipe(token_file([6] * 3)), 0, 1)


@pytest.mark.parametrize("split", ["100", "99999,1"])
def test_a_split_without_validation_is_told(token_file: Callable[..., str], split: str) -> None:
    with pytest.raises(
        UserError, match=r"leaves no validation part of .*text \(60 sequences\); .*validation\.interval=0"
    ):
        build_data(recipe(token_file([40] * 60), data__split=split), 0, 1)


def test_ids_beyond_the_vocabulary_are_told_before_the_first_step(token_file: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"text holds token id \d+ .*ids are 0\.\.99; set model\.vocab_size"):
        build_data(recipe(token_file([40] * 60), model__vocab_size=100), 0, 1)


SIDECARS = {
    "larger_vocabulary": ({"vocab_size": 1001}, {}, r"says the tokenizer has 1001 ids, .* set model\.vocab_size=1001"),
    "no_eod": ({}, {"data__document_mask": True}, r"data\.document_mask=true needs .*; set data\.eod"),
    "no_eod_in_file": (
        {"eod": 0, "append_eod": False},
        {"data__document_mask": True},
        r"text\.bin was written without end-of-document ids, .* tokenize again without --no-eod",
    ),
    "eod_too_large": ({"eod": 1000}, {"data__mask_eod_loss": True}, r"id 1000 is beyond model\.vocab_size=1000"),
    "recipe_eod_too_large": ({"eod": 0}, {"data__eod": 5000}, r"id 5000 is beyond model\.vocab_size=1000"),
}


@pytest.mark.parametrize(("meta", "changes", "message"), SIDECARS.values(), ids=SIDECARS)
def test_a_sidecar_that_does_not_fit_is_told(
    token_file: Callable[..., str], meta: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    prefix = token_file([40] * 60)
    note(prefix, **meta)
    with pytest.raises(UserError, match=message) as caught:
        build_data(recipe(prefix, **changes), 0, 1)
    assert "\n" not in str(caught.value)


def test_files_of_two_tokenizers_are_told(token_file: Callable[..., str]) -> None:
    one, two = token_file([40] * 60, "one"), token_file([40] * 60, "two")
    note(one, eod=0)
    note(two, eod=2)
    with pytest.raises(UserError, match=r"different ids \(0 in .*one\.meta\.json, 2 in .*two\.meta\.json\)"):
        build_data(recipe([one, two], data__mask_eod_loss=True), 0, 1)


def test_a_damaged_sidecar_is_told(token_file: Callable[..., str]) -> None:
    prefix = token_file([40] * 60)
    Path(f"{prefix}.meta.json").write_text("{")
    with pytest.raises(UserError, match=r"text\.meta\.json: cannot be read: .*; remove it"):
        build_data(recipe(prefix), 0, 1)
