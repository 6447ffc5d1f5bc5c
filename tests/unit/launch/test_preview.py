"""herd preview: marks, colours, numbers, warnings, a picture, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from data_prep.errors import UserError
from launch.preview import command, in_colour
from tests.unit.llama.chat.chats import chat_recipe, write_talks, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    write_tokenizer(folder / "tokenizer")
    write_talks(folder / "talks.jsonl")
    return folder


def preview(folder: Path, *options: str, talks: Path | None = None, **changes: Any) -> Result:
    from llama.recipe import save

    recipe = chat_recipe(folder, talks or folder / "talks.jsonl", **changes)
    save(recipe, folder / "recipe.yaml")
    return CliRunner().invoke(command, [str(folder / "recipe.yaml"), *options])


def test_examples_are_shown_with_marks_round_what_is_trained(folder: Path, tmp_path: Path) -> None:
    talks = tmp_path / "t.jsonl"
    talks.write_text(
        '{"messages": [{"role": "user", "content": "[b]ask[/b]"}, {"role": "assistant", "content": "say"}]}\n'
    )
    done = preview(folder, talks=talks, data__split="1")
    assert done.exit_code == 0, done.output
    assert (
        "example 1: 33 tokens, 4 trained\n<|im_start|>user\n[b]ask[/b]<|im_end|>\n"
        "<|im_start|>assistant\n⟦say<|im_end|>⟧\n" in done.output
    )
    assert "run        3 steps are 24.0 epochs" in done.output and "3 steps read everything 24.0 times" in done.output
    assert not (folder / "run").exists(), "a preview leaves nothing behind"


def test_the_report_has_every_number_a_script_wants(folder: Path, tmp_path: Path) -> None:
    done = preview(folder, "--json", "--examples", "1", "--picture", str(tmp_path / "l.png"), validation__interval=1)
    told = json.loads(done.stdout)
    assert (told["conversations"], told["examples"], told["held_out_examples"]) == (60, 48, 12)
    assert sum(count for *_, count in told["lengths"]["histogram"]) == 48
    assert told["packing"]["fill"] > 0.8 > told["packing"]["padded_would_fill"]
    assert told["epoch"]["steps"] == round(told["packing"]["sequences"] / 8, 2)
    assert told["special_tokens"].keys() == {"<|im_start|>", "<|im_end|>"}
    assert told["formats"] == {str(folder / "talks.jsonl"): "messages"}
    assert any("conversations are there twice" in warning for warning in told["warnings"])
    assert [part["text"] for part in told["shown"][0]][:2] == ["<|im_start|>", told["shown"][0][1]["text"]]
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_what_would_spoil_a_run_is_told(folder: Path, tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "%s"}]}\n'
    talks, template = tmp_path / "t.jsonl", tmp_path / "t.jinja"
    talks.write_text(line % "a" * 2 + line % ("b" * 300))
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    done = preview(folder, talks=talks, data__split="1", chat__template=str(template))
    assert "warning: 1 conversations are there twice" in done.output
    assert "warning: 2 examples end without a control token" in done.output
    assert f"cut        1 × too long, dropped (first: {talks}:3)" in done.output
    beyond = preview(
        folder, "--examples", "0", talks=talks, data__split="1", model__vocab_size=249, model__vocab_multiple=1
    )
    assert beyond.exit_code == 0
    beyond = preview(
        folder, "--examples", "0", talks=talks, data__split="1", model__vocab_size=200, model__vocab_multiple=1
    )
    assert beyond.exit_code == 1 and "is beyond model.vocab_size=200" in beyond.output


def test_colours_on_a_terminal() -> None:
    parts = [
        {"text": "a\x1b[2Jsk", "trained": False, "control": False, "ids": [1]},
        {"text": "<|end|>", "trained": True, "control": True, "ids": [2]},
    ]
    assert [span.style for span in in_colour(parts, True, False).spans] == ["bright_black", "green reverse"]
    assert in_colour(parts, False, True).plain == "a␛[2Jsk[1]⟦<|end|>[2]⟧"


def test_token_files_are_looked_at_elsewhere() -> None:
    result = CliRunner().invoke(command, ["tiny_cpu"])
    assert isinstance(result.exception, UserError) and "herd prep inspect" in str(result.exception)
