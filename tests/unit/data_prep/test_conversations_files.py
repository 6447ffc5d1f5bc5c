"""Files of instruction data: every packing and container reads alike, damage is placed, nothing is lost in silence."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_prep.conversations import Conversation, Tally, files, read_conversations, write_conversations
from data_prep.conversations.files import array_elements
from data_prep.errors import UserError
from data_prep.streams import Overlong

FIXTURES = Path(__file__).parents[2] / "fixtures"
ALPACA = json.loads((FIXTURES / "alpaca.json").read_text())
CHATS = [
    {"id": str(i), "messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
    for i, r in enumerate(ALPACA)
]  # fmt: skip


def read(path: Path, **options: Any) -> list[Conversation]:
    return list(read_conversations([path], **options))


def jsonl(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def in_parquet(records: list[Any]) -> bytes:
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(records), sink, row_group_size=7)
    return bytes(sink.getvalue())


CONTAINERS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "jsonl": ("x.jsonl", jsonl),
    "jsonl_with_bom_and_crlf": ("x.jsonl", lambda r: b"\xef\xbb\xbf" + jsonl(r).replace(b"\n", b"\r\n")),
    "gzip": ("x.jsonl.gz", lambda r: gzip.compress(jsonl(r))),
    "zstd_misnamed": ("x.jsonl", lambda r: zstandard.compress(jsonl(r))),
    "array_in_one_line": ("x.json", lambda r: json.dumps(r).encode()),
    "array_over_lines": ("x.json", lambda r: json.dumps(r, indent=2, ensure_ascii=False).encode()),
    "array_with_bom_gzip": ("x.json.gz", lambda r: gzip.compress(b"\xef\xbb\xbf" + json.dumps(r).encode())),
    "arrays_end_to_end": ("x.json", lambda r: b"\n".join(json.dumps(part).encode() for part in (r[:5], [], r[5:]))),
    "parquet": ("x.parquet", in_parquet),
}


@pytest.mark.parametrize(("name", "pack"), CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("records", [ALPACA, CHATS], ids=["alpaca", "messages"])
def test_containers_read_alike(
    tmp_path: Path, name: str, pack: Callable[[list[Any]], bytes], records: list[Any]
) -> None:
    (tmp_path / "plain.jsonl").write_bytes(jsonl(records))
    (tmp_path / name).write_bytes(pack(records))
    wanted, tally = read(tmp_path / "plain.jsonl"), Tally()
    got = read(tmp_path / name, tally=tally)
    assert [(c.messages, c.id, c.extra) for c in got] == [(c.messages, c.id, c.extra) for c in wanted]
    assert len(got) == 32 == tally.conversations and not tally.bad and not tally.repairs
    places = [(c.source.line, c.source.record) for c in got]
    if name.startswith("x.jsonl"):
        assert places == [(i, None) for i in range(1, 33)]
    else:
        assert [record for _, record in places] == list(range(1, 33))
    if name == "x.parquet":
        assert places[0][0] is None and str(got[1].source) == f"{tmp_path}/x.parquet (record 2)"


class Trickle:
    """A stream of small blocks, to put every block's end at every place."""

    def __init__(self, data: bytes, size: int) -> None:
        self.path, self._blocks = Path("x"), iter([data[i : i + size] for i in range(0, len(data), size)])

    def read(self) -> bytes:
        return next(self._blocks, b"")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_an_array_is_cut_at_the_right_places_whatever_the_blocks(size: int) -> None:
    values = [{"a": '"}],[{\\', "b": [[], {"c": "\\\\"}]}, "text, [", 7, None, [1, [2]], {"é": "\\u00e9\n"}]
    data = "\n [ \n" + ",\n\n".join(json.dumps(v, indent=1, ensure_ascii=False) for v in values) + "\n]\n[]\n"
    got = list(array_elements(Trickle(data.encode(), size)))  # type: ignore[arg-type]
    assert [json.loads(element) for _, element in got if isinstance(element, bytes)] == values
    lines = data.split("\n")
    assert [lines[line - 1][:1] for line, _ in got] == ["{", '"', "7", "n", "[", "{"]


@pytest.mark.parametrize("size", [1, 5, 50])
def test_an_overlong_element_is_passed_over_and_the_next_is_found(size: int) -> None:
    long = {"text": 'x\\"' * 100, "list": ["y"] * 50}
    data = json.dumps([{"a": 1}, long, {"b": 2}], indent=1)
    (_, one), (line, over), (_, two) = array_elements(Trickle(data.encode(), size), limit=100)  # type: ignore[arg-type]
    assert one == b'{\n  "a": 1\n }' and two == b'{\n  "b": 2\n }'
    assert isinstance(over, Overlong) and 4 <= line <= 60
    assert abs(over.size - len(json.dumps(long, indent=1))) < 80


def test_broken_elements_cost_no_others(tmp_path: Path) -> None:
    good = json.dumps(ALPACA[0])
    path, tally = tmp_path / "x.json", Tally()
    path.write_bytes(
        f'[{good},\n{{"a" 1}},\n,\n{{"instruction": "\\ud800", "output": NaN}}, '.encode()
        + b'{"a": "\xff"}\n,'
        + good.encode()
        + b",]"
    )
    assert len(read(path, tally=tally, max_bad=1)) == 2
    assert tally.records == 6 and tally.bad == {"broken JSON": 2, "no 'output' or 'response'": 1, "broken UTF-8": 1}
    assert [example.partition(": ")[0] for example in tally.examples] == [
        f"{path}:2 (record 2)", f"{path}:3 (record 3)", f"{path}:4 (record 4)", f"{path}:4 (record 5)",
    ]  # fmt: skip


LINES: dict[str, tuple[bytes, str]] = {
    "utf8": (b'{"prompt": "\xc3(", "completion": "b"}', r"broken UTF-8 (byte 0xc3 at column 13)"),
    "json": (
        b'{"prompt": "a", completion}',
        r"broken JSON (Expecting property name enclosed in double quotes at column 17)",
    ),
    "cut": (b'{"prompt": "a', "broken JSON (Unterminated string starting at at column 12)"),
    "deep": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "broken JSON (nested more than 100 deep)"),
    "digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "broken JSON (Exceeds the limit"),
    "rubbish": (b"\x00\x01\x02", "broken JSON ("),
    "long": (b'{"prompt": "' + b"x" * 2_000_000 + b'"}', "record too long ("),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_bad_lines_are_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str) -> None:
    monkeypatch.setattr(files, "RECORD_BYTES", 1_500_000)
    good = b'{"prompt": "a", "completion": "b"}'
    path, tally = tmp_path / "x.jsonl", Tally()
    path.write_bytes(good + b"\n\n  \n" + line + b"\n\xef\xbb\xbf" + good)
    got = read(path, tally=tally, max_bad=0.5)
    assert [c.source.line for c in got] == [1, 5] and tally.records == 3
    assert tally.examples[0].startswith(f"{path}:4: {message}")


def test_half_characters_and_nan_are_mended_and_counted(tmp_path: Path) -> None:
    path, tally = tmp_path / "x.jsonl", Tally()
    path.write_text('{"prompt": "a\\ud800", "completion": "b", "score": NaN, "big": 1e999}\n')
    (got,) = read(path, tally=tally)
    assert got.messages[0].content == "a\ufffd" and got.extra == {}
    assert tally.repairs == {"half a character became U+FFFD": 1, "NaN or infinity became null": 1}


def test_tsv_rows_of_another_width_are_placed(tmp_path: Path) -> None:
    path, tally = tmp_path / "qnli.tsv", Tally()
    path.write_bytes(
        b"\xef\xbb\xbfindex\tquestion\tsentence\tlabel\r\n0\tQ\tS\tentailment\r\n1\tQ\tS\r\n\r\n2\tQ\tS\tmaybe\n3\tQ\t\xff\tx\n"
    )
    assert len(read(path, tally=tally, max_bad=1)) == 1
    assert tally.examples == [
        f"{path}:3: wrong number of columns (3 where the header has 4)",
        f"{path}:5: unknown label ('maybe'; qnli has entailment, not_entailment, 0, 1)",
        f"{path}:6: broken UTF-8 (byte 0xff at column 5)",
    ]


WHOLE: dict[str, tuple[str, bytes, str]] = {
    "gzip_cut": ("x.jsonl.gz", gzip.compress(jsonl(CHATS))[:-30], r"cannot be read after line \d+: .*; fetch it again"),
    "zstd_cut": ("x.json", zstandard.compress(json.dumps(CHATS).encode())[:-30], r"x\.json: cannot be read: .*; fetch it again"),
    "array_cut": ("x.json", json.dumps(CHATS, indent=1).encode()[:-9], r"x\.json:\d+: the JSON array ends in the middle"),
    "array_and_more": ("x.json", json.dumps(CHATS).encode() + b" {}", r"text behind the JSON array, line 1"),
    "utf16": ("x.json", json.dumps(CHATS).encode("utf-16"), r"UTF-16 text; turn it into UTF-8: iconv"),
    "parquet_cut": ("x.parquet", in_parquet(CHATS)[:-9], r"x\.parquet: cannot be read after record 0: .*; fetch it again"),
    "no_parquet": ("x.parquet", b"PK", r"no Parquet file"),
    "one_object": ("x.json", json.dumps(CHATS[0], indent=1).encode(), r"x\.json:1: JSON over several lines; .*jq -c"),
    "empty": ("x.jsonl", b"", r"no conversation among 0 records; check the input"),
    "empty_array": ("x.json", b"[]", r"no conversation among 0 records; check the input"),
    "text": ("x.txt", b"hello\nworld\n", r"2 of 2 records .* 2 × broken JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "message"), WHOLE.values(), ids=WHOLE)
def test_files_that_are_damaged_or_something_else_are_told_in_one_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as told:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(told.value) or "0 records" in str(told.value)
    assert "\n" not in str(told.value)


def test_folders_and_globs_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name, kind in (("b/x.jsonl", CHATS[:2]), ("a.json", ALPACA[:3]), ("b/notes.md", [])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json.dumps(kind).encode() if name.endswith("json") else jsonl(kind))
    tally = Tally()
    got = list(read_conversations([tmp_path, str(tmp_path / "b/*.jsonl")], tally=tally))
    assert [Path(c.source.file).name for c in got] == ["a.json"] * 3 + ["x.jsonl"] * 2
    assert sorted(tally.formats.values()) == ["alpaca", "messages"]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few changes: flipped, cut, doubled, swapped for what formats are made of."""
    out = bytearray(data)
    parts = [b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"null", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"NaN", b"-1e999",
             b'"role"', b'"from"', b'"messages":[', b"\t", b"\x00", b"true", b"12345678901234567890123", b"[" * 120]  # fmt: skip
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(5):
            case 0 if out:
                out[at - 1] ^= 1 << chance.randrange(8)
            case 1:
                del out[at : at + chance.randrange(1, 20)]
            case 2:
                out[at:at] = chance.choice(parts)
            case 3:
                out[at : at + chance.randrange(1, 9)] = chance.choice(parts)
            case _:
                out[at:at] = out[at : at + chance.randrange(1, 60)]
    return bytes(out).replace(b"\n", b" ")


def seeds() -> Iterator[bytes]:
    tool = {"function": {"name": "f", "arguments": '{"a": [1]}'}, "id": "c"}
    rich: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "ü"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [tool], "weight": 0},
            {"role": "tool", "content": "3", "tool_call_id": "c"},
            {"role": "assistant", "content": "3", "extra": {"x": 1}},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}], "id": 7, "score": 1.5,
    }  # fmt: skip
    share = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "tools": "[]",
        "system": "s",
    }
    for record in (*ALPACA[:3], *CHATS[:2], rich, share, {"question": "a", "answer": "b", "history": [["c", "d"]]}):
        yield json.dumps(record, ensure_ascii=False).encode()


def test_thousands_of_mutated_records_are_all_accounted_for(tmp_path: Path) -> None:
    chance, whole = random.Random(4), list(seeds())
    lines = [mutated(chance.choice(whole), chance) for _ in range(10_000)]
    refused: list[int] = []
    kinds = ("auto", "messages", "sharegpt", "alpaca", "prompt", "qnli")
    for kind in kinds:
        path, log = tmp_path / "x.jsonl", SimpleNamespace(lines=[])
        path.write_bytes(whole[3] + b"\n" + b"\n".join(lines) + b"\n")
        tally = Tally(log=lambda place, fault, data, log=log: log.lines.append((place.line, str(fault), data)))
        got = read(path, format=kind, tally=tally, max_bad=1) if kind != "qnli" else []
        if kind == "qnli":
            with pytest.raises(UserError, match="no conversation"):
                read(path, format=kind, tally=tally, max_bad=1)
        blank = sum(not line.strip().removeprefix(b"\xef\xbb\xbf").strip() for line in lines)
        seen = sorted([c.source.line or 0 for c in got] + [line for line, _, _ in log.lines])
        assert len(seen) == tally.records == tally.conversations + tally.refused == 10_001 - blank
        assert len(set(seen)) == len(seen), "a line was counted twice"
        assert all("\n" not in reason and reason for _, reason, _ in log.lines)
        assert all(data == ([whole[3], *lines][line - 1]).removeprefix(b"\xef\xbb\xbf") for line, _, data in log.lines)
        refused.append(tally.refused)
        write_conversations(got, tmp_path / "chat.jsonl")
        if got:
            assert read(tmp_path / "chat.jsonl") == got
    assert 0 < refused[0] < 10_000


def test_mutated_arrays_never_hang_or_crash(tmp_path: Path) -> None:
    chance, path, outcomes = random.Random(5), tmp_path / "x.json", set()
    data = json.dumps(CHATS[:8], indent=1).encode()
    for _ in range(600):
        path.write_bytes(b"[" + mutated(data[1:], chance))
        tally = Tally()
        try:
            got = read(path, tally=tally, max_bad=1)
        except UserError as error:
            outcomes.add(str(error).split(":")[-1][:24])
            assert "\n" not in str(error)
            assert str(path) in str(error) or "no conversation" in str(error)
        else:
            assert tally.records == len(got) + tally.refused
    assert len(outcomes) > 1
