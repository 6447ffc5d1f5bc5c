"""`herd prep`: exit codes, Megatron's names, and the demo's text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data_prep import demo_text
from launch.prep import command


def herd(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl, tokenizer.model and a token file `out`."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "_modules", list)
        text = demo_text.write_demo_text(folder, megabytes=1)
    demo_text.train_tokenizer(text, folder / "tokenizer.model", vocab_size=800)
    result = herd("tokenize", text, "--tokenizer", folder, "--output", folder / "out", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "documents" in result.stdout and "uint16" in result.stdout
    return folder


def test_megatrons_names_mean_the_same(corpus: Path, tmp_path: Path) -> None:
    result = herd(
        "tokenize", "--input", corpus / "text.jsonl", "--output-prefix", tmp_path / "out", "--workers", 1, "--append-eod",
        "--tokenizer-model", corpus / "tokenizer.model", "--json-keys", "text", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.bin").read_bytes() == (corpus / "out.bin").read_bytes()
    assert json.loads(result.stdout) == json.loads((tmp_path / "out.meta.json").read_text(encoding="utf-8"))


def test_bad_lines_are_shown_on_stderr(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud800"}\nbroken\n')
    base = ["tokenize", tmp_path / "a.jsonl", "--tokenizer", corpus, "--workers", 1, "--output"]
    result = herd(*base, tmp_path / "out", "--max-bad", "0.5", "--no-eod", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["append_eod"] is False
    assert "1 of 3 lines were bad and left out: 1 × broken JSON" in result.stderr
    assert f"{tmp_path}/a.jsonl:3: broken JSON" in result.stderr and "1 documents were mended and kept" in result.stderr
    result = herd(*base, tmp_path / "strict")
    assert result.exit_code == 1 and "herd: 1 of 3 lines are bad" in result.stderr
    assert {path.name for path in tmp_path.glob("strict*")} == {"strict.parts", "strict.rejected.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tokenize", "--tokenizer", "{}", "--output", "{}/new"], 2, "no INPUTS"),
        (["tokenize", "{}/text.jsonl", "--output", "{}/new"], 2, "--tokenizer"),
        (["tokenize", "{}/text.jsonl", "--tokenizer", "{}", "--output", "{}/out"], 2, "out.bin exists"),
        (["tokenize", "{}/gone.jsonl", "--tokenizer", "{}", "--output", "{}/new"], 2, "no such file"),
        (["tokenize", "{}/text.jsonl", "--tokenizer", "{}/text.jsonl", "--output", "{}/new"], 1, "damaged or unknown"),
        (["tokenize", "{}/text.jsonl", "--tokenizer", "{}", "--output", "{}/new", "--max-bad", "2"], 2, "--max-bad"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_exit_codes_and_messages(corpus: Path, arguments: list[str], code: int, message: str) -> None:
    result = herd(*(argument.format(corpus) for argument in arguments))
    assert result.exit_code == code and message in result.stderr and result.stdout == ""
    assert not list(corpus.glob("new*"))


@pytest.mark.parametrize("verb", ["tokenize", "merge", "verify", "split", "inspect", "demo-text"])
def test_help_has_an_example(verb: str) -> None:
    result = herd(verb, "--help")
    assert result.exit_code == 0 and f"herd prep {verb} " in result.stdout


def test_demo_text_is_the_same_each_time_and_prose_first(tmp_path: Path) -> None:
    result = herd("demo-text", tmp_path / "a", "--megabytes", "0.6", "--vocab-size", "600")
    assert result.exit_code == 0, result.output
    again = demo_text.write_demo_text(tmp_path / "b", megabytes=0.6)
    assert again.read_bytes() == (tmp_path / "a/text.jsonl").read_bytes()
    sources = [json.loads(line)["source"] for line in again.read_text(encoding="utf-8").splitlines()]
    assert sources[0].startswith("pydoc_data.topics:") and sources[-1].startswith("docstrings:")
    assert 500_000 < again.stat().st_size < 800_000
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"text.jsonl", "tokenizer.model"}


def test_demo_text_without_topics_still_gives_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "_topics", lambda: iter(()))
    assert demo_text.write_demo_text(tmp_path, megabytes=0.2).stat().st_size > 150_000
    monkeypatch.setattr(demo_text, "_modules", list)
    with pytest.raises(demo_text.UserError, match="neither"):
        demo_text.write_demo_text(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_a_tokenizer_too_large_for_its_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hardly anything"}\n')
    with pytest.raises(demo_text.UserError, match="no tokenizer of 4096 pieces"):
        demo_text.train_tokenizer(tmp_path / "a.jsonl", tmp_path / "tokenizer.model")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}
