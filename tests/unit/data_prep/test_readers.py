"""Records in: every container reads the same, every bad line is counted and placed, a verdict never depends on luck."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_prep import readers
from data_prep.errors import UserError
from data_prep.inputs import describe, expand_inputs
from data_prep.readers import Fault, Reader, Reading, Tally, read_documents


def jsonl(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def texts(path: Path, **options: Any) -> list[str]:
    return [text for text, _ in read_documents([path], **options)]


def read(path: Path, how: Reading | None = None) -> tuple[list[str], Tally, list[Fault]]:
    """All of a file in one range; faults with line numbers of the file."""
    got, tally, faults = [], Tally(), []
    reader = Reader(how or Reading())
    for batch in reader.read(describe(path), 0, None):
        got += batch.texts
        tally.add(batch.tally)
        faults += batch.faults
    reader.close()
    return got, tally, faults


WANTED = [f"document {i} with ünïcode 日本\nand lines" for i in range(20_000)]  # more than one block


@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd", "parquet", "parquet_large_string", "parquet_groups"])
def test_containers_read_alike(tmp_path: Path, packing: str) -> None:
    path = tmp_path / ("a.parquet" if packing.startswith("parquet") else "a.jsonl")
    if packing.startswith("parquet"):
        kind = arrow.large_string() if packing.endswith("large_string") else arrow.string()
        table = arrow.table({"id": range(len(WANTED)), "text": arrow.array(WANTED, kind)})
        parquet.write_table(table, path, row_group_size=999 if packing.endswith("groups") else 1 << 20)
    else:
        pack = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[packing]
        path.write_bytes(pack(jsonl([{"text": text} for text in WANTED])))
    assert texts(path) == WANTED


def test_a_range_counts_its_own_bytes_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": text} for text in WANTED * 3]))
    reader, size = Reader(Reading()), path.stat().st_size
    for batch in reader.read(describe(path), size // 2, None):
        assert batch.texts
        assert 0 < reader.disk <= size - size // 2
    reader.close()


LINES = [
    (b'{"text": "good"}', "good"),
    (b'  {"id": 1, "text": "with \\u00fcmlaut \\ud83e\\udd99"} \r', "with ümlaut 🦙"),
    (b'{"text": "half \\ud83d a character", "score": NaN}', "half \ufffd a character"),
    (b'{"text": "fine", "score": NaN}', "fine"),
    (b'{"text": "a"}{"text": "b"}', "broken JSON"),
    (b'{"text":', "broken JSON"),
    (b'"a"}', "broken JSON"),
    (b'{"text": "broken \xff"}', "broken UTF-8"),
    (b'{"text": "cut off', "broken JSON"),
    (b'["a list"]', "not a JSON object"),
    (b"17", "not a JSON object"),
    (b'{"body": "x", "id": 1}', "no key 'text'"),
    (b'{"text": 5}', "text is not a string"),
    (b'{"text": null}', "text is not a string"),
    (b'{"text": ""}', "empty text"),
    (b"   ", None),
    (b"", None),
    (b"[" * 100_000, "broken JSON"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "long number"}', "long number"),
    (b'{"text": "' + b"x" * 300_000 + b'"}', "line too long"),
]
CAUSES = {"broken JSON", "broken UTF-8", "not a JSON object", "no key 'text'", "text is not a string", "empty text"}
CAUSES |= {"line too long"}


def test_a_lines_verdict_does_not_depend_on_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast path, slow path, block borders, ranges: every line gets the text or the cause that it gets alone."""
    how, draw, path = Reading(max_line_bytes=200_000), random.Random(0), tmp_path / "a.jsonl"
    verdicts = []
    for line, wanted in LINES:
        path.write_bytes(line + b"\n")
        got, tally, faults = read(path, how)
        bad = [fault.cause for fault in faults if not fault.kept]
        assert (got or bad or [None])[0] == wanted, line[:60]
        assert tally.lines == 1 and len(got) + len(bad) + tally.blank == 1
        verdicts.append(wanted)
    for _ in range(60):
        picked = draw.choices(range(len(LINES)), weights=[12] + [1] * (len(LINES) - 1), k=draw.choice([1, 7, 40]))
        data = b"\n".join(LINES[i][0] for i in picked) + draw.choice([b"", b"\n"])
        path.write_bytes(data)
        monkeypatch.setattr(readers, "BLOCK_BYTES", draw.choice([1, 60, 1000, 1 << 19]))
        got, tally, faults = read(path, how)
        assert got == [verdicts[i] for i in picked if verdicts[i] not in CAUSES | {None}]
        bad = [(fault.line, fault.cause) for fault in faults if not fault.kept]
        assert bad == [(n, verdicts[i]) for n, i in enumerate(picked, 1) if verdicts[i] in CAUSES]
        lines = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
        assert tally.lines == lines == tally.documents + tally.blank + tally.bad_lines


def test_faults_tell_place_cause_and_the_lines_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b \xff"}\n{"txt": 1}\n')
    got, tally, faults = read(path)
    assert got == ["a"] and tally.repaired == 1 and tally.documents == 1
    mark, broken, missing = faults
    assert (mark.cause, mark.kept) == ("byte order mark", True)
    assert (broken.line, broken.offset, broken.detail) == (2, 17, "byte 0xff at column 13")
    assert broken.excerpt == '{"text": "b \\xff"}' and not broken.kept
    assert (missing.line, missing.cause, missing.detail) == (3, "no key 'text'", "has 'txt'")


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
    parquet.write_table(arrow.table({"text": [1], "content": ["from a column"]}), tmp_path / "c.parquet")
    assert [text for text, _ in read_documents([tmp_path])] == ["from content", "from text", "from a column"]
    assert texts(tmp_path / "b.jsonl", key="content") == ["no"]


@pytest.mark.parametrize("key", [None, "missing"])
def test_a_key_that_is_nowhere_is_refused_at_once_naming_those_that_are(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"prompt": "a", "answer": "b"}]))
    with pytest.raises(UserError, match=r"'prompt', 'answer'.*--key"):
        texts(path, key=key)
    parquet.write_table(arrow.table({"prompt": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no text column .* columns there: 'prompt'; name one with --key"):
        texts(tmp_path / "a.parquet", key=key)


def test_a_json_array_is_refused_with_the_way_to_rewrite_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    with pytest.raises(UserError, match=r"a\.json: looks like one JSON array.*jq -c"):
        texts(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "x"}] * 99))
    assert len(list(read_documents([tmp_path], max_bad=0.2))) == 99  # beside good files it is only bad lines


def test_inputs_are_sorted_unique_and_found_in_folders_and_globs(tmp_path: Path) -> None:
    names = ["a.jsonl.zst", "b.jsonl", "deep/c.json.gz", "e.json", "f.parquet", "notes.txt"]
    others = [".hidden/d.jsonl", "x.csv", "out.parts/part-0000.json", "out.meta.json", "out.rejected.jsonl"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "removed.jsonl").write_text("{}")
    (tmp_path / ".herd-accounts").write_text("report.json removed.jsonl\n")  # as herd prep dedup marks its accounts
    assert expand_inputs([tmp_path]) == [tmp_path / name for name in names]
    assert expand_inputs([tmp_path / "e.json", tmp_path / "b.jsonl", tmp_path]) == [tmp_path / name for name in names]
    assert expand_inputs([f"{tmp_path}/*.json*"]) == [tmp_path / name for name in ("a.jsonl.zst", "b.jsonl", "e.json")]
    assert expand_inputs([tmp_path / "out.rejected.jsonl"]) == [tmp_path / "out.rejected.jsonl"]  # named by hand
    for nothing in (tmp_path / "gone.jsonl", f"{tmp_path}/*.tsv", tmp_path / ".hidden" / "none"):
        with pytest.raises(UserError, match="no such file, folder or glob match"):
            expand_inputs([nothing])
    with pytest.raises(UserError, match="no input"):
        expand_inputs([])


def test_damaged_files_say_where_they_break_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl([{"text": str(i * 7919)} for i in range(5000)]))[:-5000])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: the gzip data ends in the middle after line [\d,]+; fetch"):
        texts(path, max_bad=1)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"b\.parquet: not a readable Parquet file"):
        texts(tmp_path / "b.parquet")


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "x"}]))
    assert [text for text, _ in read_documents([tmp_path])] == ["x"]


def test_text_files_are_a_document_each_or_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("dréi".encode()))
    (tmp_path / "c.txt").write_bytes(b" \n")
    (tmp_path / "d.txt").write_bytes(b"bad \xff")
    documents = {path.name: read(path) for path in sorted(tmp_path.iterdir())}
    assert documents["a.txt"][0] == ["one\r\n\r\ntwo\n"] and documents["b.txt.gz"][0] == ["dréi"]
    assert [documents[name][2][0].cause for name in ("c.txt", "d.txt")] == ["empty text", "broken UTF-8"]
    got, tally, _ = read(tmp_path / "a.txt", Reading(text_documents="line"))
    assert got == ["one", "two"] and (tally.lines, tally.blank) == (3, 1)


def test_a_large_text_file_comes_in_pieces_cut_where_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.textfile.BLOCK_BYTES", 100)
    text, path = "süße Wörter\n" * 500, tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    reader = Reader(Reading(max_line_bytes=1000), lambda text: text.rfind("\n") + 1)
    batches = list(reader.read(describe(path), 0, None))
    assert "".join(piece for batch in batches for piece in batch.texts) == text and len(batches) > 20
    assert [batch.goes_on for batch in batches] == [False] + [True] * (len(batches) - 1)
    assert [batch.more for batch in batches] == [True] * (len(batches) - 1) + [False]
    assert sum(batch.tally.documents for batch in batches) == 1
    for data, last_cut, cause in (
        (text.encode(), None, "text file too large"),
        (b"x" * 5000, lambda text: 0, "text file too large"),
        (text.encode() + b"\xff", lambda text: text.rfind("\n") + 1, "broken UTF-8"),
    ):
        path.write_bytes(data)
        batches = list(Reader(Reading(max_line_bytes=1000), last_cut).read(describe(path), 0, None))
        assert batches[-1].faults[0].cause == cause and batches[-1].dropped == (len(batches) > 1)
        assert sum(batch.tally.documents for batch in batches) == 0
        assert sum(batch.tally.lines for batch in batches) == 1 == sum(batch.tally.bad_lines for batch in batches)
