"""JSON Lines in: every packing reads the same, every bad line is counted and placed, damage is one clear line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep import readers
from data_prep.errors import UserError
from data_prep.readers import Tally, expand_inputs, read_chunks, read_documents


def jsonl(records: list[object]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def texts(path: Path, **options: object) -> list[str]:
    return [text for text, _ in read_documents([path], **options)]  # type: ignore[arg-type]


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip_of_two_members": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "zstd": lambda data: zstandard.compress(data),
    "zstd_of_two_frames": lambda data: zstandard.compress(data[:1000]) + zstandard.compress(data[1000:]),
    "zstd_with_a_skippable_frame": lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(data),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packings_are_told_from_the_content_and_read_alike(tmp_path: Path, packing: str) -> None:
    wanted = [f"document {i} with ünïcode 日本\nand lines" for i in range(20_000)]  # more than one chunk
    path = tmp_path / "misnamed.jsonl"
    path.write_bytes(PACKINGS[packing](jsonl([{"text": text} for text in wanted])))
    got = list(read_documents([path]))
    assert [text for text, _ in got] == wanted
    assert [where for _, where in got] == [f"{path}:{i + 1}" for i in range(20_000)]


@pytest.mark.parametrize("packing", [name for name in PACKINGS if name != "plain"])
def test_cut_off_compressed_files_are_an_error_with_the_place(tmp_path: Path, packing: str) -> None:
    data = PACKINGS[packing](jsonl([{"text": f"{i} {i * 7919 % 10007}"} for i in range(5000)]))
    path = tmp_path / "cut.jsonl"
    path.write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl: cannot be read after line .* fetch it again"):
        texts(path)


def test_zstd_followed_by_rubbish_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.zst"
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n') + b"rubbish")
    with pytest.raises(UserError, match="cannot be read"):
        texts(path)


def test_lines_do_not_depend_on_the_chunk_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\nabc\n" + b"x" * 5000 + b"\n\nlast without newline")
    whole = path.read_bytes()
    for size in (1, 3, 100, 4999, 10**6):
        chunks = list(read_chunks(path, chunk_bytes=size))
        assert b"".join(chunk.data for chunk in chunks) == whole
        numbered = [(c.first_line + i, line) for c in chunks for i, line in enumerate(c.data.splitlines())]
        assert numbered == list(enumerate(whole.splitlines(), 1))


def test_a_line_without_end_is_counted_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * (3 << 20) + b'"}'
    path.write_bytes(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n' + long)
    chunks = list(read_chunks(path, chunk_bytes=1 << 16, max_line_bytes=1 << 20))
    assert [c.overlong for c in chunks if c.overlong] == [(2, len(long)), (4, len(long))]
    assert [c.first_line for c in chunks] == [1, 2, 3, 4]
    documents, tally = readers.parse_lines(chunks[1])
    assert not documents and tally.bad == {"line too long": 1} and tally.examples[0].startswith(f"{path}:2: ")


def test_every_bad_line_is_counted_with_cause_and_place(tmp_path: Path) -> None:
    good = b'{"text": "good"}'
    lines = [
        b"\xef\xbb\xbf" + good,  # a byte-order mark is no fault
        b'{"text": "broken \xff"}',
        b'{"text": "cut off',
        b'["a list"]',
        b'{"body": "x", "id": 1}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": ""}',
        b"   ",
        b"",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b', "text": "x"}',
        b'{"text": "half \\ud83d a character", "score": NaN}',
        b'{"text": "whole \\ud83e\\udd99"}\r',
        *[good] * 20,
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    tally = Tally()
    got = list(read_documents([path], max_bad=0.5, tally=tally))
    assert got[0] == ("good", f"{path}:1")
    assert got[1] == ("half \ufffd a character", f"{path}:13") and got[2] == ("whole 🦙", f"{path}:14")
    assert len(got) == tally.documents == 23
    assert tally.bad == {
        "broken UTF-8": 1,
        "broken JSON": 3,
        "not a JSON object": 1,
        "no key 'text'": 1,
        "text is not a string": 2,
        "empty text": 1,
    }
    assert (tally.lines, tally.blank, tally.repaired) == (len(lines), 2, 1)
    assert tally.documents + tally.blank + tally.bad_lines == tally.lines
    assert tally.examples[0] == f"{path}:2: broken UTF-8 (byte 0xff at column 18)"
    assert tally.examples[3] == f"{path}:5: no key 'text' (has 'body', 'id')"
    assert len(tally.examples) == readers.SHOWN


def test_above_the_threshold_the_error_names_causes_places_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "x"}] * 98 + [{"text": ""}] * 2))
    assert len(texts(path, max_bad=0.02)) == 98
    with pytest.raises(UserError) as error:
        texts(path, max_bad=0.01)
    message = str(error.value)
    assert "2 of 100 lines are bad (2.00%" in message and "2 × empty text" in message
    assert f"{path}:99: empty text" in message and "--max-bad" in message and "\n" not in message


def test_the_key_is_found_in_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": 1, "content": "from content", "text": 7}]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"content": "no", "text": "from text"}]))
    assert [text for text, _ in read_documents([tmp_path])] == ["from content", "from text"]
    assert [text for text, _ in read_documents([tmp_path / "b.jsonl"], key="content")] == ["no"]


@pytest.mark.parametrize("key", [None, "missing"])
def test_a_key_that_is_nowhere_is_refused_at_once_naming_those_that_are(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"prompt": "a", "answer": "b"}]))
    with pytest.raises(UserError, match=r"'prompt', 'answer'.*--key"):
        texts(path, key=key)


def test_a_json_array_is_refused_with_the_way_to_rewrite_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    with pytest.raises(UserError, match=r"a\.json: looks like one JSON array.*jq -c"):
        texts(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "x"}] * 99))
    assert len(list(read_documents([tmp_path], max_bad=0.2))) == 99  # beside good files it is only bad lines


def test_inputs_are_sorted_unique_and_found_in_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.zst", "deep/c.json.gz", "notes.txt", ".hidden/d.jsonl", "e.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = ["a.jsonl.zst", "b.jsonl", "deep/c.json.gz", "e.json"]
    assert expand_inputs([tmp_path]) == [tmp_path / name for name in names]
    assert expand_inputs([tmp_path / "e.json", tmp_path / "b.jsonl", tmp_path]) == [tmp_path / name for name in names]
    assert expand_inputs([f"{tmp_path}/*.json*"]) == [tmp_path / name for name in ("a.jsonl.zst", "b.jsonl", "e.json")]
    for nothing in (tmp_path / "gone.jsonl", f"{tmp_path}/*.csv", tmp_path / ".hidden" / "none"):
        with pytest.raises(UserError, match="no such file, folder or glob match"):
            expand_inputs([nothing])
    with pytest.raises(UserError, match="no input"):
        expand_inputs([])


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "x"}]))
    assert [text for text, _ in read_documents([tmp_path])] == ["x"]
