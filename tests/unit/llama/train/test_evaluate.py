"""Which tokens are an answer, what its being right means, what sources are called, when waiting is over."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama.checkpoint_format import TrainState
from llama.config import Recipe, Source, Validation
from llama.data.origins import names_of
from llama.device import find_device
from llama.model.loss import Vocabulary, linear_cross_entropy
from llama.run_folder import RunFolder
from llama.train.evaluate import Baseline, Evaluation, Figures, answer_ids, exact, last_answers
from llama.train.evaluate_samples import Sample
from llama.train.journal import Journal
from llama.train.metrics import Metrics
from llama.train.patience import given_up, judge
from tests.dist.layouts import recipe

N = -100
LABELS = np.array([[N, 1, 2, N, 3, 4, N, 5, N, N], [N, N, N, 6, N, N, N, N, N, 7]])
DOCUMENTS = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]], np.int32)


def test_an_answer_is_the_last_stretch_that_is_trained_in_its_document() -> None:
    assert answer_ids(LABELS, DOCUMENTS) == [(3, 4), (5,), (6,), (7,)]
    answers = last_answers(LABELS, DOCUMENTS)
    assert answers.firsts.tolist() == [4, 7, 13, 19]
    assert answer_ids(np.full((2, 3), N), np.zeros((2, 3), np.int32)) == []


def test_neighbours_in_a_sequence_are_two_answers_though_nothing_untrained_lies_between() -> None:
    assert answer_ids(np.array([[1, 2, 3, 4]]), np.array([[0, 0, 1, 1]], np.int32)) == [(1, 2), (3, 4)]
    assert answer_ids(np.array([[1, 2], [3, 4]]), np.zeros((2, 2), np.int32)) == [(1, 2), (3, 4)]


def test_one_wrong_token_makes_an_answer_wrong_and_earlier_turns_do_not_count() -> None:
    likeliest = np.where(LABELS == N, 9, LABELS)
    answers = last_answers(LABELS, DOCUMENTS)
    assert exact(likeliest, LABELS, answers).tolist() == [True] * 4
    likeliest[0, 1] = 9  # an earlier turn
    assert exact(likeliest, LABELS, answers).tolist() == [True] * 4
    likeliest[0, 5] = 9
    assert exact(likeliest, LABELS, answers).tolist() == [False, True, True, True]


def test_the_first_of_equal_logits_is_the_likeliest_and_padding_never_is() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [3.0]])  # the last row is padding
    vocabulary = Vocabulary()
    vocabulary.notes = []
    with torch.no_grad():
        total = linear_cross_entropy(torch.tensor([[1.0], [-1.0]]), weight, torch.tensor([2, N]), 3, 1, vocabulary)
    losses, likeliest = map(torch.cat, zip(*vocabulary.notes, strict=True))
    assert likeliest.tolist() == [1, 0]
    assert losses[1] == 0 and losses.sum() == total
    assert losses[0] == pytest.approx(math.log(math.exp(-1) + 2))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/code", "data/web"], ["code", "web"]),
        (["a/x/train.jsonl", "a/y/train.jsonl.gz"], ["x-train", "y-train"]),
        (["data/cc-*", "v1.5"], ["cc", "v1.5"]),
        (["twice", "twice"], ["twice", "twice"]),
        (["qnli_dev.tsv"], ["qnli_dev"]),
    ],
)
def test_sources_go_by_as_much_of_their_path_as_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert names_of([Source(path=path) for path in paths]) == names


def test_a_source_goes_by_its_own_name() -> None:
    assert names_of([Source(path="a/x", name="maths & co"), Source(path="b/x")]) == ["maths_co", "x"]


def _states(losses: list[float], **keys: float) -> tuple[TrainState, list[bool], list[bool]]:
    """After validations with these losses, one a step: the state, which were the best, whether the run then ended."""
    state, validation, best, ended = TrainState(), Validation(interval=1, **keys), [], []  # type: ignore[arg-type]
    for state.step, loss in enumerate(losses, 1):
        best.append(judge(state, loss, validation))
        ended.append(given_up(state, validation) is not None)
    return state, best, ended


def test_a_run_ends_after_as_many_validations_without_improvement_as_its_patience() -> None:
    state, best, ended = _states([3.0, 2.0, 2.5, 2.0, 1.9, 2.0, 2.0], patience=2)
    assert best == [True, True, False, False, True, False, False]
    assert ended == [False, False, False, True, False, False, True]
    assert (state.best_step, state.best_loss) == (5, 1.9)
    assert "in 2 validations in a row" in str(given_up(state, Validation(interval=1, patience=2)))
    assert not any(_states([1.0, 2.0, 3.0])[2])


def test_small_gains_are_the_best_at_once_and_count_when_they_add_up() -> None:
    state, best, ended = _states([3.0, 2.96, 2.92, 2.88], patience=3, min_improvement=0.1)
    assert all(best) and state.best_step == 4
    assert not any(ended) and state.validations_waited == 0


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    state, best, ended = _states([math.nan, math.nan, 2.0], patience=2)
    assert best == [False, False, True] and ended == [False, True, False] and state.best_loss == 2.0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"validation": {"patience": 2}}, "set validation.interval"),
        ({"validation": {"at_start": True}}, "set validation.interval"),
        ({"validation": {"interval": 1, "min_improvement": 0.1}}, "set validation.patience too"),
        ({"validation": {"interval": 1, "accuracy": True}}, "no chat:"),
        ({"validation": {"interval": 1, "samples": 2}}, "validation.prompts"),
        ({"checkpoint": {"keep_best": True}}, "set validation.interval"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_is_missing(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate(recipe().model_dump() | keys)


def test_a_validation_is_told_recorded_and_drawn_by_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    journal = Journal(RunFolder(tmp_path), 1, True)
    metrics = Metrics(recipe(), find_device("cpu"), 1, journal, 0)
    sources = {"a": Figures(10.0, 10, 3, 4), "b": Figures(60.0, 20, 0, 2)}
    metrics.validation(4, Evaluation(Figures(70.0, 30, 3, 6), sources, Baseline((1,), 0.75), 2.0))
    metrics.samples(4, [Sample("ask\nme", "so", "thus"), Sample("p" * 200, "q", None)])
    metrics.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 4: validation loss 2.3333, perplexity 10.31, accuracy 50.0% of 6 answers (always the same answer: 75.0%), 2.0 s",
        "step 4: validation on a: loss 1.0000, perplexity 2.72, accuracy 75.0% of 4 answers",
        "step 4: validation on b: loss 3.0000, perplexity 20.09, accuracy 0.0% of 2 answers",
        "step 4: sample 1: ask⏎me → so  wanted: thus",
        f"step 4: sample 2: …{'p' * 119} → q",
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert found == pytest.approx({
        "val_loss": 7 / 3, "val_perplexity": math.exp(7 / 3), "val_accuracy": 0.5, "val_baseline": 0.75,
        "val_loss/a": 1, "val_perplexity/a": math.e, "val_accuracy/a": 0.75,
        "val_loss/b": 3, "val_perplexity/b": math.e**3, "val_accuracy/b": 0,
    })  # fmt: skip
    text = board.Tensors("samples/1/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "**prompt**\n\n    ask\n    me\n\n**answer**\n\n    so\n\n**wanted**\n\n    thus"
    event = next(e for e in RunFolder(tmp_path).history() if e["event"] == "validation")
    assert event["loss"] == 70 / 30 and event["answers"] == 6 and event["sources"]["b"]["loss"] == 3.0
    rows = [json.loads(line) for line in RunFolder(tmp_path).samples.read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["so", "q"] and rows[0]["step"] == 4
