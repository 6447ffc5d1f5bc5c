"""Tokenizing: the same bytes whatever the packing and the number of workers; all of the output or none."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import zstandard

from data_prep import demo_text, readers
from data_prep import tokenize as module
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from data_prep.tokenize import read_meta, tokenize
from data_prep.tokenizers import load_tokenizer, sha256
from tests import material


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about a megabyte of English in text.jsonl and a tokenizer of 1,000 pieces."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "_modules", list)  # topics alone: half a megabyte, at once
        text = demo_text.write_demo_text(folder, megabytes=1)
    demo_text.train_tokenizer(text, folder / "tokenizer.model", vocab_size=1000)
    return folder


def output(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_documents_are_encoded_in_order_each_with_its_end(demo: Path, tmp_path: Path) -> None:
    meta = tokenize([demo / "text.jsonl"], demo, tmp_path / "deep/out", workers=1)
    tokenizer, data = load_tokenizer(demo), IndexedDataset(tmp_path / "deep/out")
    texts = [text for text, _ in readers.read_documents([demo / "text.jsonl"])]
    assert len(data) == len(texts) == meta["documents"] and str(data.dtype) == meta["dtype"] == "uint16"
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(text), 2] for text in texts]
    assert meta["tokens"] == data.tokens and meta["eod"] == 2 and meta["vocab_size"] == 1000
    assert meta == read_meta(tmp_path / "deep/out")
    assert meta["tokenizer_sha256"] == sha256(demo / "tokenizer.model") and meta["tokenizer_kind"] == "sentencepiece"
    assert meta["inputs"] == [{"path": f"{demo}/text.jsonl", "bytes": (demo / "text.jsonl").stat().st_size}]
    assert meta["bad_lines"] == 0 and meta["lines"] == meta["documents"]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(readers.chunks_of, "__defaults__", (None, 10_000))  # dozens of chunks
    for count in (1, workers):
        tokenize([demo / "text.jsonl"], demo, tmp_path / str(count), workers=count)
    assert output(tmp_path / "1") == output(tmp_path / str(workers))
    assert read_meta(tmp_path / "1") == read_meta(tmp_path / str(workers))


def test_packings_give_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    plain = (demo / "text.jsonl").read_bytes()
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "text.jsonl.zst").write_bytes(zstandard.compress(plain))
    sources = [demo / "text.jsonl", tmp_path / "text.jsonl.gz", tmp_path / "text.jsonl.zst"]
    for i, source in enumerate(sources):
        tokenize([source], demo, tmp_path / str(i), workers=1)
    assert output(tmp_path / "0") == output(tmp_path / "1") == output(tmp_path / "2")


@pytest.mark.network
@pytest.mark.parametrize(
    ("fetch", "dtype"), [(material.llama2_tokenizer_model, "uint16"), (material.llama3_tokenizer_model, "int32")]
)
def test_real_tokenizers_give_the_type_megatron_gives(demo: Path, tmp_path: Path, fetch: Any, dtype: str) -> None:
    meta = tokenize([demo / "text.jsonl"], fetch(), tmp_path / "out", workers=1)
    data = IndexedDataset(tmp_path / "out")
    assert str(data.dtype) == meta["dtype"] == dtype and data[0][-1] == meta["eod"]
    first = next(readers.read_documents([demo / "text.jsonl"]))[0]
    assert load_tokenizer(fetch()).decode(data[0][:-1].tolist()) == first


def test_without_eod_nothing_is_added(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hello </s> there"}\n')
    meta = tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", append_eod=False, workers=1)
    assert IndexedDataset(tmp_path / "out")[0].tolist() == load_tokenizer(demo).encode("hello </s> there")
    assert 2 not in IndexedDataset(tmp_path / "out")[0] and meta["append_eod"] is False


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_accounted_for_and_too_many_leave_nothing(demo: Path, tmp_path: Path, workers: int) -> None:
    lines = ['{"text": "fine"}', "broken", '{"text": ""}', "", '{"text": "fine too"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    meta = tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", max_bad=0.5, workers=workers)
    assert (meta["lines"], meta["documents"], meta["bad_lines"], meta["blank_lines"]) == (5, 2, 2, 1)
    assert meta["bad_causes"] == {"broken JSON": 1, "empty text": 1}
    assert meta["bad_examples"][0].startswith(f"{tmp_path}/a.jsonl:2: broken JSON")
    before = output(tmp_path / "out")
    with pytest.raises(UserError, match="2 of 4 lines are bad"):
        tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", max_bad=0.1, workers=workers, overwrite=True)
    assert output(tmp_path / "out") == before and read_meta(tmp_path / "out") == meta
    with pytest.raises(UserError, match="2 of 4 lines are bad"):
        tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "new", workers=workers)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out.bin", "out.idx", "out.meta.json"}


def test_existing_output_is_kept_unless_overwritten(demo: Path, tmp_path: Path) -> None:
    for ending in ("meta.json", "idx", "bin"):
        existing = tmp_path / f"out.{ending}"
        existing.write_text("precious")
        with pytest.raises(UserError, match=rf"out\.{ending} exists.*--overwrite") as error:
            tokenize([demo / "text.jsonl"], demo, tmp_path / "out")
        assert error.value.code == 2 and existing.read_text() == "precious"
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out", overwrite=True, workers=1)
    assert IndexedDataset(tmp_path / "out").tokens == read_meta(tmp_path / "out")["tokens"]  # type: ignore[index]


def test_wrong_use_is_refused_before_any_work(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    text = demo / "text.jsonl"
    for arguments, cause in [
        (([text], demo, f"{tmp_path}/"), "is a folder"),
        (([tmp_path / "none.jsonl"], demo, tmp_path / "out"), "no such file"),
        (([tmp_path / "empty.jsonl"], demo, tmp_path / "out"), "no document"),
        (([text], demo / "nowhere", tmp_path / "out"), "no such tokenizer"),
    ]:
        with pytest.raises(UserError, match=cause):
            tokenize(*arguments, workers=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        tokenize([text], demo, tmp_path / "out", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_a_tokenizer_without_an_end_of_text_needs_no_eod(demo: Path, tmp_path: Path) -> None:
    load_tokenizer(demo).save_for_transformers(tmp_path / "full")
    value = json.loads((tmp_path / "full/tokenizer.json").read_text())
    value["model"]["vocab"]["<nothing>"] = value["model"]["vocab"].pop("</s>")
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != "</s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"names no end-of-document token.*--no-eod"):
        tokenize([demo / "text.jsonl"], tmp_path / "tokenizer.json", tmp_path / "out")
    assert tokenize([demo / "text.jsonl"], tmp_path, tmp_path / "out", append_eod=False, workers=1)["eod"] is None


def test_a_text_the_tokenizer_fails_on_is_named(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        vocab_size, eod, path = 10, 1, demo / "tokenizer.model"

        def encode(self, text: str) -> list[int]:
            if text == "poison":
                raise ValueError("no")
            return [3]

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [self.encode(text) for text in texts]

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "poison"}\n')
    monkeypatch.setattr(module.tokenizers, "load_tokenizer", lambda path: Failing())
    with pytest.raises(UserError, match=r"a\.jsonl:2: the tokenizer failed: no"):
        tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_run_leaves_no_output_and_no_process(demo: Path, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "big.jsonl").write_bytes((demo / "text.jsonl").read_bytes() * 150)  # minutes of work
    command = [sys.executable, "-m", "launch.cli", "prep", "tokenize", "big.jsonl", "--tokenizer", str(demo)]
    root = Path(module.__file__).parents[1]
    run = subprocess.Popen(
        [*command, "--output", "out", "--workers", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
    )
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "out.bin.tmp").exists() and (tmp_path / "out.bin.tmp").stat().st_size):
            assert run.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
            time.sleep(0.02)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
        _, messages = run.communicate(timeout=60)
    finally:
        run.kill()
    expected = {signal.SIGINT: 1, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert run.returncode == expected and b"Traceback" not in messages
    left = {path.name for path in tmp_path.iterdir()} - {"big.jsonl"}
    assert left == ({"out.bin.tmp"} if number == signal.SIGKILL else set())  # nothing can tidy up after a kill
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1]


def end_at_once(chunk: readers.Chunk) -> None:
    """As the kernel does to a worker that takes too much memory."""
    os._exit(9)


def test_a_worker_that_dies_is_said_in_one_line(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_work", end_at_once)
    with pytest.raises(UserError, match=r"a worker process died.*fewer than --workers 2"):
        tokenize([demo / "text.jsonl"], demo, tmp_path / "out", workers=2)
    assert not list(tmp_path.iterdir())


def test_progress_is_plain_lines_away_from_a_terminal(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out", workers=1, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "MB/s" in captured.err and "100.0%" in captured.err and "\x1b" not in captured.err
