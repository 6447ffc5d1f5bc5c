"""herd prep split: every document once, in order, where its share says; nothing of it depends on workers or chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from data_prep import split as module
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset, IndexedWriter
from data_prep.merge import merge
from data_prep.split import hashed, split
from data_prep.verify import verify
from launch.prep import command
from tests.unit.data_prep.test_verify import make_parts


def herd(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def texts(prefix: Path | str) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data.document(number).tolist() for number in range(len(data.documents) - 1)]


def pair(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """1,000 documents of none to several sequences, with a meta.json."""
    random = np.random.default_rng(3)
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(1000):
            sizes = random.integers(0, 30, random.integers(0, 4)).tolist()
            writer.add_document(random.integers(3, 90, sum(sizes)), sizes)
    meta = {"vocab_size": 100, "eod": 2, "append_eod": False, "text_bytes": 5, "documents": 1000}
    (tmp_path / "corpus.meta.json").write_text(json.dumps(meta))
    return str(tmp_path / "corpus")


@pytest.fixture(params=["small", "whole"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small":
        monkeypatch.setattr(module, "CHUNK", 7)
        monkeypatch.setattr(module, "BUFFER", 16)


@pytest.mark.parametrize("workers", [1, 3])
def test_shares_are_runs_of_documents_as_megatrons(corpus: str, tmp_path: Path, chunks: None, workers: int) -> None:
    names = [tmp_path / name for name in ("train", "valid", "test")]
    metas = split(corpus, names, shares=[98, 1, 1], workers=workers)
    whole = texts(corpus)
    assert [texts(name) for name in names] == [whole[:980], whole[980:990], whole[990:]]
    assert [meta["documents"] for meta in metas] == [980, 10, 10] and all(verify(name).ok for name in names)
    assert metas[0] == json.loads((tmp_path / "train.meta.json").read_text())
    assert metas[0]["vocab_size"] == 100 and metas[0]["split_of"] == corpus and "text_bytes" not in metas[0]
    merge(names, tmp_path / "again")
    assert pair(tmp_path / "again") == pair(corpus)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_seed_spreads_documents_by_their_number(corpus: str, tmp_path: Path, chunks: None, workers: int) -> None:
    names = [tmp_path / name for name in ("train", "valid")]
    split(corpus, names, shares=[3, 1], seed=5, workers=workers)
    first = hashed(0, 1000, 5) < 0.75
    assert 700 < first.sum() < 800
    whole = texts(corpus)
    assert texts(names[0]) == [text for text, mine in zip(whole, first, strict=True) if mine]
    assert texts(names[1]) == [text for text, mine in zip(whole, first, strict=True) if not mine]
    assert all(verify(name).ok for name in names)


def test_a_hash_depends_on_seed_and_number_alone() -> None:
    everything = hashed(0, 100_000, 1)
    assert (everything[500:600] == hashed(500, 600, 1)).all() and (everything != hashed(0, 100_000, 2)).all()
    assert abs(everything.mean() - 0.5) < 0.005 and np.histogram(everything, 10, (0, 1))[0].min() > 9600
    assert abs(np.corrcoef(everything[:-1], everything[1:])[0, 1]) < 0.02
    # A seed is not another one moved on.
    assert not np.isin(hashed(0, 1000, 2), everything).any()


def test_parts_have_equal_tokens(corpus: str, tmp_path: Path, chunks: None) -> None:
    names = [tmp_path / f"part{k}" for k in range(7)]
    metas = split(corpus, names, workers=2)
    total, longest = IndexedDataset(corpus).tokens, max(map(len, texts(corpus)))
    assert all(abs(meta["tokens"] - total / 7) <= longest for meta in metas)
    assert [text for name in names for text in texts(name)] == texts(corpus)


def test_folders_of_parts_and_little_files_are_split_too(tmp_path: Path) -> None:
    make_parts(tmp_path / "x")
    result = herd("split", tmp_path / "x", "--shares", "1,1", "--output", tmp_path / "half", "--names", "a,b", "--json")
    metas = json.loads(result.stdout)
    assert [meta["documents"] for meta in metas.values()] == [8, 7]
    part = [[5, 6, 2], [], [7, 2], [2], [8, 9, 10, 11, 2]]
    assert texts(tmp_path / "half-a") + texts(tmp_path / "half-b") == part * 3
    split(tmp_path / "x", [tmp_path / "c", tmp_path / "d"], shares=[1, 1], seed=1)
    assert sorted(texts(tmp_path / "c") + texts(tmp_path / "d")) == sorted(part * 3)
    with IndexedWriter(tmp_path / "none", np.uint16):
        pass
    split(tmp_path / "none", [tmp_path / "e", tmp_path / "f"])
    assert texts(tmp_path / "e") == texts(tmp_path / "f") == []
    with IndexedWriter(tmp_path / "one", np.uint16) as writer:
        writer.add_document([1, 2])
    split(tmp_path / "one", [tmp_path / "g", tmp_path / "h", tmp_path / "i"])
    assert sorted(texts(tmp_path / "g") + texts(tmp_path / "h") + texts(tmp_path / "i")) == [[1, 2]]


def test_the_command_names_its_outputs(corpus: str, tmp_path: Path) -> None:
    result = herd("split", f"{corpus}.bin", "--shares", "98,1,1", "--output", corpus)
    assert result.exit_code == 0 and "corpus-valid.bin, .idx: 10 documents" in result.stdout, result.output
    assert herd("split", corpus, "--parts", 3, "--output", corpus).exit_code == 0
    assert {path.name for path in tmp_path.glob("*.idx")} == {
        "corpus.idx", "corpus-train.idx", "corpus-valid.idx", "corpus-test.idx", "corpus-0000.idx", "corpus-0001.idx", "corpus-0002.idx",
    }  # fmt: skip
    again = herd("split", corpus, "--parts", 3, "--output", corpus)
    assert again.exit_code == 2 and "corpus-0000.idx exists" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --shares or --parts"),
        (["--shares", "1,1", "--parts", "2"], "give either --shares or --parts"),
        (["--shares", "1,x"], "is not a list of numbers"),
        (["--shares", "1,-1", "--names", "a,b"], "shares [1.0, -1.0] for 2 outputs"),
        (["--shares", "0,0"], "not all 0"),
        (["--shares", "1,1,1,1"], "are not 4; give one for each"),
        (["--shares", "1,1", "--names", "a,a"], "some with the same name"),
    ],
)
def test_what_cannot_be_is_refused(corpus: str, options: list[str], message: str) -> None:
    result = herd("split", corpus, "--output", f"{corpus}-new", *options)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert not list(Path(corpus).parent.glob("corpus-new*"))


def test_an_interrupt_leaves_no_output(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(corpus, [tmp_path / "a", tmp_path / "b"], update=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.bin", "corpus.idx", "corpus.meta.json"}
    with pytest.raises(UserError, match="both the input and an output"):
        split(corpus, [corpus, tmp_path / "b"], overwrite=True)
