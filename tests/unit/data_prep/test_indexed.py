"""Token files: bytes as Megatron writes them, nothing half-written, every kind of damage named in one line."""

from __future__ import annotations

import errno
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import indexed
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset, IndexedWriter, token_dtype
from tests.oracles import oracle


@pytest.fixture(scope="session")
def megatron() -> Any:
    return oracle("megatron.core.datasets.indexed_dataset")


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8, np.int64])
def test_files_are_byte_identical_to_megatrons_builder(tmp_path: Path, megatron: Any, dtype: Any) -> None:
    documents = [([1, 2, 3], [3]), ([], []), ([9, 8, 7, 6, 5], [2, 3]), ([4], [1]), ([5, 6], [0, 2, 0])]
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    with IndexedWriter(tmp_path / "ours", dtype) as ours:
        for ids, lengths in documents:
            theirs.add_document(ids, lengths)
            ours.add_document(ids, lengths)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    mine = IndexedDataset(tmp_path / "theirs")
    assert len(read) == len(mine) == 7
    assert [read[i].tolist() for i in range(7)] == [mine[i].tolist() for i in range(7)]


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=12))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("round")
    dataset = IndexedDataset(write(folder / "one", documents))
    kept = [document for document in documents if document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == kept
    assert len(dataset.documents) == len(documents) + 1 and dataset.tokens == sum(map(len, documents))
    with IndexedWriter(folder / "bulk", np.uint16) as bulk:
        bulk.add_documents([i for d in documents for i in d], [len(d) for d in documents])
    for kind in ("bin", "idx"):
        assert (folder / f"one.{kind}").read_bytes() == (folder / f"bulk.{kind}").read_bytes()
    assert IndexedDataset(folder / "bulk").fingerprint == dataset.fingerprint


def test_get_gives_read_only_views_into_the_map(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", [[1, 2, 3, 4], [5, 6]]))
    part = dataset.get(0, 1, 2)
    assert part.tolist() == [2, 3] and part.dtype == np.uint16 and not part.flags.owndata and not part.flags.writeable
    assert dataset.get(1, 1).tolist() == [6] and dataset.get(0, 4).tolist() == []
    for wrong in ((0, 3, 2), (0, -1, 1), (2, 0, 1)):
        with pytest.raises(IndexError):
            dataset.get(*wrong)
    assert pickle.loads(pickle.dumps(dataset)).get(1).tolist() == [5, 6]


def test_the_vocabulary_decides_the_token_type_as_in_megatron(megatron: Any) -> None:
    for size in (256, 32000, 65499, 65500, 65536, 128256):
        assert token_dtype(size) == megatron.DType.optimal_dtype(size)


def test_an_exception_leaves_the_older_pair_and_nothing_else(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2]])
    with pytest.raises(RuntimeError), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([3, 4, 5])
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert IndexedDataset(prefix)[0].tolist() == [1, 2]
    write(Path(prefix), [[7]])
    assert IndexedDataset(prefix)[0].tolist() == [7]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexed.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x: No space left on device; free space there, or"):
        write(tmp_path / "x", [[1]])
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit_are_refused_rather_than_wrapped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"token ids 1\.\.70000 do not fit uint16; .* so that int32 is chosen"):
        write(tmp_path / "x", [[1, 70000]])
    with pytest.raises(UserError, match="tokens must be integers, found float64"):
        write(tmp_path / "x", [[1.5]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="lengths add up to 3"), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2], [3])
    assert list(tmp_path.iterdir()) == []


def patched(at: int, data: bytes) -> Any:
    return lambda raw: raw[:at] + data + raw[at + len(data) :]


DAMAGE = {  # three sequences of 2, 1, 3 tokens: lengths at 34, pointers at 46, documents at 70, end at 102
    "no_magic": ("idx", patched(0, b"PK"), r"x\.idx is not a Megatron index"),
    "empty": ("idx", lambda raw: b"", r"x\.idx is not a Megatron index"),
    "cut_header": ("idx", lambda raw: raw[:20], r"x\.idx is cut off inside its header \(20 of 34 bytes\)"),
    "version_2": ("idx", patched(9, struct.pack("<Q", 2)), r"x\.idx has version 2"),
    "dtype_9": ("idx", patched(17, b"\x09"), r"x\.idx names token type 9, and only 1 to 8 exist"),
    "cut": ("idx", lambda raw: raw[:-1], r"x\.idx is cut off: 101 bytes, where its header promises 102"),
    "too_long": ("idx", lambda raw: raw + b"1", r"x\.idx does not match its header: 103 bytes, .* 102"),
    "absurd_count": ("idx", patched(18, struct.pack("<Q", 2**60)), r"x\.idx is cut off: 102 bytes"),
    "negative_length": ("idx", patched(38, struct.pack("<i", -1)), r"x\.idx gives sequence 1 a negative length"),
    "wrong_pointer": ("idx", patched(54, struct.pack("<q", 6)), r"x\.idx points sequence 1 elsewhere than behind"),
    "documents_fall": (
        "idx",
        patched(78, struct.pack("<q", 9)),
        r"x\.idx has documents that do not run from 0",
    ),
    "documents_end": (
        "idx",
        patched(94, struct.pack("<q", 2)),
        r"x\.idx has documents that do not run from 0",
    ),
    "cut_bin": ("bin", lambda raw: raw[:-1], r"x\.bin is cut off: 11 bytes, where x\.idx promises 12"),
    "other_bin": ("bin", lambda raw: raw + raw, r"x\.bin is longer than its index: 24 bytes, where x\.idx promises 12"),
}


@pytest.mark.parametrize(("kind", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_in_one_line(tmp_path: Path, kind: str, damage: Any, message: str) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    path = Path(f"{prefix}.{kind}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(prefix)
    assert "\n" not in str(caught.value) and "herd prep tokenize" in str(caught.value)


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_missing_half_names_the_file_and_the_command(tmp_path: Path, kind: str) -> None:
    prefix = write(tmp_path / "x", [[1, 2]])
    Path(f"{prefix}.{kind}").unlink()
    with pytest.raises(UserError, match=rf"x\.{kind} does not exist; .*herd prep tokenize .*--output {prefix}$"):
        IndexedDataset(prefix)


def test_a_file_name_in_place_of_the_prefix_is_explained(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2]])
    with pytest.raises(UserError, match=rf"x\.bin\.idx does not exist; give the prefix alone, {prefix}$"):
        IndexedDataset(f"{prefix}.bin")


def test_entries_are_checked_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "CHUNK", 2)
    prefix = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    assert IndexedDataset(prefix)[2].tolist() == [4, 5, 6]
    path = Path(f"{prefix}.idx")
    path.write_bytes(patched(62, struct.pack("<q", 4))(path.read_bytes()))
    with pytest.raises(UserError, match="points sequence 2 elsewhere than behind sequence 1"):
        IndexedDataset(prefix)
