"""herd prep verify: every kind of fault is named with its place, and no damage is a crash, a hang or a huge allocation."""

from __future__ import annotations

import json
import os
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner, Result

from data_prep import placed, ranges, token_checks
from data_prep.errors import UserError
from data_prep.index_format import HEADER
from data_prep.indexed import IndexedDataset, IndexedWriter
from data_prep.joined import open_tokens
from data_prep.tokenizers import load_tokenizer, sha256
from data_prep.verify import verify
from launch.prep import command
from tests import material

META = {"vocab_size": 100, "eod": 2, "bos": 1, "append_eod": True, "prepend_bos": False, "parse_special": False}
DOCUMENTS = [[5, 6, 2], [], [7, 2], [2], [8, 9, 10, 11, 2]]


def digest(path: Path | str) -> str:
    return xxhash.xxh3_128(Path(path).read_bytes()).hexdigest()


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16, digests: bool = True, **meta: Any) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    noted = META | meta | {"documents": len(documents), "tokens": sum(map(len, documents))}
    if digests:
        noted |= {f"{kind}_xxh3": digest(f"{prefix}.{kind}") for kind in ("bin", "idx")}
    Path(f"{prefix}.meta.json").write_text(json.dumps(noted))
    return str(prefix)


def make_parts(prefix: Path, count: int = 3) -> Path:
    folder, listed = Path(f"{prefix}.parts"), []
    for k in range(count):
        data = IndexedDataset(write(folder / f"p{k}", DOCUMENTS, digests=False))
        listed.append({"name": f"p{k}", "documents": 5, "sequences": len(data), "tokens": data.tokens})
        listed[-1] |= {f"{kind}_xxh3": digest(folder / f"p{k}.{kind}") for kind in ("bin", "idx")}
    meta = META | {"documents": 5 * count, "tokens": 11 * count}
    (folder / "parts.json").write_text(json.dumps({"herd_parts": 1, "dtype": "<u2", "parts": listed, "meta": meta}))
    return folder


def herd(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(params=["small", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same findings whether a block holds two ids or all of them."""
    if request.param == "small":
        monkeypatch.setattr(placed, "CHUNK", 2)
        monkeypatch.setattr(token_checks, "CHUNK", 2)
        monkeypatch.setattr(token_checks, "TASK", 12)
        monkeypatch.setattr(ranges.RangeFile.blocks, "__defaults__", (4,))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_whole_file_has_no_faults(tmp_path: Path, blocks: None, workers: int) -> None:
    read: list[int] = []
    report = verify(write(tmp_path / "x", DOCUMENTS), workers=workers, update=read.append)
    assert report.ok and not report.faults and sum(read) == 22
    assert (report.documents, report.sequences, report.tokens) == (5, 4, 11)
    assert "digests of .bin and .idx" in report.checked and "each document ends with id 2" in report.checked
    assert verify(write(tmp_path / "none", [])).ok
    assert verify(write(tmp_path / "empty", [[], []])).ok
    begun = write(tmp_path / "bos", [[1, 5, 2], [], [1, 2]], prepend_bos=True)
    assert verify(begun).ok
    # Files of others: whatever stands in them, below the size that is given
    Path(f"{begun}.meta.json").unlink()
    assert verify(begun).ok and verify(begun, vocab_size=6).ok and not verify(begun, vocab_size=5).ok


FAULTS = {
    "vocabulary": ([[5, 2], [6, 100, 101, 2]], {}, r"x\.bin holds id 100, outside 0\.\.99 \(sequence 1, token 1, byte 6\)", 2),
    "no_end": ([[5, 2], [6, 7], [8, 9]], {}, r"x\.bin ends a document with id 7, .* \(sequence 1, token 1, byte 6\)", 2),
    "end_inside": ([[5, 2], [], [6, 2, 7, 2]], {}, r"control id 2 where no document ends \(sequence 1, token 1, byte 6\)", 1),
    "end_unwanted": ([[5, 2]], {"append_eod": False}, r"control id 2 where no document ends \(sequence 0, token 1", 1),
    "begin_inside": ([[5, 1, 2]], {}, r"control id 1 where no document begins \(sequence 0, token 1, byte 2\)", 1),
    "no_begin": ([[1, 2], [5, 2]], {"prepend_bos": True}, r"begins a document with id 5, and not with 1", 1),
    "account": ([[5, 2]], {"sequences": 9}, r"x\.meta\.json tells of 9 sequences, and there are 1", 1),
}  # fmt: skip


@pytest.mark.parametrize(("documents", "meta", "message", "count"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_ids_is_named_with_its_place(
    tmp_path: Path, blocks: None, documents: Any, meta: Any, message: str, count: int
) -> None:
    prefix = write(tmp_path / "x", documents, **meta)
    result = herd("verify", prefix, "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 1 and facts["ok"] is False and facts["fault_count"] == count
    assert re.search(message, facts["faults"][0]), facts["faults"]
    assert re.search(message, herd("verify", prefix).stderr)


def test_signed_ids_below_nothing_are_found(tmp_path: Path) -> None:
    report = verify(write(tmp_path / "x", [[5, -3, 2]], np.int32))
    assert report.faults == [f"{tmp_path}/x.bin holds id -3, outside 0..99 (sequence 0, token 1, byte 4)"]


def test_special_tokens_may_stand_in_text_that_was_parsed_for_them(tmp_path: Path) -> None:
    assert verify(write(tmp_path / "x", [[5, 2, 1, 2]], parse_special=True)).ok


def test_parts_are_held_to_their_list(tmp_path: Path) -> None:
    folder = make_parts(tmp_path / "x")
    open_tokens(folder)
    report = verify(tmp_path / "x", workers=2)
    assert report.ok and report.tokens == 33 and report.prefix == str(folder)
    joined = next(iter(folder.glob("joined-*.idx")))
    joined.write_bytes(joined.read_bytes()[:-8] + b"\0" * 8)
    assert "is not the index of these parts; remove it" in verify(folder).faults[0]
    (folder / "p1.bin").write_bytes((folder / "p1.bin").read_bytes()[:-2] + b"\x05\x00")
    (folder / "p2.idx").unlink()
    faults = verify(folder, workers=2).faults
    assert "p1.bin ends a document with id 5" in faults[0] and "p1.bin is not what was written" in faults[1]
    assert "p2.idx: No such file or directory" in faults[2]
    (folder / "parts.json").unlink()
    result = herd("verify", folder)
    assert result.exit_code == 1 and "is not finished" in result.stderr


def test_what_was_asked_wrongly_is_an_error_and_no_fault(tmp_path: Path) -> None:
    assert herd("verify", tmp_path / "gone").exit_code == 2
    prefix = write(tmp_path / "x", [[5, 2]])
    result = herd("verify", prefix, "--tokenizer", tmp_path / "gone.model")
    assert result.exit_code == 2 and "no such tokenizer file" in result.stderr
    Path(f"{prefix}.bin").unlink()
    result = herd("verify", prefix)
    assert result.exit_code == 1 and "x.bin: No such file or directory" in result.stderr
    Path(f"{prefix}.meta.json").write_text("{")
    assert "x.meta.json: cannot be read" in herd("verify", prefix).stderr


def test_text_is_decoded_with_the_noted_tokenizer(tmp_path: Path) -> None:
    path = material.llama2_tokenizer_model()
    tokenizer = load_tokenizer(path)
    texts = [f"Document {k} has a text of its own, naïve and 日本語." for k in range(9)]
    notes = {"vocab_size": 32000, "tokenizer": str(path), "tokenizer_sha256": sha256(path)}
    prefix = write(tmp_path / "x", [[*tokenizer.encode(text), 2] for text in texts], **notes)
    report = verify(prefix)
    assert report.ok and "8 documents decode; 8 of 8 short ones encode to the same ids again" in report.checked
    Path(f"{prefix}.meta.json").unlink()
    assert verify(prefix, tokenizer=path).ok
    other = verify(prefix, tokenizer=material.mistral_tokenizer())
    assert "text encodes to other ids with" in other.faults[0]
    again = write(tmp_path / "y", [[5, 2]], **{**notes, "tokenizer_sha256": "of another"})
    assert verify(again).ok and "its sha256 is another" in "".join(verify(again).skipped)
    assert not verify(again, tokenizer=path).ok


def test_a_file_of_80_gigabytes_with_holes_is_read_in_seconds(tmp_path: Path) -> None:
    longest = 2**31 - 1
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer._lengths.extend([longest] * 20)
        writer._documents.extend(range(1, 21))
        assert writer._bin is not None
        writer._bin.truncate(40 * longest)
    with Path(f"{writer.prefix}.bin").open("r+b") as file:
        for k in range(1, 21):
            file.seek(2 * longest * k - 2)
            file.write(b"\x02\x00")
    Path(f"{writer.prefix}.meta.json").write_text(json.dumps(META))
    report = verify(writer.prefix, workers=2)
    assert report.ok and report.tokens == 20 * longest > 40_000_000_000, report.faults
    with Path(f"{writer.prefix}.bin").open("r+b") as file:
        file.seek(2 * longest * 19 + 2 * 70_000)
        file.write(b"\xff\xff")
    expected = (
        f"{writer.prefix}.bin holds id 65535, outside 0..99 (sequence 19, token 70000, byte {38 * longest + 140_000})"
    )
    assert verify(writer.prefix, workers=2).faults == [expected]


def mutate(raw: bytes, random_: random.Random) -> bytes:
    data = bytearray(raw)
    kind = random_.randrange(5)
    if kind == 0:
        return bytes(data[: random_.randrange(len(data))])
    if kind == 1:
        return bytes(data) + random_.randbytes(random_.randrange(1, 40))
    for _ in range(1 if kind == 2 else random_.randrange(1, 5)):
        at = random_.randrange(len(data)) if random_.random() < 0.7 else random_.randrange(min(HEADER.size, len(data)))
        data[at] = data[at] ^ (1 << random_.randrange(8)) if kind < 4 else random_.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "none"])
def test_random_damage_is_found_and_is_never_a_crash(tmp_path: Path, digests: bool) -> None:
    """1,000 changes each: with digests every one is found; without, each ends in a report, and opening in a UserError
    or a dataset that can be read."""
    random_ = random.Random(4)
    prefix = write(tmp_path / "x", DOCUMENTS * 3, digests=digests)
    raw = {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")}
    found = 0
    tracemalloc.start()
    for number in range(1000):
        kind = "idx" if number % 3 else "bin"
        changed = mutate(raw[kind], random_)
        Path(f"{prefix}.{kind}").write_bytes(changed)
        report = verify(prefix)
        found += not report.ok
        assert report.ok is (not report.faults)
        if digests:
            assert changed == raw[kind] or not report.ok, f"{kind}, {changed.hex()}"
        try:
            data = IndexedDataset(prefix)
            assert sum(len(data[i]) for i in range(len(data))) == data.tokens
        except UserError as error:
            assert not report.ok and "\n" not in str(error)
        Path(f"{prefix}.{kind}").write_bytes(raw[kind])
    assert tracemalloc.get_traced_memory()[1] < 32e6
    tracemalloc.stop()
    assert found > 900 and verify(prefix).ok


def test_a_header_that_promises_everything_allocates_nothing(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[5, 2]])
    size = 1 << 36  # 64 GB, all of it a hole: the counts agree with the size of the file
    sequences = (size - HEADER.size - 8) // 12 // 2 * 2
    documents = (size - HEADER.size - 12 * sequences) // 8
    with Path(f"{prefix}.idx").open("r+b") as file:
        file.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, sequences, documents))
        file.truncate(HEADER.size + 12 * sequences + 8 * documents)
    tracemalloc.start()
    os.truncate(f"{prefix}.idx", 1000)
    report = verify(prefix)
    assert "is cut off: 1000 bytes, where its header promises" in report.faults[0]
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
