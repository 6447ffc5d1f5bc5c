"""Damaged input of every kind: nothing crashes, nothing hangs, and of each line it is known what became of it.

The oracle reads line by line with Python's json and says what data_prep/readers.py states: a line whose text can be told
is a document, whatever its other fields hold; what json takes and JSON forbids (NaN) is mended; all else is bad.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep import demo_text
from data_prep import tokenize as module
from data_prep.filters import Filters
from data_prep.indexed import IndexedDataset
from data_prep.readers import Reading
from data_prep.tokenize import Options
from data_prep.tokenizers import Tokenizer, load_tokenizer

MAX_LINE = 120_000
PARTS = (50_000, 700_000, 1 << 30)
BROKEN = "\U0010fffe"  # stands for bytes that are no UTF-8; the lines hold no such character


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with half a megabyte of English in text.jsonl and a tokenizer of 1,000 pieces."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "_modules", list)
        text = demo_text.write_demo_text(folder, megabytes=1)
    demo_text.train_tokenizer(text, folder / "tokenizer.model", vocab_size=1000)
    return folder


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return load_tokenizer(demo)


def tokenize(inputs: list[Path], tokenizer: Path, output: Path, **options: Any) -> dict[str, Any]:
    names = ("key", "text_documents", "max_line_bytes", "filters")
    reading = {name: options.pop(name) for name in names if name in options}
    return module.tokenize(inputs, tokenizer, output, Options(Reading(**reading), **{"workers": 1, **options}))


def everything(prefix: Path) -> list[bytes]:
    """All that is written: tokens, index, log of bad lines."""
    log = Path(f"{prefix}.rejected.jsonl")
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")] + [
        log.read_bytes() if log.exists() else b""
    ]


def encoded(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eod] for text in texts]  # type: ignore[list-item]


def documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data[i].tolist() for i in range(len(data))]


# What a line is


def verdict(line: bytes, first: bool) -> tuple[str, str]:
    """("text", it), ("mended", it), ("bad", cause) or ("blank", "")."""
    if len(line) > MAX_LINE:
        return "bad", "line too long"
    if not line.strip(b" \t\r\v\f"):
        return "blank", ""
    if (text := _strict_text(line)) is not None:
        return ("text", text) if text else ("bad", "empty text")
    bare = line.removeprefix(b"\xef\xbb\xbf") if first else line
    try:
        record = json.loads(bare.decode())
    except UnicodeDecodeError:
        return "bad", "broken UTF-8"
    except (ValueError, RecursionError):
        return "bad", "broken JSON"
    if not isinstance(record, dict):
        return "bad", "not a JSON object"
    if "text" not in record:
        return "bad", "no key 'text'"
    if not isinstance(record["text"], str):
        return "bad", "text is not a string"
    text = re.sub("[\ud800-\udfff]", "\ufffd", record["text"])
    return ("mended", text) if text else ("bad", "empty text")


def _strict_text(line: bytes) -> str | None:
    """The text of a line that is JSON to the letter, apart from broken UTF-8 elsewhere than in the text."""
    pairs: list[Any] = []
    strings: list[str] = []

    def collect(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the record's own come last
        strings.extend(key for key, _ in found)
        strings.extend(value for _, value in found if isinstance(value, str))
        for _, value in found:
            if isinstance(value, list):
                strings.extend(_strings(value))
        return dict(found)

    def refuse(name: str) -> None:
        raise ValueError(name)

    decoded = re.sub("[\udc80-\udcff]", BROKEN, line.decode("utf-8", "surrogateescape"))
    try:
        record = json.loads(decoded, object_pairs_hook=collect, parse_constant=refuse, parse_int=lambda _: 0)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(re.search("[\ud800-\udfff]", string) for string in strings):
        return None
    texts = [value for key, value in pairs if key == "text"]
    good = texts and all(isinstance(text, str) and BROKEN not in text for text in texts)
    return texts[-1] if good else None


def _strings(value: list[Any]) -> list[str]:
    """The strings of nested lists."""
    found, left = [], list(value)
    while left:
        item = left.pop()
        if isinstance(item, list):
            left.extend(item)
        elif isinstance(item, str):
            found.append(item)
    return found


# Ten thousand lines


def a_line(draw: random.Random, words: list[str]) -> bytes:
    """A good record."""
    text = " ".join(draw.choices(words, k=draw.choice([1, 3, 8, 30])))
    record: dict[str, Any] = {"id": draw.randrange(1000), "text": text, "meta": {"tags": ["a", text[:5]], "score": 0.5}}
    if draw.random() < 0.3:
        record = {"lang": draw.choice(["en", "de", "\ud800", 7, None]), **record}
    if draw.random() < 0.2:
        record = dict(reversed(record.items()))
    return json.dumps(record, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def mutated(draw: random.Random, line: bytes, other: bytes) -> bytes:
    """One thing wrong, or odd, with a line; it may become several, or run into the next."""
    at = draw.randrange(len(line) + 1)
    inside = line.index(b'"text": "') + 9  # where the text begins
    kind = draw.randrange(24)
    match kind:
        case 0 | 1 | 2:  # bytes flipped
            data = bytearray(line)
            for _ in range(draw.choice([1, 1, 2, 5])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(data)
        case 3:
            return line[:at]
        case 4:
            return line[at:]
        case 5:
            return line[:at] + bytes([draw.randrange(32)]) + line[at:]
        case 6:
            return (
                line[:at]
                + draw.choice([b"\0", b"\0\0\0", b"\x7f", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9"])
                + line[at:]
            )
        case 7:
            half = draw.choice([b"\\ud83d", b"\\udd99", b"\\udd99\\ud83d", b"\\ud83d\\ud83d\\udd99", b"\xed\xa0\xbd"])
            return line[: (place := draw.choice([inside, at]))] + half + line[place:]
        case 8:
            return line[:-1] + draw.choice(
                [b', "n": NaN}', b', "n": [1, -Infinity]}', b', "n": Infinity, "text": "n"}']
            )
        case 9:
            return line[:at] + b"\xef\xbb\xbf" + line[at:]
        case 10:
            return line + b"\r"
        case 11:
            return (
                line[:-1] + b', "n": ' + draw.choice([b"9" * 5000, b"1e999", b"-0", b"01", b"1.", b"1e", b"-"]) + b"}"
            )
        case 12:
            depth = draw.choice([3, 100, 400])
            if draw.random() < 0.03:
                return line[:-1] + b', "n": ' + b"[" * 100_000
            return line[:-1] + b', "n": ' + b"[" * depth + b'"x"' + b"]" * draw.choice([depth, depth - 1]) + b"}"
        case 13:
            depth = draw.choice([3, 100, 400])
            return b'{"a":' * depth + line + b"}" * depth
        case 14:
            return line[:-1] + draw.choice(
                [b', "text": "twice"}', b', "text": 5}', b', "te\\u0078t": "again"}', b', "text": ""}']
            )
        case 15:
            return (
                b'{"text": '
                + draw.choice([b"5", b"null", b"[1]", b'{"text": "in"}', b"true", b'""', b"{}"])
                + b", "
                + line[1:]
            )
        case 16:
            return (
                draw.choice([b'{"text": ', b'{"txt": "x", "n": '])
                + draw.choice([b"17", b"null", b'["a"]', b'"\\u0000"'])
                + b"}"
            )
        case 17:  # glued, and split so that lines still begin and end with braces
            return draw.choice([line + other, line + b" " + other, line + b"," + other, line[:-1] + b', "x": "}\n{"}'])
        case 18:
            return line[:at] + b"\n" + line[at:]
        case 19:
            return draw.choice(
                [
                    b"",
                    b" ",
                    b"\t \r",
                    b"\v",
                    b"\f",
                    b"\xc2\xa0",
                    b"\0",
                    b"\xef\xbb\xbf",
                    b"{}",
                    b"[]",
                    b'"text"',
                    b"null",
                ]
            )
        case 20:
            return line.replace(
                b'"text"', draw.choice([b'"Text"', b"'text'", b"text", b'"text\\u0000"', b'"\\u0074ext"'])
            )
        case 21:
            return b'{"text": "' + b"x" * draw.choice([200] * 60 + [MAX_LINE - 20, MAX_LINE + 20, 3 * MAX_LINE]) + b'"}'
        case 22:
            return (
                line[:inside]
                + draw.choice([b"\\u0000", b"\\u2028\\u0085", b"\\/\\b\\f", b"\\x41", b"\\u12", b"</s><s>"])
                + line[inside:]
            )
        case _:
            return line[:inside] + bytes(draw.choices(range(128, 256), k=draw.choice([1, 2, 3]))) + line[inside:]


def words_of(demo: Path) -> list[str]:
    text = " ".join(json.loads(line)["text"] for line in (demo / "text.jsonl").read_text().splitlines()[:40])
    return [*text.split(), "日本", "ünïcode", "🦙", "tab\there", 'a "quote"', "line\nline", "\u2028"]


@pytest.fixture(scope="module")
def fuzzed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, bytes]]:
    """A folder of files with 10,000 mutated lines, and the unpacked bytes of each."""
    draw, words = random.Random(4), words_of(demo)
    folder, contents = tmp_path_factory.mktemp("fuzzed"), {}
    pack: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    for number, ending in enumerate(["", "", ".gz", ".zst", ""]):
        lines = []
        for _ in range(2000):
            line = a_line(draw, words)
            lines.append(mutated(draw, line, a_line(draw, words)))
            lines += [a_line(draw, words)] * draw.choice([0, 0, 0, 1, 8])
        mark, last = draw.choice([b"", b"\xef\xbb\xbf"]), draw.choice([b"", b"\n", b"\n\n"])
        data = mark + draw.choice([b"\n", b"\r\n"]).join(lines) + last
        path = folder / f"{number}.jsonl{ending}"
        path.write_bytes(pack[ending](data))
        contents[path] = data
    return folder, contents


def lines_of(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def test_of_ten_thousand_mutated_lines_each_is_accounted_for(
    demo: Path,
    tokenizer: Tokenizer,
    fuzzed: tuple[Path, dict[Path, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, contents = fuzzed
    counts: Counter[str] = Counter()
    texts: list[str] = []
    wanted: list[tuple[str, int, bool, str]] = []
    for path, data in contents.items():
        for number, line in enumerate(lines_of(data), 1):
            kind, text = verdict(line, number == 1)
            counts[kind] += 1
            if kind in ("text", "mended"):
                texts.append(text)
            if kind in ("mended", "bad"):
                wanted.append((str(path), number, kind == "mended", text if kind == "bad" else ""))
    assert counts.total() > 20_000 and min(counts.values()) > 100 and len({cause for *_, cause in wanted}) == 8
    written = []
    for part_bytes, block in zip(PARTS, (1000, 60_000, 1 << 20), strict=True):
        monkeypatch.setattr("data_prep.readers.BLOCK_BYTES", block)
        monkeypatch.setattr("data_prep.streams.PLAIN_BLOCK", block)
        options = {"part_bytes": part_bytes, "max_line_bytes": MAX_LINE, "max_bad": 1.0, "keep_parts": True}
        meta = tokenize([folder], demo, tmp_path / f"{part_bytes}", **options)
        assert meta["lines"] == counts.total() and meta["blank_lines"] == counts["blank"]
        assert (meta["documents"], meta["repaired_documents"]) == (len(texts), counts["mended"])
        assert meta["bad_lines"] == counts["bad"] and sum(meta["bad_causes"].values()) == counts["bad"]
        log = [json.loads(line) for line in (tmp_path / f"{part_bytes}.rejected.jsonl").read_bytes().split(b"\n")[:-1]]
        got = [(e["file"], e["line"], e["kept"], "" if e["kept"] else e["cause"]) for e in log]
        assert got == wanted
        written.append(everything(tmp_path / f"{part_bytes}"))
    assert written[0] == written[1] == written[2]
    assert documents(tmp_path / f"{PARTS[0]}") == encoded(texts, tokenizer)


def test_filters_count_what_they_leave_out_of_mutated_lines(
    demo: Path, tokenizer: Tokenizer, fuzzed: tuple[Path, dict[Path, bytes]], tmp_path: Path
) -> None:
    path, data = next(iter(fuzzed[1].items()))
    verdicts = [verdict(line, number == 0) for number, line in enumerate(lines_of(data))]
    options = {"max_line_bytes": MAX_LINE, "max_bad": 1.0}
    meta = tokenize([path], demo, tmp_path / "short", filters=Filters(min_chars=12, max_words=8), **options)
    texts = [
        text for kind, text in verdicts if kind in ("text", "mended") and len(text) >= 12 and len(text.split()) <= 8
    ]
    assert documents(tmp_path / "short") == encoded(texts, tokenizer) and meta["documents"] == len(texts)
    bad = sum(kind == "bad" for kind, _ in verdicts)
    assert (meta["lines"], meta["bad_lines"]) == (len(verdicts), bad)
    assert meta["lines"] == meta["documents"] + meta["blank_lines"] + bad + sum(meta["filtered"].values())
    written = []
    for part_bytes in PARTS:  # the whole record is wanted, which may be odder than its text
        filters = Filters(languages=("en",), language_key="lang")
        meta = tokenize([path], demo, tmp_path / f"{part_bytes}", filters=filters, part_bytes=part_bytes, **options)
        assert meta["lines"] == meta["documents"] + meta["blank_lines"] + bad + sum(meta["filtered"].values())
        assert meta["documents"] > 100 and meta["bad_lines"] == bad
        assert meta["filtered"]["language \ufffd"] > 10 < meta["filtered"]["language de"]
        written.append(everything(tmp_path / f"{part_bytes}"))
    assert written[0] == written[1] == written[2]
