"""Training from parts: a folder is the dataset that its merge would be, to the fingerprint, with few files open."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep import joined
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset, IndexedWriter
from data_prep.joined import Joined, open_tokens
from data_prep.merge import merge_parts
from data_prep.parts_file import read_meta
from data_prep.verify import verify

PARTS = [[], [[1, 2, 3], [4]], [[]], [[5, 6], [], [7, 8, 9]], []]


def make_parts(prefix: Path, parts: list[list[list[int]]] = PARTS) -> Path:
    folder, listed = Path(f"{prefix}.parts"), []
    folder.mkdir(parents=True, exist_ok=True)
    for k, documents in enumerate(parts):
        with IndexedWriter(folder / f"p{k}", np.uint16) as writer:
            for document in documents:
                writer.add_document(document)
        sequences = sum(map(bool, documents))
        listed.append({"name": f"p{k}", "documents": len(documents), "sequences": sequences, "tokens": writer.tokens})
    facts = {"herd_parts": 1, "dtype": "<u2", "parts": listed, "meta": {"eod": 2}}
    (folder / "parts.json").write_text(json.dumps(facts))
    return folder


def test_it_is_the_merged_file(tmp_path: Path) -> None:
    folder = make_parts(tmp_path / "x")
    one = open_tokens(tmp_path / "x")
    assert isinstance(one, Joined) and read_meta(tmp_path / "x") == {"eod": 2}
    merge_parts(folder, workers=2)
    merged = open_tokens(tmp_path / "x")
    assert not isinstance(merged, Joined)
    assert one.fingerprint == merged.fingerprint and len(one) == len(merged) == 4 and one.dtype == merged.dtype
    assert one.lengths.tolist() == merged.lengths.tolist() and one.documents.tolist() == merged.documents.tolist()
    assert one.tokens == merged.tokens == 9
    for i in (0, 1, 2, 3, -1):
        assert one[i].tolist() == merged[i].tolist()
    assert one.get(3, 1, 1).tolist() == [8] and one.document(3).tolist() == [5, 6] and one.document(2).tolist() == []
    for wrong in ((0, 3, 2), (0, -1, 1), (2, 0, 9), (4, 0, 1)):
        with pytest.raises(IndexError):
            one.get(*wrong)
    assert next(iter(folder.glob("joined-*.idx"))).read_bytes() == (tmp_path / "x.idx").read_bytes()
    pieces = [(Path(path).name, offset, count) for path, offset, count in one.pieces(2, 14)]
    assert pieces == [("p1.bin", 2, 6), ("p3.bin", 0, 6)]
    again = pickle.loads(pickle.dumps(one))
    assert isinstance(again, Joined) and again[2].tolist() == [5, 6]


def test_samples_are_those_of_the_merged_file(tmp_path: Path) -> None:
    from llama.data.samples import Samples

    random = np.random.default_rng(1)
    parts = [[random.integers(0, 99, size).tolist() for size in random.integers(0, 40, 9)] for _ in range(11)]
    folder = make_parts(tmp_path / "x", parts)
    one = open_tokens(folder)
    merge_parts(folder)
    merged = open_tokens(tmp_path / "x")
    ours, theirs = (Samples(data, (0, len(data)), 16, 200, 7) for data in (one, merged))
    assert ours.fingerprint == theirs.fingerprint
    assert all((ours[i] == theirs[i]).all() for i in range(250))


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 parts with 60 open files allowed, in a process of its own."""
    folder = make_parts(tmp_path / "x", [[[k, k + 1]] for k in range(200)])
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60));"
        "from data_prep import joined; data = joined.open_tokens(sys.argv[1]);"
        "assert [data[i].tolist() for i in range(200)] == [[i, i + 1] for i in range(200)];"
        "print(joined.MAPS)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "16\n", done.stderr
    assert 16 <= joined.MAPS <= max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4 + 1)


def test_offsets_pass_40_billion_tokens(tmp_path: Path) -> None:
    """Ten parts, links of one with holes, of two sequences as long as the format allows; and a real one behind them."""
    longest, folder = 2**31 - 1, tmp_path / "x.parts"
    with IndexedWriter(folder / "p0", np.uint16) as writer:
        writer._lengths.extend([longest, longest])
        writer._documents.extend([1, 2])
        assert writer._bin is not None
        writer._bin.truncate(4 * longest)
    with (folder / "p0.bin").open("r+b") as file:
        file.seek(4 * longest - 2)
        file.write(b"\x07\x00")
    for k in range(1, 10):
        for kind in ("bin", "idx"):
            (folder / f"p{k}.{kind}").hardlink_to(folder / f"p0.{kind}")
    with IndexedWriter(folder / "p10", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    listed = [{"name": f"p{k}", "documents": 2, "sequences": 2, "tokens": 2 * longest} for k in range(10)]
    listed.append({"name": "p10", "documents": 1, "sequences": 1, "tokens": 3})
    (folder / "parts.json").write_text(json.dumps({"herd_parts": 1, "dtype": "<u2", "parts": listed}))
    one = open_tokens(folder, thorough=True)
    assert one.tokens == 20 * longest + 3 > 40_000_000_000
    assert one[20].tolist() == [1, 2, 3] and one.get(19, longest - 2).tolist() == [0, 7]
    merge_parts(folder, workers=2)
    merged = open_tokens(tmp_path / "x")
    assert merged.fingerprint == one.fingerprint and merged.get(19, longest - 2).tolist() == [0, 7]
    assert verify(tmp_path / "x", workers=2).ok and verify(folder, workers=2).ok


def test_threads_read_at_once(tmp_path: Path) -> None:
    data = open_tokens(make_parts(tmp_path / "x", [[[k] * 5] for k in range(300)]))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda k: data[k % 300].tolist() == [k % 300] * 5, range(900)))


def test_a_folder_made_anew_is_another_dataset(tmp_path: Path) -> None:
    folder = make_parts(tmp_path / "x", [[[1, 2]]])
    before = open_tokens(folder)
    assert before[0].tolist() == [1, 2]
    make_parts(tmp_path / "x", [[[3, 4]], [[5]]])
    after = open_tokens(folder)
    assert after[0].tolist() == [3, 4] and after.fingerprint != before.fingerprint
    assert len(list(folder.glob("joined-*.idx"))) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_joined_index_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = make_parts(tmp_path / "x")
    fingerprint = open_tokens(folder).fingerprint
    path = next(iter(folder.glob("joined-*.idx")))
    whole = path.read_bytes()
    other = (folder / "p1.idx").read_bytes()
    path.write_bytes({"cut": whole[:-1], "other": other, "empty": b""}[damage])
    assert open_tokens(folder).fingerprint == fingerprint and path.read_bytes() == whole


def test_a_folder_that_may_not_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_parts(tmp_path / "x")
    real = os.access
    monkeypatch.setattr(
        joined.os, "access", lambda path, mode: Path(path) != folder and real(path, mode)
    )  # root may write anywhere
    data = open_tokens(folder)
    assert data[2].tolist() == [5, 6] and not list(folder.glob("joined-*"))
    assert not Path(data._index).exists()


def test_missing_and_cut_parts_are_named(tmp_path: Path) -> None:
    folder = make_parts(tmp_path / "x")
    (folder / "p3.bin").write_bytes(b"12")
    with pytest.raises(
        UserError, match=r"p3 holds .* 2 bytes, where parts\.json lists .* run herd prep tokenize again"
    ):
        open_tokens(folder)
    make_parts(tmp_path / "x")
    open_tokens(folder)
    (folder / "p3.bin").write_bytes(b"12")
    data = open_tokens(folder)
    assert data[0].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"p3\.bin is cut off: 2 bytes, where p3\.idx promises 10"):
        data.get(2)
    with pytest.raises(UserError, match=r"p3\.bin is cut off"):
        open_tokens(folder, thorough=True)
    (folder / "p3.bin").unlink()
    with pytest.raises(UserError, match=r"p3\.bin does not exist, and .*parts\.json lists it"):
        open_tokens(folder)
    (folder / "parts.json").unlink()
    for path in (folder, tmp_path / "x"):
        with pytest.raises(UserError, match=r"x\.parts has no parts\.json: it is not finished"):
            open_tokens(path)
    with pytest.raises(UserError, match=r"gone\.idx does not exist"):
        open_tokens(tmp_path / "gone")


def test_plain_files_are_opened_as_they_were(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add_document([70000, 1])
    data = open_tokens(tmp_path / "x")
    assert type(data) is IndexedDataset and data[0].tolist() == [70000, 1] and read_meta(tmp_path / "x") is None
