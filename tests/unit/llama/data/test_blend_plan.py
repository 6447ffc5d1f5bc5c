"""Blend files: epochs, budgets and weights become exact shares, contradictions are told, the order stays Megatron's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from launch.prep.blend import command
from llama import recipe as recipes
from llama.config import Recipe, Source
from llama.data.blend import Blend, normalized
from llama.data.blend_file import open_sources, read_blend
from llama.data.blend_plan import plan_training, short, source_weights
from llama.data.build import build_data


def recipe(train: Any, steps: int = 20, **data: Any) -> Recipe:
    keys: dict[str, Any] = {
        "name": "test",
        "model": {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1},
        "data": {"train": train, "seq_length": 32, "seed": 9, "split": "100", **data},
        "train": {"steps": steps, "global_batch_size": 6, "micro_batch_size": 2},
    }
    return Recipe.model_validate(keys)


@pytest.fixture
def sources(token_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with web (8,000 tokens), code (2,000), books-1 (1,000) and books-2 (3,000); its parent is where we are."""
    for name, documents in (("web", 200), ("code", 50), ("books-1", 25), ("books-2", 75)):
        token_file([40] * documents, name)
    monkeypatch.chdir(tmp_path.parent)
    return Path(tmp_path.name)


def blend(folder: Path, text: str) -> str:
    (folder / "blend.yaml").write_text(text)
    return str(folder / "blend.yaml")


MIXED = "tokens: 19.2K\nsources:\n- {path: web, weight: 7}\n- {path: code, epochs: 2}\n- {path: books-*, tokens: 4e3}\n"


def test_epochs_budgets_and_weights_are_exact_shares_of_the_whole(sources: Path) -> None:
    run = recipe(blend(sources, MIXED), steps=100)  # 100 × 6 × 32 = 19,200 tokens
    plan = plan_training(run, open_sources(run.data.train))
    web, code, books = plan.rows
    assert [file.weight for file in plan.files] == [11_200, 4_000, 1_000, 3_000]
    assert [row.share for row in plan.rows] == pytest.approx([11.2 / 19.2, 4 / 19.2, 4 / 19.2], rel=1e-12)
    assert (web.drawn, code.drawn, books.drawn) == (11_200, 4_000, 32 * (32 + 94))  # whole samples, rounded up
    assert (code.epochs, code.repeats, books.files, books.tokens, books.asked) == (2.0, 1, 2, 4_000, "tokens 4K")
    assert not plan.warnings and plan.notes == ()


def test_the_samples_that_come_are_those_that_were_planned(sources: Path) -> None:
    run = recipe(blend(sources, MIXED), steps=100)
    train, _ = build_data(run, 0, 1)
    assert isinstance(train.samples, Blend)
    came = Counter(Path(train.samples.source(i)).name for i in range(600))
    plan = plan_training(run, open_sources(run.data.train))
    for file, share in zip(plan.files, normalized([file.weight for file in plan.files]), strict=True):
        assert abs(came[Path(file.prefix).name] - 600 * share) <= 1


def test_a_blend_gives_the_order_of_the_weights_that_it_comes_to(sources: Path) -> None:
    written = [{"path": str(sources / name), "weight": w}
               for name, w in (("web", 11_200), ("code", 4_000), ("books-1", 1_000), ("books-2", 3_000))]  # fmt: skip
    ours, theirs = build_data(recipe(blend(sources, MIXED)), 0, 1)[0], build_data(recipe(written), 0, 1)[0]
    assert ours.fingerprint == theirs.fingerprint
    changed = build_data(recipe(blend(sources, MIXED.replace("epochs: 2", "epochs: 1"))), 0, 1)[0]
    assert changed.fingerprint != ours.fingerprint


def test_weights_alone_reach_the_order_as_they_were_written(sources: Path) -> None:
    text = "- {path: web, weight: 0.7}\n- code\n"
    run = recipe(blend(sources, text))
    assert [file.weight for file in plan_training(run, open_sources(run.data.train)).files] == [0.7, 1.0]
    assert run.data.blend_tokens is None


def test_only_the_part_that_is_trained_on_counts(sources: Path) -> None:
    run = recipe(blend(sources, "- {path: code, epochs: 1}\n- {path: web, epochs: 1}\n"), steps=47, split="90,10,0")
    plan = plan_training(run, open_sources(run.data.train))
    assert [row.tokens for row in plan.rows] == [1_800, 7_200] and [file.weight for file in plan.files] == [
        1_800,
        7_200,
    ]
    assert "data.split=90,10,0: 90.0% of the documents are trained on, 10.0% kept for validation" in plan.notes[0]


def test_a_longer_run_that_goes_on_keeps_its_shares(sources: Path) -> None:
    mixed = "- {path: web, weight: 1}\n- {path: code, tokens: 960}\n"
    first = build_data(recipe(blend(sources, mixed), steps=10), 0, 1)[0]
    longer = build_data(recipe(blend(sources, mixed), steps=30, order_samples=60), 0, 1)[0]
    assert first.fingerprint == longer.fingerprint
    assert [file.weight for file in plan_training(recipe(blend(sources, mixed), steps=10),
            open_sources(recipe(blend(sources, mixed)).data.train)).files] == [960, 960]  # fmt: skip


def test_what_is_read_too_often_or_never_finished_is_said(sources: Path) -> None:
    run = recipe(blend(sources, "- {path: code, weight: 9}\n- {path: web, weight: 1}\n"), steps=100)
    plan = plan_training(run, open_sources(run.data.train))
    assert "code is read 8.64 times; above 4 epochs repeats add little (Muennighoff et al. 2023)" in plan.warnings[0]
    assert plan.notes == (f"never finished, and how much of it is read: {sources}/web 24.0%",)
    assert plan.rows[0].repeats == 8 and len(plan.lines()) == 5


def test_a_file_that_two_sources_name_and_one_without_tokens_are_said(
    sources: Path, token_file: Callable[..., str]
) -> None:
    run = recipe(blend(sources, "- books-1\n- books-*\n"))
    plan = plan_training(run, open_sources(run.data.train))
    assert plan.warnings == (f"{sources}/books-1 is in 2 sources, each of which reads it",)
    token_file([0], "empty")
    with pytest.raises(UserError, match="empty has no token to train on; use more text"):
        build_data(recipe(blend(sources, "- web\n- {path: empty, epochs: 3}\n")), 0, 1)


def test_a_run_of_another_length_than_the_blend_is_said_with_the_steps(sources: Path) -> None:
    run = recipe(blend(sources, "- {path: code, epochs: 1}\n- {path: web, epochs: 1}\n"), steps=5)
    (note, *_) = plan_training(run, open_sources(run.data.train)).notes
    assert "the blend is of 10K tokens and this run draws 960" in note and "train.steps=53 would draw all" in note


def test_training_says_the_table_before_it_starts(sources: Path) -> None:
    lines: list[str] = []
    build_data(recipe(blend(sources, MIXED)), 0, 1, lines.append)
    assert lines[0].split() == ["source", "asked", "share", "tokens", "drawn", "has", "epochs", "repeats"]
    assert "books-* (2 files)" in lines[3]


CONTRADICTIONS: dict[str, tuple[list[dict[str, Any]], int | None, bool, str]] = {
    "no_whole": ([{"weight": 1}, {"epochs": 1}], None, False, r"s0 has a weight beside .* give tokens: in the blend, --tokens N, or"),
    "nothing_left": ([{"weight": 1}, {"tokens": "1M"}], 1000, True, r"take 1M of 1K tokens .* nothing for s0 \(weight 1\); raise"),
    "wrong_sum": ([{"epochs": 1}, {"tokens": 500}], 900, True, r"add up to 600 tokens, but tokens: says 900; leave tokens: out"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "whole", "named", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_told_with_the_remedy(
    given: list[dict[str, Any]], whole: int | None, named: bool, message: str
) -> None:
    files = [Source.model_validate({"path": f"s{i}", **keys}) for i, keys in enumerate(given)]
    with pytest.raises(UserError, match=message) as told:
        source_weights(files, [100] * len(files), whole, named)
    assert told.value.code == 2 and "\n" not in str(told.value)


def test_a_whole_in_round_numbers_fits(sources: Path) -> None:
    files = [Source(path="a", epochs=1), Source(path="b", tokens=499)]
    assert source_weights(files, [100, 100], 600, True) == [100, 499]


FILES = {
    "unknown_key": ("sources: [{path: a, epoch: 2}]", r"blend\.yaml: sources\.0\.epoch: unknown key; did you mean epochs\?"),
    "unknown_top": ("token: 1T\nsources: [a]", r"blend\.yaml: token: unknown key; did you mean tokens\?"),
    "two_ways": ("- {path: a, weight: 1, epochs: 2}", r"a has weight and epochs, which say the same in two ways; keep one"),
    "quantity": ("- {path: a, tokens: 20 apples}", r"'20 apples' is not a number of tokens, such as 500M, 20B or 1\.5T"),
    "negative": ("- {path: a, weight: -1}", r"sources\.0\.weight: input should be greater than 0, got -1"),
    "no_path": ("- {weight: 1}", r"sources\.0\.path: missing; a source must give it"),
    "no_source": ("tokens: 1T", r"sources: missing; a blend must give it"),
    "twice": ("- {path: a, weight: 1, weight: 2}", r"blend\.yaml:1: not valid YAML: key 'weight' is given twice"),
    "yaml": ("sources: [", r"blend\.yaml:1: not valid YAML"),
    "text": ("hello", r"a blend is a mapping with sources:, found str"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_mistakes_in_a_blend_file_are_placed(tmp_path: Path, text: str, message: str) -> None:
    path = blend(tmp_path, text)
    with pytest.raises(UserError, match=message) as told:
        read_blend(path)
    assert str(told.value).startswith(path) and "\n" not in str(told.value) and told.value.code == 2


def test_a_recipe_that_names_a_blend_is_saved_written_out(sources: Path) -> None:
    path = sources / "recipe.yaml"
    recipes.save(recipe(blend(sources, MIXED)), path)
    (sources / "blend.yaml").unlink()
    again = recipes.load(str(path))
    assert again == recipes.load(str(path)) and again.data.blend_tokens == 19_200
    assert [source.path for source in again.data.train] == [f"{sources}/{name}" for name in ("web", "code", "books-*")]
    assert [(s.weight, s.epochs, s.tokens) for s in again.data.train] == [
        (7, None, None),
        (None, 2, None),
        (None, None, 4000),
    ]
    with pytest.raises(UserError, match=r"gone\.yaml: no such blend file; check the path"):
        recipe("gone.yaml")


def test_validation_takes_weights_alone(sources: Path) -> None:
    with pytest.raises(ValueError, match="web has epochs or tokens; validation takes weights alone"):
        recipe(str(sources / "code"), validation={"sources": [{"path": "web", "epochs": 1}]})
    run = recipe(str(sources / "code"), validation=[str(sources / "books-*")])
    run = run.model_copy(update={"validation": run.validation.model_copy(update={"interval": 5, "batches": 1})})
    _, validation = build_data(run, 0, 1)
    assert validation is not None and isinstance(validation.samples, Blend) and len(validation.samples.parts) == 2


def test_a_pattern_that_finds_nothing_is_told(sources: Path) -> None:
    run = recipe(str(sources / "cc-*"))
    with pytest.raises(UserError, match=r"cc-\*: no token file matches; PREFIX\.idx or PREFIX\.parts must exist"):
        build_data(run, 0, 1)


def test_the_command_prints_the_table_and_refuses_in_one_line(sources: Path) -> None:
    def herd(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(command, arguments)
        return done.exit_code, done.output

    path = blend(sources, MIXED)
    code, out = herd(path)
    assert code == 0 and "without a recipe: all tokens of the files counted" in out and "58.33%" in out
    code, out = herd(path, "--tokens", "40K", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["tokens_drawn"] == 40_000 and facts["sources"][0]["drawn"] == 32_000
    assert [file["weight"] for file in facts["files"]] == [32_000, 4_000, 1_000, 3_000]
    code, out = herd(path, "tiny_cpu", "--tokens", "1K")
    assert code == 2 and "--tokens and RECIPE both name the whole" in out


def test_a_recipe_makes_the_commands_figures_those_of_its_run(sources: Path) -> None:
    saved = sources / "recipe.yaml"
    recipes.save(recipe(str(sources / "code"), steps=100), saved)
    done = CliRunner().invoke(command, [blend(sources, MIXED), str(saved), "train.steps=50", "--json"])
    facts = json.loads(done.output)
    assert [row["drawn"] for row in facts["sources"]] == [175 * 32, 63 * 32, (16 + 47) * 32]
    assert "train.steps=100 would draw all" in facts["notes"][0]
    unknown = CliRunner().invoke(command, [blend(sources, "- web\n- code\n")])
    assert unknown.exit_code == 0 and "name a RECIPE, or --tokens N" in unknown.output


@pytest.mark.parametrize(
    ("tokens", "words"), [(0, "0"), (999, "999"), (1234567, "1.23M"), (2 * 10**13, "20T"), (None, "–")]
)
def test_tokens_in_words(tokens: int | None, words: str) -> None:
    assert short(tokens) == words
