"""The parts of dedup: raw lines by ranges, normalisation and shingles by the book, signatures that agree as often as J."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup import lines, minhash, shingles
from data_prep.dedup.store import Reader, replacing, write_arrays
from data_prep.errors import UserError

# Letters that normalisation changes, joins or must leave: Latin, Greek sigma, marks, jamo, Bengali, Thai, kana, Han
TRICKY = "aB1_ -\n.,#éÉÀßẞΣσςİıKÅſ\u0301\u0323\u0345\u1100\u1161\u11a8가\u09c7\u09beกำ่日本カﾞ々。、“”…😀𝔘\u200d\ufe0f\U00020000"
TEXT = st.one_of(st.text(st.sampled_from(TRICKY), max_size=60), st.text(max_size=60))


def plain_tokens(text: str, unit: str) -> list[str]:
    """By the definition, character by character."""
    tokens, word = [], ""
    for c in unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode()).lower() + " ":
        letter = (unicodedata.category(c)[0] in "LMN" and ord(c) < shingles.KNOWN) or 0x20000 <= ord(
            c
        ) < shingles.KNOWN - 1
        own = letter and any(a <= ord(c) <= b for a, b in shingles.UNSPACED)
        alone = (unit == "char" and letter) or (unit == "auto" and own)
        if (alone or (not letter and unit != "char")) and word:
            tokens.append(word)
            word = ""
        if alone:
            tokens.append(c)
        elif letter:
            word += c
    return tokens


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, max_size=6), st.integers(1, 6), st.sampled_from(["auto", "word", "char"]))
def test_shingles_are_those_of_the_definition(texts: list[str], n: int, unit: shingles.Unit) -> None:
    wanted = []
    for text in texts:
        tokens = plain_tokens(text, unit)
        wanted.append({tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))} if tokens else set())
    got = shingles.shingle_sets(texts, n, unit)
    assert [len(one) for one in got] == [len(one) for one in wanted]
    assert len(set().union(*(one.tolist() for one in got))) == len(set().union(*wanted))
    for a in range(len(texts)):
        for b in range(len(texts)):
            both = wanted[a] | wanted[b]
            assert shingles.jaccard(got[a], got[b]) == (len(wanted[a] & wanted[b]) / len(both) if both else 0)


def test_long_tokens_differ_by_any_byte() -> None:
    words = ["x" * size for size in range(1, 200)] + ["x" * 150 + "y" + "x" * 10, "y" + "x" * 70, "x" * 63 + "y"]
    found = [int(one[0]) for one in shingles.shingle_sets(words, 5)]
    assert len(set(found)) == len(words)


@pytest.mark.parametrize("size", [5, 20, 100, 1000])
@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_signatures_agree_with_probability_j_however_short_the_text(size: int, similarity: float) -> None:
    """One permutation hashing with filled bins: the mean over many pairs is J, and so is the rate of shared bands."""
    chance, pairs = np.random.default_rng(size), 400
    shared = max(1, round(2 * size * similarity / (1 + similarity)))
    true = shared / (2 * size - shared)
    sets = chance.integers(0, 1 << 64, (pairs, 2 * size - shared), dtype=np.uint64)
    first, second = sets[:, :size], sets[:, size - shared :]
    counts = np.full(pairs, size)
    a, b = (minhash.signatures(np.ascontiguousarray(x).reshape(-1), counts, 120) for x in (first, second))
    assert np.mean(a == b) == pytest.approx(true, abs=0.03)
    common = (minhash.band_hashes(a, 20, 6) == minhash.band_hashes(b, 20, 6)).any(axis=1).mean()
    assert common == pytest.approx(minhash.share_band(true, 20, 6), abs=0.1)


def test_documents_without_shingles_have_empty_signatures() -> None:
    signature = minhash.signatures(np.array([7], dtype=np.uint64), np.array([0, 1, 0]), 12)
    assert (signature[[0, 2]] == minhash.EMPTY).all() and len(set(signature[1].tolist())) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    st.integers(1, 60),
    st.booleans(),
)
def test_ranges_of_a_file_hold_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], size: int, end: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    data = b"\n".join(rows) + b"\n" * (end and bool(rows))
    if data[:2] == b"\x1f\x8b" or data[:4] == b"\x28\xb5\x2f\xfd":
        return
    path.write_bytes(b"x" + data)
    found = [line for at in range(0, len(data) + 1, size) for line in lines.read_lines(path, at, at + size)]
    whole = list(lines.read_lines(path))
    assert [(line, offset) for line, _, offset in found] == [(line, offset) for line, _, offset in whole]
    assert b"".join(line for line, _, _ in whole) == b"x" + data
    assert all((b"x" + data)[offset:].startswith(line) for line, _, offset in whole)
    assert [number for _, number, _ in whole] == list(range(1, len(whole) + 1))


def test_a_line_too_long_is_reported_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"first\n" + b"x" * 5_000_000 + b"\nlast\n")
    found = list(lines.read_blocks(path, max_line_bytes=2_000_000))
    assert [(b.data, b.line, b.overlong) for b in found if b.overlong] == [(b"", 2, 5_000_001)]
    assert b"".join(b.data for b in found) == b"first\nlast\n" and found[-1].line == 3


def test_msgspec_and_json_agree_on_what_a_text_is() -> None:
    for line in (
        b'{"text": "a"}',
        b'\xef\xbb\xbf{"text": "a"}',
        b'{"x": NaN, "text": "a"}',
        b'{"x": "\\ud800", "text": "a"}',
    ):
        assert lines.read_text(line, "text") == "a"
    assert lines.read_text(b'{"text": "a\\ud800"}', "text") == "a\ufffd"
    with pytest.raises(lines.BadLineError, match="empty text"):
        lines.read_text(b'{"text": ""}', "text")


@pytest.mark.parametrize(
    "data",
    [
        b'{"text":"a"} {"text":"b"}\n\n',
        b'{"text":\n"a"}\n{"text":"b"} {"text":"c"}\n',
        b'{"text":"a","x":\n{}} {"text":"b"}',
    ],
)
def test_whole_blocks_are_taken_only_when_each_line_is_one_object(data: bytes) -> None:
    assert lines.read_texts(lines.Block(data, 1, 0, len(lines.split(data))), "text") is None
    assert lines.read_texts(lines.Block(b'{"text":"a"}\n{"text":"b"}', 1, 0, 2), "text") == ["a", "b"]


def test_array_files_come_back_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_arrays(path, {"n": 1}, x=np.arange(5, dtype=np.uint32), none=np.empty(0, np.int64), y=np.array([True, False]))
    reader = Reader(path)
    assert reader.meta == {"n": 1} and reader["x"].tolist() == [0, 1, 2, 3, 4] and reader["y"].tolist() == [True, False]
    assert not len(reader["none"]) and "z" not in reader
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="is damaged or gone"):
        Reader(path)


def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_no_two_of_a_hundred_thousand_shingles_are_alike() -> None:
    text = " ".join(str(number) for number in range(100_000))
    values, counts = shingles.shingle([text.encode()], 3)
    assert len(np.unique(values)) == counts[0] == 99_998
