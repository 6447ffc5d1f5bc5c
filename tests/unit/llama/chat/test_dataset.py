"""Encoded sets and batches: labels, positions, documents, what is cut, cached and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.tokenizers import load_tokenizer
from llama.chat.dataset import build_chat, chat_samples
from llama.chat.encoded import check_chat, open_encoded
from tests.unit.llama.chat.chats import chat_recipe, write_talks, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder / "tokenizer")
    write_talks(folder / "talks.jsonl")
    return folder


def put(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def talk(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_a_row_is_its_examples_one_behind_the_other(folder: Path) -> None:
    samples, _ = chat_samples(chat_recipe(folder, folder / "talks.jsonl"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert samples.fill > 0.8
    for i in range(len(samples)):
        tokens, labels, positions, documents = samples.row(i)
        members = samples.members(i)
        for number, example in enumerate(members):
            here = documents == number
            ids = samples.encoded.tokens.get(example).astype(np.int64)
            trained = samples.encoded.trained.get(example).astype(bool)
            assert tokens[here].tolist() == ids[:-1].tolist()
            assert positions[here].tolist() == list(range(len(ids) - 1))
            assert labels[here].tolist() == np.where(trained[1:], ids[1:], -100).tolist()
            assert ids[-1] == tokenizer.control["<|im_end|>"] and trained[-1]
        rest = documents == len(members)
        assert (labels[rest] == -100).all() and positions[rest].tolist() == list(range(rest.sum()))
        assert here.any() and labels[: int((documents == 0).sum())][0] == -100


def test_an_epoch_reads_every_example_once_and_conversations_go_to_one_part(folder: Path) -> None:
    recipe = chat_recipe(folder, folder / "talks.jsonl", validation__interval=1)
    train, validation = chat_samples(recipe)
    assert validation is not None
    assert len(train.encoded.tokens) == 60 and len(train.examples) == 48 and len(validation.examples) == 12
    assert not set(train.examples) & set(validation.examples)
    for epoch in range(3):
        numbers = range(epoch * len(train), (epoch + 1) * len(train))
        assert sorted(e for i in numbers for e in train.members(i)) == sorted(train.examples)
    first = [train.members(i).tolist() for i in range(len(train))]
    assert first != [train.members(i + len(train)).tolist() for i in range(len(train))]
    again, _ = chat_samples(recipe)
    assert [again.members(i).tolist() for i in range(len(train))] == first and again.fingerprint == train.fingerprint


def test_the_cursor_alone_decides_whatever_the_layout(folder: Path) -> None:
    recipe = chat_recipe(folder, folder / "talks.jsonl", train__micro_batch_size=2)
    whole = np.concatenate([batch.tokens for batch in build_chat(recipe, 0, 1)[0].step(8)])
    halves = [build_chat(recipe, rank, 2)[0].step(8) for rank in range(2)]
    assert (whole == np.concatenate([batch.tokens for pair in zip(*halves, strict=True) for batch in pair])).all()


def test_padded_rows_hold_one_example(folder: Path) -> None:
    recipe = chat_recipe(folder, folder / "talks.jsonl", chat__pack=False)
    assert not recipe.data.document_mask
    samples, _ = chat_samples(recipe)
    assert len(samples) == len(samples.examples) and all(len(samples.members(i)) == 1 for i in range(len(samples)))


def test_a_set_is_encoded_once_and_anew_when_anything_differs(folder: Path, tmp_path: Path) -> None:
    talks, said = write_talks(tmp_path / "t.jsonl", 5), list[str]()
    recipe = chat_recipe(folder, talks, chat__cache=str(tmp_path / "cache"))
    first = open_encoded(recipe, recipe.data.train, say=said.append)
    assert open_encoded(recipe, recipe.data.train, say=said.append).folder == first.folder and len(said) == 1
    last = chat_recipe(folder, talks, chat__cache=str(tmp_path / "cache"), chat__loss="last")
    assert open_encoded(last, last.data.train).folder != first.folder
    write_talks(talks, 5, seed=1)
    assert open_encoded(recipe, recipe.data.train).folder != first.folder
    assert len(list((tmp_path / "cache").iterdir())) == 3


def lengths(folder: Path, talks: Path, policy: str, **changes: Any) -> tuple[list[int], dict[str, int]]:
    recipe = chat_recipe(folder, talks, chat__truncation=policy, chat__cache=str(talks.parent / "cache"), **changes)
    encoded = open_encoded(recipe, recipe.data.train)
    return encoded.lengths.tolist(), encoded.facts["counts"]


def test_each_way_to_treat_what_is_too_long(folder: Path, tmp_path: Path) -> None:
    talks = put(
        tmp_path / "t.jsonl",
        talk("a", "b"),
        talk("c" * 200, "d"),
        talk(*["e" * 30, "f" * 30] * 3),
        talk("g", "h" * 200),
    )
    short = len("<|user\na|\n<|assistant\nb|") - 2
    assert lengths(folder, talks, "drop") == ([short], {"too long, dropped": 3})
    cut = {"prompt cut on the left": 1, "too long even without its prompt, dropped": 2}
    assert lengths(folder, talks, "left") == ([short, 161], cut)
    split, counts = lengths(folder, talks, "split")
    assert counts == {"a round too long, dropped": 2, "split": 1} and split == [short, 161, 80]
    with pytest.raises(
        UserError, match=r"3 of 4 .* than data\.seq_length=160 takes, up to 2\d\d \(first: .*t\.jsonl:2\)"
    ):
        lengths(folder, talks, "error")


def test_left_cuts_the_prompt_alone(folder: Path, tmp_path: Path) -> None:
    talks = put(tmp_path / "t.jsonl", talk("x" * 200 + "END", "d"))
    recipe = chat_recipe(folder, talks, chat__truncation="left")
    encoded = open_encoded(recipe, recipe.data.train)
    text = load_tokenizer(folder / "tokenizer").decode(encoded.tokens.get(0))
    assert len(encoded.tokens.get(0)) == 161 and text.endswith("xEND<|im_end|>\n<|im_start|>assistant\nd<|im_end|>")
    assert encoded.trained.get(0).tolist() == [0] * 159 + [1, 1]


def test_split_repeats_the_system_prompt_and_trains_the_last_turn_once(folder: Path, tmp_path: Path) -> None:
    record = talk(*["e" * 30, "f" * 30] * 3)
    record["messages"].insert(0, {"role": "system", "content": "SYS"})
    talks = put(tmp_path / "t.jsonl", record)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for loss, answers in (("all", 3), ("last", 1)):
        recipe = chat_recipe(folder, talks, chat__truncation="split", chat__loss=loss)
        encoded = open_encoded(recipe, recipe.data.train)
        texts = [tokenizer.decode(encoded.tokens.get(i)) for i in range(len(encoded.tokens))]
        assert all(text.startswith("<|im_start|>system\nSYS<|im_end|>") for text in texts)
        trained = [
            tokenizer.decode(encoded.tokens.get(i)[encoded.trained.get(i) == 1]) for i in range(len(encoded.tokens))
        ]
        assert "".join(trained) == ("f" * 30 + "<|im_end|>") * answers
        assert len(encoded.tokens.documents) == 2  # one conversation, whichever part it goes to


def test_nothing_trained_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    record = talk("a", "b")
    record["messages"][1]["train"] = False
    recipe = chat_recipe(folder, put(tmp_path / "t.jsonl", record))
    with pytest.raises(UserError, match="nothing would be trained: 1 × nothing trained"):
        open_encoded(recipe, recipe.data.train)
    assert not list((folder / "run/chat").glob("*.writing-*"))


def test_records_that_the_template_refuses_count_as_bad(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    talks = put(tmp_path / "t.jsonl", *[talk("a", "b")] * 9, talk("bad", "b"))
    recipe = chat_recipe(folder, talks, chat__template=str(template))
    with pytest.raises(UserError, match=r"1 of 10 records are left out .* refuses it: no \(first: .*t\.jsonl:10\)"):
        open_encoded(recipe, recipe.data.train)
    recipe = chat_recipe(folder, talks, chat__template=str(template), chat__max_bad=0.2)
    assert len(open_encoded(recipe, recipe.data.train).tokens) == 9


def test_recipes_that_cannot_work_are_refused_in_words(folder: Path, tmp_path: Path) -> None:
    talks = folder / "talks.jsonl"
    with pytest.raises(ValueError, match=r"chat\.pack=true needs data\.document_mask=true"):
        chat_recipe(folder, talks, data__document_mask=False, chat__pack=True)
    with pytest.raises(ValueError, match="take no weight"):
        chat_recipe(folder, talks, data__train=[{"path": "a", "epochs": 2}])
    with pytest.raises(UserError, match="need a tokenizer"):
        check_chat(chat_recipe(folder, talks, data__tokenizer=None))
    with pytest.raises(UserError, match=r"249 ids, more than model\.vocab_size=100"):
        check_chat(chat_recipe(folder, talks, model__vocab_size=100))
    (tmp_path / "tokens.idx").touch()
    with pytest.raises(UserError, match="is a token file"):
        check_chat(chat_recipe(folder, tmp_path / "tokens"))
    with pytest.raises(UserError, match="leaves no validation part"):
        chat_samples(chat_recipe(folder, talks, data__split="1", validation__interval=1))


def test_an_export_finds_the_tokenizer_of_conversations_named_by_a_pattern(folder: Path) -> None:
    from launch.export import _tokenizer

    recipe = chat_recipe(folder, f"{folder}/*.jsonl")
    assert _tokenizer(recipe, None) == (folder / "tokenizer", False)
