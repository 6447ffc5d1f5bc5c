"""`herd prep inspect`: counts, lengths and text of our files, of others', of parts, in memory that does not grow."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from data_prep import survey
from data_prep.indexed import IndexedWriter
from data_prep.survey import bars, survey_lengths
from data_prep.tokenizers import load_tokenizer
from launch.prep import command
from tests import material
from tests.unit.data_prep.test_joined import make_parts

TEXTS = [f"Document {k} says something, naïve and 日本語." * (k + 1) for k in range(20)]


def herd(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file of TEXTS, with the account that herd prep tokenize leaves."""
    path = material.llama2_tokenizer_model()
    tokenizer, prefix = load_tokenizer(path), tmp_path_factory.mktemp("corpus") / "out"
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode(text), 2])
    meta = {"tokenizer": str(path), "vocab_size": 32000, "eod": 2, "append_eod": True, "documents": 20}
    meta |= {"tokens": writer.tokens, "text_bytes": sum(len(text.encode()) for text in TEXTS), "tokenizer_sha256": "s"}
    Path(f"{prefix}.meta.json").write_text(json.dumps(meta))
    return prefix


def test_counts_lengths_and_the_first_text_are_shown(corpus: Path) -> None:
    facts = json.loads(herd("inspect", f"{corpus}.bin", "--json").stdout)
    meta = json.loads(Path(f"{corpus}.meta.json").read_text(encoding="utf-8"))
    for name in ("documents", "tokens", "vocab_size", "eod", "tokenizer_sha256", "text_bytes"):
        assert facts[name] == meta[name]
    assert facts["dtype"] == "uint16" and facts["sequences"] == 20 and facts["bin_bytes"] == 2 * meta["tokens"]
    assert facts["bytes_per_token"] == round(meta["text_bytes"] / meta["tokens"], 3)
    length = facts["length"]
    assert length["min"] <= length["p25"] <= length["median"] <= length["p75"] <= length["p99"] <= length["max"]
    assert sum(row["sequences"] for row in facts["histogram"]) == 20
    assert facts["first_text"] == TEXTS[0] and "samples" not in facts and "warning" not in facts
    plain = herd("inspect", corpus).stdout
    assert f"{facts['tokens']:,}" in plain and "uint16" in plain and "█" in plain and "128–255" in plain


def test_documents_are_shown_by_number_and_by_seed(corpus: Path) -> None:
    facts = json.loads(herd("inspect", corpus, "--document", 17, "--tokens", 1000, "--json").stdout)
    assert [(sample["document"], sample["text"]) for sample in facts["samples"]] == [(17, TEXTS[17])]
    chosen = [
        [sample["document"] for sample in json.loads(herd("inspect", corpus, "--samples", 5, "--seed", seed, "--json").stdout)["samples"]]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 5 and chosen[0] == sorted(chosen[0])
    cut = json.loads(herd("inspect", corpus, "--document", 9, "--tokens", 4, "--json").stdout)["samples"][0]
    assert TEXTS[9].startswith(cut["text"]) and cut["tokens"] > 100
    assert "document 9, " in herd("inspect", corpus, "--document", 9).stdout
    result = herd("inspect", corpus, "--document", 20)
    assert result.exit_code == 2 and "there are 20 documents" in result.stderr


def test_files_of_others_are_shown_without_text(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "other", "uint16") as writer:
        writer.add_document([300, 301, 302])
    facts = json.loads(herd("inspect", tmp_path / "other", "--samples", 3, "--json").stdout)
    assert facts["documents"] == 1 and facts["first_ids"] == [300, 301, 302] and "first_text" not in facts
    assert facts["samples"] == [{"document": 0, "tokens": 3, "ids": [300, 301, 302]}]
    llama = material.llama2_tokenizer_model()
    assert json.loads(herd("inspect", tmp_path / "other", "--json", "--tokenizer", llama).stdout)["first_text"]
    with IndexedWriter(tmp_path / "other", "uint16") as writer:
        writer.add_document([60000])
    shown = herd("inspect", tmp_path / "other", "--tokenizer", llama)
    assert shown.exit_code == 0 and "outside the vocabulary" in shown.stdout
    with IndexedWriter(tmp_path / "none", "int32"):
        pass
    assert json.loads(herd("inspect", tmp_path / "none", "--json").stdout)["tokens"] == 0
    assert herd("inspect", tmp_path / "none").exit_code == 0


def test_parts_are_shown_as_one(tmp_path: Path) -> None:
    make_parts(tmp_path / "x")
    for name in ("x", "x.parts"):
        facts = json.loads(herd("inspect", tmp_path / name, "--document", 3, "--json").stdout)
        assert (facts["parts"], facts["documents"], facts["sequences"], facts["tokens"]) == (5, 6, 4, 9)
        assert facts["eod"] == 2 and facts["samples"][0]["ids"] == [5, 6]
    assert herd("inspect", tmp_path / "gone").exit_code == 1


def test_an_account_of_other_files_is_noticed(corpus: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([1, 2])
    (tmp_path / "x.meta.json").write_bytes(Path(f"{corpus}.meta.json").read_bytes())
    assert "it is of other files" in herd("inspect", tmp_path / "x").stdout


def test_lengths_are_counted_within_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "CHUNK", 1000)
    lengths = np.random.default_rng(1).lognormal(9, 3, 20_000).clip(0, 2**31 - 1).astype(np.int32)
    lengths[:3] = 0, 1, 2**31 - 1
    found = survey_lengths(lengths)
    assert (found.count, found.tokens) == (20_000, int(lengths.sum(dtype=np.int64)))
    assert (found.shortest, found.longest) == (0, 2**31 - 1)
    for share in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0):
        exact = int(np.quantile(lengths, share, method="inverted_cdf"))
        assert abs(found.quantile(share) - exact) <= 0.012 * exact
    assert [(first, last, count) for first, last, count in found.bins()] == [
        (first, last, int(((lengths >= first) & (lengths <= last)).sum())) for first, last, _ in found.bins()
    ]
    assert found.bins()[0][0] == 0 and found.bins()[-1][1] == 2**31 - 1 and len(bars(found)) == len(found.bins())
    assert survey_lengths(lengths[:0]).bins() == []


def test_memory_does_not_grow_with_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "CHUNK", 1 << 16)
    peaks = []
    for count in (1 << 18, 1 << 21):
        lengths = np.full(count, 700, np.int32)
        tracemalloc.start()
        survey_lengths(lengths)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 5e6


def test_lengths_are_drawn(corpus: Path, tmp_path: Path) -> None:
    assert herd("inspect", corpus, "--picture", tmp_path / "lengths.png").exit_code == 0
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    result = herd("inspect", corpus, "--picture", tmp_path / "gone/lengths.png")
    assert result.exit_code == 2 and "cannot be drawn" in result.stderr
