"""Tokenizing: the same bytes whatever the packing, the parts and the number of workers; all of the output or none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_prep import demo_text, engines, pool, progress, readers, work
from data_prep import tokenize as module
from data_prep.cutting import cutter
from data_prep.encode import Encoder, EngineMismatchError
from data_prep.engines.kinds import Official
from data_prep.errors import UserError
from data_prep.filters import Filters
from data_prep.indexed import IndexedDataset
from data_prep.parts_file import read_meta
from data_prep.readers import Batch, Reading, Tally
from data_prep.tokenize import Options
from data_prep.tokenizers import load_tokenizer, sha256
from tests import material
from tests.oracles import oracle


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about a megabyte of English in text.jsonl and a tokenizer of 1,000 pieces."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "_modules", list)  # topics alone: half a megabyte, at once
        text = demo_text.write_demo_text(folder, megabytes=1)
    demo_text.train_tokenizer(text, folder / "tokenizer.model", vocab_size=1000)
    return folder


def tokenize(inputs: list[Path], tokenizer: Path, output: Path, **options: Any) -> dict[str, Any]:
    reading = {
        name: options.pop(name) for name in ("key", "text_documents", "max_line_bytes", "filters") if name in options
    }
    return module.tokenize(inputs, tokenizer, output, Options(Reading(**reading), **{"workers": 1, **options}))


def output(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def texts_of(path: Path) -> list[str]:
    return [text for text, _ in readers.read_documents([path])]


def test_documents_are_encoded_in_order_each_with_its_end(demo: Path, tmp_path: Path) -> None:
    meta = tokenize([demo / "text.jsonl"], demo, tmp_path / "deep/out")
    tokenizer, data = load_tokenizer(demo), IndexedDataset(tmp_path / "deep/out")
    texts = texts_of(demo / "text.jsonl")
    assert len(data) == len(texts) == meta["documents"] and str(data.dtype) == meta["dtype"] == "uint16"
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(text), 2] for text in texts]
    assert meta["tokens"] == data.tokens and meta["eod"] == 2 and meta["vocab_size"] == 1000
    assert meta == read_meta(tmp_path / "deep/out")
    assert meta["tokenizer_sha256"] == sha256(demo / "tokenizer.model") and meta["tokenizer_kind"] == "sentencepiece"
    assert meta["inputs"] == [{"path": f"{demo}/text.jsonl", "bytes": (demo / "text.jsonl").stat().st_size}]
    assert meta["bad_lines"] == 0 and meta["lines"] == meta["documents"]
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out.bin", "out.idx", "out.meta.json"}


def megatrons(megatron: Any, prefix: Path, tokenizer: Any, texts: list[str], dtype: Any, bos: bool) -> None:
    """What tools/preprocess_data.py does with each line: encode, append EOD where there is anything, add."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        ids = ([tokenizer.bos] if bos else []) + tokenizer.encode(text)
        builder.add_document([*ids, tokenizer.eod] if ids else ids, [len(ids) + 1 if ids else 0])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.network
@pytest.mark.parametrize(
    ("fetch", "dtype", "bos"),
    [(material.llama2_tokenizer_model, np.uint16, True), (material.llama3_tokenizer_model, np.int32, False)],
    ids=["llama2_with_bos", "llama3"],
)
def test_bytes_are_megatrons(demo: Path, tmp_path: Path, fetch: Any, dtype: Any, bos: bool) -> None:
    """benchmarks/prep_speed.py compares 330 MB with the script itself; here its writer, on half a megabyte."""
    tokenizer = load_tokenizer(fetch())
    meta = tokenize([demo / "text.jsonl"], fetch(), tmp_path / "ours", prepend_bos=bos)
    megatron = oracle("megatron.core.datasets.indexed_dataset")
    megatrons(megatron, tmp_path / "theirs", tokenizer, texts_of(demo / "text.jsonl"), dtype, bos)
    assert output(tmp_path / "ours") == output(tmp_path / "theirs")
    assert meta["engine"] != ["official"] and meta["prepend_bos"] is bos
    assert len(megatron.IndexedDataset(str(tmp_path / "ours"))) == meta["documents"]


@pytest.fixture(scope="module")
def corpus(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[bytes, bytes]]:
    """A folder of every kind of file, and the token file of it made in one go."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (demo / "text.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:20]) + b"broken\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[20:40])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[40:55])))
    table = arrow.table({"text": [json.loads(line)["text"] for line in lines[55:]]})
    parquet.write_table(table, folder / "d.parquet", row_group_size=7)
    (folder / "e.txt").write_bytes(b"a whole file\nis a document\n")
    (folder / "f.txt.gz").write_bytes(gzip.compress(b"another"))
    tokenize([folder], demo, folder / "all/out", max_bad=0.5)
    assert IndexedDataset(folder / "all/out").lengths.size == len(lines) + 2
    return folder, output(folder / "all/out")


@pytest.mark.parametrize(
    ("workers", "part_bytes", "engine"), [(1, 5_000, "fastokens"), (2, 20_000, "official"), (3, 3_000, "fastokens")]
)
def test_neither_workers_nor_parts_nor_engine_change_a_byte(
    demo: Path, corpus: tuple[Path, tuple[bytes, bytes]], tmp_path: Path, workers: int, part_bytes: int, engine: str
) -> None:
    options = {"workers": workers, "part_bytes": part_bytes, "engine": engine, "max_bad": 0.5, "keep_parts": True}
    meta = tokenize([corpus[0]], demo, tmp_path / "out", **options)
    assert output(tmp_path / "out") == corpus[1] and meta["engine"] == [engine]
    parts = json.loads((tmp_path / "out.parts/parts.json").read_text())["parts"]
    assert len(parts) > 12 and meta["bad_examples"] == [
        f"{corpus[0]}/a.jsonl:21: broken JSON (Expecting value at column 1)"
    ]
    assert not [path.name for path in (tmp_path / "out.parts").iterdir() if path.name.startswith(".")]
    logged = json.loads((tmp_path / "out.rejected.jsonl").read_text())
    assert (logged["file"], logged["line"], logged["excerpt"]) == (f"{corpus[0]}/a.jsonl", 21, "broken")


def test_nodes_that_work_together_leave_parts_for_a_merge(
    demo: Path, corpus: tuple[Path, tuple[bytes, bytes]], tmp_path: Path
) -> None:
    for node in (1, 0):  # the second finds all done
        options = {"task": (node, 2), "merge": False, "part_bytes": 20_000, "max_bad": 0.5}
        tokenize([corpus[0]], demo, tmp_path / "out", **options)
        assert not (tmp_path / "out.bin").exists() and (tmp_path / "out.parts/parts.json").exists()
    tokenize([corpus[0]], demo, tmp_path / "out", max_bad=0.5)
    assert output(tmp_path / "out") == corpus[1] and not (tmp_path / "out.parts").exists()


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of parts as they are made."""
    names: list[str] = []
    make = work.Worker.make

    def counted(self: Any, part: Any) -> Any:
        names.append(part.name)
        return make(self, part)

    monkeypatch.setattr(work.Worker, "make", counted)
    return names


def test_a_rerun_makes_only_what_is_missing_damaged_or_changed(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (demo / "text.jsonl").read_bytes().splitlines(keepends=True)
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_bytes(b"".join(lines[16 * i : 16 * i + 16]))
    inputs, names = sorted(tmp_path.glob("*.jsonl")), made(monkeypatch)
    options = {"part_bytes": 60_000, "merge": False}
    tokenize(inputs, demo, tmp_path / "out", **options)
    first, folder = list(names), tmp_path / "out.parts"
    assert len(first) >= 4
    names.clear()
    tokenize(inputs, demo, tmp_path / "out", **options)
    assert names == []
    (folder / f"{first[0]}.bin").write_bytes(b"cut")  # a file system that lost the end of a file
    (folder / f"{first[1]}.json").unlink()
    (folder / f".{first[2]}.elsewhere.99.bin").write_bytes(b"left by a node that died")
    tokenize(inputs, demo, tmp_path / "out", **options)
    assert names == first[:2]
    names.clear()
    inputs[-1].write_bytes(b"".join(lines[64:]))
    tokenize(inputs, demo, tmp_path / "out", **options)
    assert names and all(name.startswith("3-") for name in names) and not set(names) & set(first)
    assert not [path for path in folder.iterdir() if path.name.startswith("3-") and path.name.split(".")[0] in first]
    names.clear()
    tokenize(inputs, demo, tmp_path / "out", **{**options, "append_eod": False})
    assert len(names) >= 4
    tokenize(inputs, demo, tmp_path / "fresh", append_eod=False)
    tokenize(inputs, demo, tmp_path / "out", append_eod=False)
    assert output(tmp_path / "out") == output(tmp_path / "fresh")


def test_a_part_damaged_on_the_disk_is_named_and_made_anew(demo: Path, tmp_path: Path) -> None:
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out", merge=False, part_bytes=200_000)
    part = sorted((tmp_path / "out.parts").glob("*.bin"))[1]
    raw = bytearray(part.read_bytes())
    raw[100] ^= 1
    part.write_bytes(raw)
    meta = tokenize([demo / "text.jsonl"], demo, tmp_path / "out")
    tokenize([demo / "text.jsonl"], demo, tmp_path / "fresh")
    assert output(tmp_path / "out") == output(tmp_path / "fresh") and meta["documents"] > 0


class Wrong:
    """A fast engine that is right on the sample, and later is not."""

    name, special = "fastokens", False

    def __init__(self, right: Any) -> None:
        self.right = right

    def encode_flat(self, texts: list[str]) -> Any:
        ids, lengths = self.right.encode_flat(texts)
        return ids ^ np.uint32(any("yield" in text for text in texts)), lengths


def test_an_engine_that_proves_wrong_is_given_up_with_all_it_made(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = engines.load_engine
    monkeypatch.setattr(
        engines, "load_engine",
        lambda name, *a, **k: Wrong(load(name, *a, **k)) if name == "fastokens" else load(name, *a, **k),
    )  # fmt: skip
    monkeypatch.setattr("data_prep.held_engine._sample", lambda *_: ["fine"])
    monkeypatch.setattr("data_prep.encode.CHECKED", 1.0)
    choose = engines.choose
    monkeypatch.setattr(engines, "choose", lambda *a, **k: _without_gigatoken(choose(*a, **k)))
    monkeypatch.setattr("data_prep.engines.probes", lambda tokenizer: ["a probe"])
    # parts on which it is right, then some on which every stretch shows it wrong, whichever are drawn
    lines = [json.dumps({"text": word * 400}) for word in ["right words "] * 60 + ["yield on "] * 60]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    meta = tokenize([tmp_path / "text.jsonl"], demo, tmp_path / "out", part_bytes=50_000, progress=True)
    assert "engine fastokens gave other ids than the official tokenizer" in capsys.readouterr().err
    assert meta["engine"] == ["official"]
    monkeypatch.undo()
    tokenize([tmp_path / "text.jsonl"], demo, tmp_path / "fresh")
    assert output(tmp_path / "out") == output(tmp_path / "fresh")


@pytest.mark.parametrize("words", [3, 50_000])
def test_of_each_part_a_stretch_is_checked_however_long_its_documents(demo: Path, words: int) -> None:
    tokenizer = load_tokenizer(demo)
    encoder = Encoder(tokenizer, Wrong(Official(tokenizer)), None, True, False)
    for part in ("a-0000", "a-0001"):
        encoder.mark(part)
        with pytest.raises(EngineMismatchError):
            encoder(Batch(["yield " * words], Tally(lines=1), 6 * words, [], [1]))
        assert encoder.checked == 1


def _without_gigatoken(choice: Any) -> Any:
    if choice.name == "gigatoken":
        choice.name = "fastokens" if "fastokens" in choice.speeds else "official"
    return choice


def test_damaged_packed_files_are_told_at_the_end_and_may_be_allowed(demo: Path, tmp_path: Path) -> None:
    lines = (demo / "text.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-40_000])
    (tmp_path / "b.jsonl").write_bytes(lines)
    with pytest.raises(UserError) as error:
        tokenize([tmp_path], demo, tmp_path / "out", part_bytes=60_000)
    message = str(error.value)
    assert (
        "1 file(s) cannot be read to the end" in message and "a.jsonl.gz: the gzip data ends in the middle" in message
    )
    assert "--allow-damaged" in message and not (tmp_path / "out.bin").exists()
    meta = tokenize([tmp_path], demo, tmp_path / "out", allow_damaged=True)
    whole = len(texts_of(demo / "text.jsonl"))
    assert whole < meta["documents"] < 2 * whole and list(meta["damaged"]) == [f"{tmp_path}/a.jsonl.gz"]
    assert meta["bad_causes"] == {"line cut off": 1}


def test_large_documents_are_encoded_piece_by_piece_alike(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(texts_of(demo / "text.jsonl"))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    monkeypatch.setattr("data_prep.encode.LONG", 30_000)
    monkeypatch.setattr("data_prep.textfile.BLOCK_BYTES", 50_000)
    tokenizer = load_tokenizer(demo)
    assert cutter(tokenizer) is not None
    meta = tokenize([tmp_path], demo, tmp_path / "out", max_line_bytes=2_000_000, prepend_bos=True)
    tokenize([tmp_path / "a.txt"], demo, tmp_path / "pieces", max_line_bytes=100_000, prepend_bos=True)
    wanted = [1, *tokenizer.encode(text), 2]
    data = IndexedDataset(tmp_path / "out")
    assert [data[i].tolist() for i in range(len(data))] == [wanted, wanted] and meta["documents"] == 2
    pieces = IndexedDataset(tmp_path / "pieces")
    assert len(pieces) == 1 and pieces[0].tolist() == wanted


def test_a_large_text_that_turns_out_bad_leaves_nothing_of_itself(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.textfile.BLOCK_BYTES", 1000)
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / "b.txt").write_bytes(b"some words\n" * 900 + b"\xff")
    (tmp_path / "c.txt").write_text("behind")
    meta = tokenize([tmp_path], demo, tmp_path / "out", max_line_bytes=5000, max_bad=0.5)
    data, tokenizer = IndexedDataset(tmp_path / "out"), load_tokenizer(demo)
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(x), 2] for x in ("before", "behind")]
    assert meta["bad_causes"] == {"broken UTF-8": 1} and meta["documents"] == 2


def test_control_tokens_in_text_are_text_unless_asked(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hello </s> there"}\n')
    meta = tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", append_eod=False)
    assert IndexedDataset(tmp_path / "out")[0].tolist() == load_tokenizer(demo).encode("hello </s> there")
    assert 2 not in IndexedDataset(tmp_path / "out")[0] and meta["append_eod"] is False
    tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "asked", append_eod=False, parse_special=True)
    assert np.count_nonzero(IndexedDataset(tmp_path / "asked")[0] == 2) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_accounted_for_and_too_many_leave_nothing(demo: Path, tmp_path: Path, workers: int) -> None:
    lines = ['{"text": "fine"}', "broken", '{"text": ""}', "", '{"text": "fine too"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    meta = tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", max_bad=0.5, workers=workers)
    assert (meta["lines"], meta["documents"], meta["bad_lines"], meta["blank_lines"]) == (5, 2, 2, 1)
    assert meta["bad_causes"] == {"broken JSON": 1, "empty text": 1}
    assert meta["bad_examples"][0].startswith(f"{tmp_path}/a.jsonl:2: broken JSON")
    before = output(tmp_path / "out")
    with pytest.raises(UserError, match=r"2 of 4 lines are bad.*all in .*out\.rejected\.jsonl"):
        tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", max_bad=0.1, workers=workers, overwrite=True)
    assert output(tmp_path / "out") == before and read_meta(tmp_path / "out") == meta
    log = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["cause"]) for entry in log] == [(2, "broken JSON"), (3, "empty text")]


def test_a_text_the_tokenizer_fails_on_is_a_bad_line(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = engines.load_engine

    def poisoned(*arguments: Any, **options: Any) -> Any:
        engine = load(*arguments, **options)
        encode = engine.encode_flat

        def fails(texts: list[str]) -> Any:
            if "poison" in texts:
                raise ValueError("no")
            return encode(texts)

        engine.encode_flat = fails
        return engine

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "poison"}\n{"text": "b"}\n')
    monkeypatch.setattr(work.engines, "load_engine", poisoned)
    meta = tokenize([tmp_path / "a.jsonl"], demo, tmp_path / "out", max_bad=0.5, engine="official")
    assert meta["documents"] == 2 == len(IndexedDataset(tmp_path / "out"))
    assert meta["bad_causes"] == {"the tokenizer failed": 1}


def test_filters_leave_out_good_documents_and_count_them(demo: Path, tmp_path: Path) -> None:
    records = [{"text": "kurz", "lang": "de"}, {"text": "a long enough text", "lang": "en"}, {"text": "no tag at all"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    parquet.write_table(
        arrow.table({name: [r.get(name) for r in records] for name in ("text", "lang")}), tmp_path / "b.parquet"
    )
    meta = tokenize([tmp_path], demo, tmp_path / "out", filters=Filters(min_chars=10, languages=("en",)))
    assert meta["documents"] == 2 and meta["bad_lines"] == 0 and meta["filtered"]["too short"] == 2
    assert sum(meta["filtered"].values()) == 4 and meta["filters"]["min_chars"] == 10
    everything = tokenize([tmp_path], demo, tmp_path / "all")
    assert everything["documents"] == 6 and everything["filtered"] == {}


def test_existing_output_is_kept_unless_overwritten(demo: Path, tmp_path: Path) -> None:
    for ending in ("meta.json", "idx", "bin"):
        existing = tmp_path / f"out.{ending}"
        existing.write_text("precious")
        with pytest.raises(UserError, match=rf"out\.{ending} exists.*--overwrite") as error:
            tokenize([demo / "text.jsonl"], demo, tmp_path / "out")
        assert error.value.code == 2 and existing.read_text() == "precious"
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out", overwrite=True)
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
            tokenize(*arguments)  # type: ignore[arg-type]
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
    assert tokenize([demo / "text.jsonl"], tmp_path, tmp_path / "out", append_eod=False)["eod"] is None


def test_progress_is_plain_lines_away_from_a_terminal(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out", progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "MB/s" in captured.err and "s left" in captured.err and "\x1b" not in captured.err
    assert "the same ids as the official tokenizer on a sample" in captured.err


def test_a_full_disk_is_one_line_and_keeps_what_is_done(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, parts = Path.replace, iter(range(100))

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".bin") and next(parts) == 3:
            raise OSError(28, "No space left on device", str(self))
        return write(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; free space there"):
        tokenize([demo / "text.jsonl"], demo, tmp_path / "out", part_bytes=50_000)
    names = made(monkeypatch)
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out")
    total = len(json.loads((tmp_path / "out.meta.json").read_text())["inputs"])
    assert total == 1 and 0 < len(names) <= 8


def test_a_worker_that_dies_is_replaced_and_a_deadly_part_is_named(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERD_TEST_DEADLY", "once")
    monkeypatch.setattr(pool, "_main", die_at_first)
    tokenize([demo / "text.jsonl"], demo, tmp_path / "out", workers=2, part_bytes=100_000)
    tokenize([demo / "text.jsonl"], demo, tmp_path / "fresh")
    assert output(tmp_path / "out") == output(tmp_path / "fresh")
    monkeypatch.setenv("HERD_TEST_DEADLY", "always")
    with pytest.raises(UserError, match=r"3 workers died at .* want of memory; .* fewer --workers"):
        tokenize([demo / "text.jsonl"], demo, tmp_path / "never", workers=2, part_bytes=100_000)


MAIN = pool._main


def die_at_first(job: Any, *arguments: Any) -> None:
    """As the kernel does to a worker that takes too much memory."""
    import os

    flag = job.folder / ".died.once"
    if os.environ["HERD_TEST_DEADLY"] == "always" or not flag.exists():
        flag.touch()
        os._exit(9)
    MAIN(job, *arguments)
