"""Recipes as files: finding, inheriting and overriding them, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from llama.recipe import dump, lay_out, load, merge, save

SMALL = """\
name: small
model: {vocab_size: 512, hidden_size: 64, intermediate_size: 128, num_layers: 4, num_heads: 8, num_kv_heads: 2}
data: {train: [data/a, data/b], seq_length: 128}
train: {steps: 10, global_batch_size: 8}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def _refusal(name: object, *overrides: str, ranks: int | None = None) -> str:
    """The one line that says why a recipe is refused; exit code 2, as for all wrong use."""
    with pytest.raises(UserError) as caught:
        recipe = load(str(name), overrides)
        if ranks:
            lay_out(recipe, ranks)
    message = str(caught.value)
    assert caught.value.code == 2
    assert "\n" not in message and "Traceback" not in message
    return message


WRONG_KEYS = {
    "at the top": ("trian: {steps: 3}", "trian: unknown key", "did you mean train?"),
    "in a section": ("train: {global_batchsize: 3}", "train.global_batchsize", "did you mean global_batch_size?"),
    "two sections down": ("train: {guard: {max_skip: 3}}", "train.guard.max_skip", "did you mean max_skips?"),
    "under a section that may be absent": (
        "model: {rope_scaling: {factr: 8}}",
        "model.rope_scaling.factr",
        "did you mean factor?",
    ),
    "in a list": ("data: {train: [{path: data/a, wieght: 2}]}", "data.train.0.wieght", "did you mean weight?"),
    "like none": ("log: {zzz: 1}", "log.zzz", "known here: interval, tensorboard"),
}


@pytest.mark.parametrize("place", WRONG_KEYS)
def test_an_unknown_key_is_named_with_the_near_one(small: Path, place: str) -> None:
    text, key, remedy = WRONG_KEYS[place]
    wrong = small.with_name("wrong.yaml")
    wrong.write_text(f"base: small.yaml\n{text}\n")
    message = _refusal(wrong)
    assert str(wrong) in message and key in message and remedy in message


WRONG_FILES = {
    "duplicate key": (SMALL + "name: again\n", ":5:", "key 'name' is given twice"),
    "duplicate key inside": ("train:\n  steps: 1\n  steps: 2\n", ":3:", "key 'steps' is given twice"),
    "bad YAML": ("name: a\nmodel: {vocab_size: 3\ntrain: 1\n", ":3:", "not valid YAML"),
    "tab": ("train:\n\tsteps: 1\n", ":2:", "not valid YAML"),
    "control character": ("name: a\x07b\n", "", "not valid YAML"),
    "key that is a list": ("[a]: 1\n", ":1:", "a key must be a plain word, found a list"),
    "a list": ("- name: small\n", "", "is a mapping of keys such as model: and train:, found list"),
    "a sentence": ("train well\n", "", "is a mapping of keys such as model: and train:, found str"),
    "empty": ("", "", "is a mapping of keys such as model: and train:, found NoneType"),
    "not text": ("\udcff", "", "cannot be read"),
}


@pytest.mark.parametrize("fault", WRONG_FILES)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, fault: str) -> None:
    text, line, reason = WRONG_FILES[fault]
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    message = _refusal(path)
    assert message.startswith(f"{path}{line}") and reason in message


WRONG_VALUES = {
    "no number": (["train.steps=many"], "train.steps: ", "valid integer"),
    "a fraction": (["model.num_layers=2.5"], "model.num_layers: ", "valid integer"),
    "nought": (["train.micro_batch_size=0"], "train.micro_batch_size: ", "greater than or equal to 1"),
    "not a number": (["optimizer.lr=.nan"], "optimizer.lr: ", "finite number"),
    "no choice": (["schedule.kind=cosin"], "schedule.kind: ", "'constant', 'linear', 'cosine' or 'wsd'"),
    "section as a number": (["train=3"], "train: ", "valid dictionary"),
    "a bad name": (["name=a/b"], "name: ", "pattern"),
    "a missing key": (["train={}", "model=null"], "model: ", "valid dictionary"),
    "split": (["data.split=a,b"], "data: ", 'such as "969,30,1"'),
    "odd heads": (["model.num_kv_heads=3"], "model: num_kv_heads=3", "one of [1, 2, 4, 8] does"),
    "tensor ranks over key/value heads": (["parallel.tensor_parallel=4"], "tensor_parallel=4", "one of [1, 2] does"),
    "tensor ranks over the sequence": (
        ["parallel.tensor_parallel=2", "data.seq_length=127"],
        "data.seq_length=127",
        "use 126, or parallel.sequence_parallel=false",
    ),
    "stages over layers": (
        ["parallel.pipeline_parallel=4", "parallel.pipeline_schedule=interleaved_1f1b"],
        "8 pipeline stages",
        "at most one stage a layer",
    ),
    "one stage a rank for an interleaved pipeline": (
        ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=interleaved_1f1b", "parallel.stages_per_rank=1"],
        "interleaved_1f1b",
        "stages_per_rank of 2 or more",
    ),
    "sequence over positions": (
        ["data.seq_length=8192"],
        "data.seq_length=8192 is above model.max_position=4096",
        "shorten it or raise max_position",
    ),
    "micro-batch over batch": (["train.micro_batch_size=3"], "train.micro_batch_size=3", "not a multiple"),
    "floor over peak": (["schedule.min_lr=1.0"], "schedule.min_lr=1.0", "above optimizer.lr"),
}


@pytest.mark.parametrize("fault", WRONG_VALUES)
def test_values_that_do_not_fit_are_refused_with_the_key_and_what_would(small: Path, fault: str) -> None:
    overrides, key, remedy = WRONG_VALUES[fault]
    message = _refusal(small, *overrides)
    assert str(small) in message and key in message and remedy in message


WRONG_LAYOUTS = {
    "ranks": (["parallel.tensor_parallel=2"], 3, "3 ranks are not a multiple of", "start 4 ranks"),
    "fixed shards": (["parallel.shard=4"], 8, "needs 4 ranks", "leave parallel.shard out"),
    "batch": ([], 3, "train.global_batch_size=8 is not a multiple of 3 data ranks", "9 would be"),
    "micro-batch": (["train.micro_batch_size=4"], 4, "= 16", "16 would be"),
    "too few micro-batches": (
        ["parallel.pipeline_parallel=4", "train.micro_batch_size=4"],
        4,
        "a pipeline of 4 needs at least 4 micro-batches a step and has 2",
        "raise train.global_batch_size to 16",
    ),
    "uneven micro-batches": (
        ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=interleaved_1f1b", "train.global_batch_size=3"],
        2,
        "interleaved_1f1b needs micro-batches (3) in multiples of the pipeline (2)",
        "change train.global_batch_size",
    ),
}


@pytest.mark.parametrize("fault", WRONG_LAYOUTS)
def test_a_layout_that_does_not_divide_is_refused_with_one_that_does(small: Path, fault: str) -> None:
    overrides, ranks, reason, remedy = WRONG_LAYOUTS[fault]
    message = _refusal(small, *overrides, ranks=ranks)
    assert message.startswith("recipe small: ") and reason in message and remedy in message


@pytest.mark.parametrize("override", ["train.steps", "train.steps 3", "=3", "train..steps=3", ".steps=3", "--steps"])
def test_an_override_without_key_or_value_is_refused(small: Path, override: str) -> None:
    message = _refusal(small, override)
    assert f"override {override!r}" in message and "such as train.steps=100" in message


@pytest.mark.parametrize("override", ["train.steps=[1", "data={a: 1, a: 2}", "name='"])
def test_an_override_whose_value_is_no_yaml_is_refused(small: Path, override: str) -> None:
    assert f"override {override!r}: the value is not valid YAML" in _refusal(small, override)


def test_several_faults_are_told_in_one_line(small: Path) -> None:
    message = _refusal(small, "train.stepz=3", "optimizer.lr=fast")
    assert "train.stepz" in message and "optimizer.lr" in message and "; also " in message


def test_a_recipe_that_is_not_there_is_answered_with_near_names() -> None:
    assert "did you mean tiny_cpu?" in _refusal("tiny_gpu")
    assert "llama3.1_8b_gpu" in _refusal("llama3.1_8B_gpus")
    assert "llama2_7b_trn2" in _refusal("configs/llama2_7b_trn1.yaml")
    assert "configs/ has " in _refusal("qqqqqq")


def test_a_base_that_is_not_there_is_refused_naming_the_file_that_asks(small: Path) -> None:
    child = small.with_name("child.yaml")
    child.write_text("base: smal.yaml\n")
    message = _refusal(child)
    assert str(child) in message and "'smal.yaml'" in message


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: second.yaml\n")
    second.write_text("base: first.yaml\n")
    assert f"{first}: base: leads back to this file; remove one of the links" in _refusal(first)
    second.write_text("base: second.yaml\n")
    assert "leads back" in _refusal(second)


def test_a_child_changes_single_keys_of_its_base_and_replaces_lists_whole(small: Path) -> None:
    (small.parent / "deeper").mkdir()
    child = small.parent / "deeper/child.yaml"
    child.write_text(
        "base: ../small.yaml\nname: child\ntrain: {steps: 20, guard: {window: 4}}\ndata: {train: data/c}\n"
    )
    grandchild = small.parent / "grandchild.yaml"
    grandchild.write_text("base: deeper/child.yaml\ntrain: {guard: {max_skips: 3}}\n")
    recipe = load(str(grandchild))
    assert recipe.name == "child" and recipe.train.steps == 20 and recipe.train.global_batch_size == 8
    assert (recipe.train.guard.window, recipe.train.guard.max_skips) == (4, 3)
    assert [source.path for source in recipe.data.train] == ["data/c"]


def test_a_base_may_be_a_name_in_configs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: llama3.1_8b_trn2\nname: mine\ntrain: {steps: 5000}\n")
    recipe, base = load(str(path)), load("llama3.1_8b_trn2")
    assert recipe.model == base.model and recipe.parallel == base.parallel and recipe.train.steps == 5000


@pytest.mark.parametrize("name", ["tiny_cpu", "tiny_cpu.yaml", "configs/tiny_cpu.yaml"])
def test_a_recipe_is_found_by_name_and_by_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert load(name).name == "tiny_cpu"


def test_overrides_are_yaml_and_the_last_one_holds(small: Path) -> None:
    recipe = load(
        str(small),
        [
            "train.steps=20",
            "train.steps=30",
            "optimizer.lr=1e-3",  # YAML 1.1 reads this as text; a person means the number
            "optimizer.clip_norm=null",
            "optimizer.betas=[0.8, 0.9]",
            "parallel.sequence_parallel=false",
            "data.train=[{path: data/x, weight: 3}, data/y]",
            "data.split=9,1,0",
            "train.guard.window=16",
            "train={micro_batch_size: 2}",
            "model.rope_scaling.factor=4",
            "run_dir=runs/a=b",
        ],
    )
    assert (recipe.train.steps, recipe.train.micro_batch_size, recipe.train.guard.window) == (30, 2, 16)
    assert recipe.optimizer.lr == 1e-3 and recipe.optimizer.clip_norm is None and recipe.optimizer.betas == (0.8, 0.9)
    assert [(source.path, source.weight) for source in recipe.data.train] == [("data/x", 3.0), ("data/y", 1.0)]
    assert recipe.data.split == "9,1,0" and not recipe.parallel.sequence_parallel
    assert recipe.model.rope_scaling is not None and recipe.model.rope_scaling.factor == 4
    assert recipe.run_dir == "runs/a=b"


def test_merging_leaves_both_sides_as_they_were() -> None:
    base, change = {"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": None}
    assert merge(base, change) == {"a": {"b": 1, "c": [3]}, "d": None}
    assert base == {"a": {"b": 1, "c": [1, 2]}} and change == {"a": {"c": [3]}, "d": None}


def test_a_saved_recipe_is_whole_and_loads_to_itself(small: Path) -> None:
    recipe = load(str(small), ["data.split=9,1,0", "data.tokenizer=Ünïcode"])
    path = small.with_name("resolved.yaml")
    save(recipe, path)
    assert load(str(path)) == recipe and path.read_text() == dump(recipe)
    assert "base" not in path.read_text() and sorted(p.name for p in path.parent.iterdir()) == [
        "resolved.yaml",
        "small.yaml",
    ]


def test_a_recipe_cannot_be_changed_after_it_is_made(small: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(str(small)).train.steps = 3  # type: ignore[misc]


def test_epochs_stand_in_for_steps_and_the_later_word_counts(tmp_path: Path) -> None:
    base = tmp_path / "chat.yaml"
    base.write_text("base: smollm2_chat\ntrain: {epochs: 2}\n")
    train = load(str(base)).train
    assert (train.epochs, train.steps) == (2, 1), "the inherited steps are no longer said"
    assert train.steps_for(800) == 200 and train.model_copy(update={"epochs": 0.51}).steps_for(800) == 51
    overridden = load(str(base), ["train.steps=30"]).train
    assert (overridden.epochs, overridden.steps) == (None, 30)
    assert overridden.steps_for(800) == 30
    assert load(str(base), ["train.steps=30", "train.epochs=3"]).train.epochs == 3


def test_epochs_are_of_conversations() -> None:
    with pytest.raises(
        UserError, match=r"train\.epochs=2 counts passes over conversations.* set train\.steps, or epochs:"
    ):
        load("tiny_cpu", ["train.epochs=2"])
