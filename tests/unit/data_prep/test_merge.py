"""Merging: bytes as one writer's and Megatron's, whatever the sizes; nothing half-written; each damaged set is named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner, Result

from data_prep import merge as module
from data_prep import placed, ranges, sized_pair
from data_prep.errors import UserError
from data_prep.index_format import Header
from data_prep.indexed import IndexedDataset, IndexedWriter
from data_prep.merge import merge, merge_parts
from data_prep.sets import expand_sets
from launch.prep import command
from tests.oracles import oracle

DOCUMENTS = [[[1, 2], []], [], [[3]], [[]], [[4, 5, 6], [7], [8, 9, 10, 11]]]


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def pair(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def digest(path: Path | str) -> str:
    return xxhash.xxh3_128(Path(path).read_bytes()).hexdigest()


def make_parts(prefix: Path, parts: list[list[list[int]]] = DOCUMENTS, **meta: Any) -> Path:
    """A finished folder PREFIX.parts."""
    folder = Path(f"{prefix}.parts")
    listed = []
    for k, documents in enumerate(parts):
        name = f"part-{k:05d}"
        data = IndexedDataset(write(folder / name, documents))
        listed.append({"name": name, "documents": len(documents), "sequences": len(data), "tokens": data.tokens})
        listed[-1] |= {f"{kind}_xxh3": digest(folder / f"{name}.{kind}") for kind in ("bin", "idx")}
    (folder / "parts.json").write_text(json.dumps({"herd_parts": 1, "dtype": "<u2", "parts": listed, "meta": meta}))
    return folder


def herd(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few entries and ranges of a few bytes."""
    monkeypatch.setattr(placed, "CHUNK", 2)
    monkeypatch.setattr(module, "TASK", 6)
    monkeypatch.setattr(ranges, "BUFFER", 4)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_result_is_what_one_writer_writes(tmp_path: Path, small: None, workers: int) -> None:
    sets = [write(tmp_path / f"set{k}", documents) for k, documents in enumerate(DOCUMENTS)]
    whole = write(tmp_path / "whole", [document for documents in DOCUMENTS for document in documents])
    copied: list[int] = []
    totals = merge(sets, tmp_path / "deep/out", workers=workers, update=copied.append)
    assert pair(tmp_path / "deep/out") == pair(whole)
    assert (totals.documents, totals.sequences, totals.tokens, totals.bin_bytes) == (7, 5, 11, 22)
    assert (totals.bin_xxh3, totals.idx_xxh3) == (digest(f"{whole}.bin"), digest(f"{whole}.idx"))
    assert sum(copied) == 22 and sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out.bin", "out.idx"]


def test_megatrons_builder_merges_to_the_same_bytes(tmp_path: Path) -> None:
    megatron = oracle("megatron.core.datasets.indexed_dataset")
    random = np.random.default_rng(1)
    for dtype, top in ((np.uint16, 60000), (np.int32, 120000)):
        sets = []
        for k in range(4):  # their add_index collects garbage each time
            with IndexedWriter(tmp_path / f"{top}-{k}", dtype) as writer:
                for _ in range(int(random.integers(0, 20))):
                    sizes = random.integers(0, 9, random.integers(0, 4)).tolist()
                    writer.add_document(random.integers(0, top, sum(sizes)), sizes)
            sets.append(writer.prefix)
        theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
        for prefix in sets:
            theirs.add_index(prefix)
        theirs.finalize(str(tmp_path / "theirs.idx"))
        merge(sets, tmp_path / "ours", overwrite=True, workers=2)
        assert pair(tmp_path / "ours") == pair(tmp_path / "theirs")


def test_thousands_of_sets_are_merged(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4]])
    write(tmp_path / "b", [[5]])
    merge([tmp_path / "ab"[k % 2] for k in range(3001)], tmp_path / "out", workers=2)
    data = IndexedDataset(tmp_path / "out")
    assert len(data) == 1501 * 2 + 1500 and data[4500].tolist() == [1, 2, 3] and data.tokens == 1501 * 4 + 1500


def test_offsets_pass_40_billion_tokens(tmp_path: Path) -> None:
    """80 GB with holes, in copies of a set of two sequences as long as the format allows, and a real one at the end."""
    longest = 2**31 - 1
    with IndexedWriter(tmp_path / "long", np.uint16) as writer:
        writer._lengths.extend([longest, longest])
        writer._documents.extend([1, 2])
        assert writer._bin is not None
        writer._bin.truncate(4 * longest)
    with Path(f"{writer.prefix}.bin").open("r+b") as file:
        for at in (0, 2 * longest - 2, 4 * longest - 2):  # first and last token of both
            file.seek(at)
            file.write(b"\x07\x00")
    last = write(tmp_path / "last", [[1, 2, 3]])
    totals = merge([writer.prefix] * 10 + [last], tmp_path / "out", workers=2)
    data = IndexedDataset(tmp_path / "out")
    assert totals.tokens == data.tokens == 20 * longest + 3 > 40_000_000_000
    assert data[20].tolist() == [1, 2, 3] and data.get(19, longest - 2).tolist() == [0, 7]
    assert data.get(18, 0, 2).tolist() == [7, 0] and int(data.pointers[20]) == 40 * longest
    assert Path(tmp_path / "out.bin").stat().st_blocks * 512 < 10_000_000
    megatron = oracle("megatron.core.datasets.indexed_dataset").IndexedDataset(str(tmp_path / "out"))
    assert megatron.get(19, longest - 2, 2).tolist() == [0, 7] and megatron[20].tolist() == [1, 2, 3]


def test_parts_become_a_set_with_its_account(tmp_path: Path, small: None) -> None:
    folder = make_parts(tmp_path / "x", tokenizer="t", vocab_size=100)
    meta = merge_parts(folder, workers=2)
    whole = write(tmp_path / "whole", [document for documents in DOCUMENTS for document in documents])
    assert pair(tmp_path / "x") == pair(whole)
    assert meta == json.loads((tmp_path / "x.meta.json").read_text())
    assert meta["tokenizer"] == "t" and meta["documents"] == 7 and meta["bin_xxh3"] == digest(f"{whole}.bin")
    with pytest.raises(UserError, match=r"x\.idx exists; choose another --output, or --overwrite"):
        merge_parts(folder)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "part-00004.bin", 3), r"part-00004\.bin is damaged: its xxh3 is"),
        (lambda folder: flip(folder / "part-00004.idx", 40), r"part-00004\.idx is damaged: its xxh3 is"),
        (lambda folder: (folder / "part-00002.bin").unlink(), r"part-00002\.bin does not exist"),
        (lambda folder: os.truncate(folder / "part-00002.bin", 1), r"part-00002 holds .* where parts\.json lists"),
        (lambda folder: os.truncate(folder / "part-00002.idx", 40), r"part-00002\.idx is cut off: 40 bytes"),
        (lambda folder: (folder / "parts.json").unlink(), r"x\.parts has no parts\.json: it is not finished"),
        (lambda folder: (folder / "parts.json").write_text("{"), r"parts\.json cannot be read"),
        (lambda folder: (folder / "parts.json").write_text('{"herd_parts": 2}'), r"this herd knows version 1"),
        (
            lambda folder: (folder / "parts.json").write_text(
                '{"herd_parts": 1, "dtype": "<u2", "parts": [{"name": "../x", "documents": 1, "sequences": 1, "tokens": 1}]}'
            ),
            r"is no name of a part",
        ),
    ],
)  # fmt: skip
def test_a_damaged_part_is_named_and_nothing_is_left(tmp_path: Path, damage: Any, message: str) -> None:
    folder = make_parts(tmp_path / "x")
    damage(folder)
    result = herd("merge", folder)
    assert result.exit_code == 1 + ("does not exist" in result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.parts"]


@pytest.mark.parametrize("at", [34, 42, 50, 70])
def test_damage_in_an_index_without_digest_is_found(tmp_path: Path, small: None, at: int) -> None:
    write(tmp_path / "good", [[1, 2]])
    bad = write(tmp_path / "bad", [[1, 2], [3], [4, 5, 6]])
    flip(Path(f"{bad}.idx"), at)
    with pytest.raises(UserError, match=r"bad\.(idx|bin)"):
        merge([tmp_path / "good", bad], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_sets_of_other_types_or_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, vocab in (("a", 100), ("b", 100), ("c", 200)):
        write(tmp_path / name, [[1]])
        meta = {"tokenizer": name, "vocab_size": vocab, "tokenizer_sha256": "s", "eod": 2, "text_bytes": 5, "lines": 1}
        (tmp_path / f"{name}.meta.json").write_text(json.dumps({**meta, "inputs": [{"path": f"{name}.jsonl"}]}))
    write(tmp_path / "wide", [[1]], np.int32)
    write(tmp_path / "foreign", [[1]])
    result = herd("merge", tmp_path / "a", tmp_path / "wide", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "a holds uint16 tokens and" in result.stderr and "wide int32" in result.stderr
    result = herd("merge", tmp_path / "a", tmp_path / "c", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "vocab_size is 100 and 200" in result.stderr and not list(tmp_path.glob("out*"))
    meta = json.loads(herd("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab", "--json").stdout)
    assert meta["vocab_size"] == 100 and meta["text_bytes"] == 10 and meta["eod"] == 2 and meta["documents"] == 2
    assert [source["path"] for source in meta["inputs"]] == ["a.jsonl", "b.jsonl"] and meta["tokenizer"] == "a"
    forced = herd("merge", tmp_path / "a", tmp_path / "c", "--output", tmp_path / "out", "--force", "--json")
    assert "vocab_size" not in json.loads(forced.stdout)
    result = herd("merge", tmp_path / "a", tmp_path / "foreign", "--output", tmp_path / "af")
    assert result.exit_code == 0 and "foreign has no .meta.json" in result.stderr and "2 documents" in result.stdout
    assert "vocab_size" not in json.loads((tmp_path / "af.meta.json").read_text())


def test_inputs_are_what_megatron_takes_and_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/a", "in/a-1", "in/b", "c"):
        write(Path(name), [[1]])
    Path("in/notes.txt").write_text("x")
    make_parts(tmp_path / "x")
    assert expand_sets(["in"]) == ["in/a-1", "in/a", "in/b"]  # by file name: "-" comes before "."
    assert expand_sets(["c.bin", "c.idx", "in/*.bin", "x"]) == [
        "c", "in/a-1", "in/a", "in/b", "x.parts",
    ]  # fmt: skip
    assert expand_sets(["in/*"]) == expand_sets(["in/[ab]*"]) == ["in/a-1", "in/a", "in/b"]
    assert expand_sets(["in/?"]) == ["in/a", "in/b"]
    for wrong, message in (
        (["c", "c"], "c is named twice"), (["in", "in/a"], "in/a is named twice"), (["no*"], "no token file has such a name"),
        (["x.parts", "x"], "x.parts is named twice"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            expand_sets(wrong)
    Path("in/b.idx").unlink()
    with pytest.raises(UserError, match=r"in/b\.idx does not exist; complete the pair"):
        expand_sets(["in"])
    Path("in/b.bin").unlink()
    result = herd("merge", "--input", "in", "--output-prefix", "out", "c", "x")
    assert result.exit_code == 0 and IndexedDataset("out").tokens == 11 + 1 + 2, result.output
    assert herd("merge", "in").exit_code == 2 and "no --output" in herd("merge", "in").stderr
    result = herd("merge", "c", "out", "--output", "out", "--overwrite")
    assert result.exit_code == 2 and "both an input and the output" in result.stderr


def test_a_full_disk_is_known_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "a", [[1, 2, 3]])
    kept = pair(write(tmp_path / "out", [[9]]))
    real = os.statvfs(tmp_path)

    class Little:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(sized_pair.os, "statvfs", lambda _: Little)
    with pytest.raises(UserError, match=r"out needs 0\.00 GB and 0\.00 GB are free; free space there"):
        merge([one], tmp_path / "out", overwrite=True)
    monkeypatch.setattr(sized_pair.os, "statvfs", lambda _: real)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ranges.os, "copy_file_range", full)
    with pytest.raises(UserError, match=r"out\.bin\.tmp: No space left on device; free space there"):
        merge([one], tmp_path / "out", overwrite=True)
    assert pair(tmp_path / "out") == kept and sorted(path.suffix for path in tmp_path.glob("out*")) == [".bin", ".idx"]


def test_it_copies_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(ranges.os, "copy_file_range", refuse)
    one = write(tmp_path / "a", [[1, 2, 3], [4]])
    merge([one, one], tmp_path / "out")
    assert IndexedDataset(tmp_path / "out")[2].tolist() == [1, 2, 3]


def test_a_second_process_is_refused_and_leftovers_are_taken_over(tmp_path: Path) -> None:
    one = write(tmp_path / "a", [[1, 2, 3]])
    (tmp_path / "out.bin.tmp").write_bytes(b"left by a kill" * 100)
    with (tmp_path / "out.bin.tmp").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"out\.bin\.tmp: another process is writing it"):
            merge([one], tmp_path / "out")
    assert (tmp_path / "out.bin.tmp").exists()
    merge([one], tmp_path / "out")
    assert pair(tmp_path / "out") == pair(one) and not list(tmp_path.glob("*.tmp"))


def test_a_kill_between_the_renames_is_made_good_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_parts(tmp_path / "x")
    calls = iter(range(100))

    class Killed(BaseException):
        pass

    real = Path.replace
    for stop in range(3):  # before .bin, .idx, .meta.json gets its name

        def replace(path: Path, target: Path, stop: int = stop, calls: Iterator[int] = calls) -> Path:
            if path.name.startswith("x.") and next(calls) == stop:
                raise Killed
            return real(path, target)

        calls = iter(range(100))
        replace.__defaults__ = (stop, calls)
        monkeypatch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            merge_parts(folder)
        monkeypatch.setattr(Path, "replace", real)
        merge_parts(folder)
        assert len(IndexedDataset(tmp_path / "x")) == 5 and not list(tmp_path.glob("*.new"))
        for kind in ("bin", "idx", "meta.json"):
            (tmp_path / f"x.{kind}").unlink()


def test_sigterm_leaves_no_half_file(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.zeros(1 << 24, np.uint16))
    script = (
        "import sys, time; from data_prep import merge; from launch.cli import main;"
        "real = merge.RangeFile.copy_to;"
        "merge.RangeFile.copy_to = lambda *a: (print('copying', flush=True), time.sleep(0.3), real(*a))[2];"
        f"sys.argv = ['herd', 'prep', 'merge', {str(tmp_path / 'a')!r}, '--output', {str(tmp_path / 'out')!r}]; main()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"copying\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_header_is_packed_as_it_is_read(tmp_path: Path) -> None:
    data = IndexedDataset(write(tmp_path / "a", [[1], [], [2, 3]]))
    assert (
        data.header == Header(np.dtype("<u2"), 2, 3) and Path(f"{data.prefix}.idx").stat().st_size == data.header.size
    )
