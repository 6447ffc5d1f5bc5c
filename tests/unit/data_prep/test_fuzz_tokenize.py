"""Damaged input of every kind: nothing crashes, nothing hangs, and of each line it is known what became of it.

The oracle reads line by line with Python's json and says what data_prep/readers.py states: a line whose text can be told
is a document, whatever its other fields hold; what json takes and JSON forbids (NaN) is mended; all else is bad.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from data_prep import demo_text, engines
from data_prep import tokenize as module
from data_prep.errors import UserError
from data_prep.filters import Filters
from data_prep.indexed import IndexedDataset
from data_prep.inputs import describe
from data_prep.parquet import group_sizes
from data_prep.readers import Reader, Reading
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
        monkeypatch.setattr("data_prep.parts.INDEX_BLOCK", block // 100)
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


# Packed files


def unpacked(raw: bytes, ending: str) -> tuple[bytes, bool]:
    """What zlib or zstandard give of a file, a few bytes at a time, and whether it was whole."""
    out, rest, decoder = b"", raw, None
    while rest:
        if decoder is None:
            decoder = zlib.decompressobj(31) if ending == ".gz" else zstandard.ZstdDecompressor().decompressobj()
        try:
            out += decoder.decompress(rest[:64])
        except (zlib.error, zstandard.ZstdError):
            return out, False
        rest = rest[64:]
        if decoder.eof:
            rest, decoder = decoder.unused_data + rest, None
    return out, decoder is None and bool(raw)


@pytest.fixture(scope="module")
def damaged(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 packed files, cut off or with flipped bits."""
    draw, folder, words = random.Random(5), tmp_path_factory.mktemp("damaged"), words_of(demo)
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    for number in range(300):
        lines = [json.dumps({"text": f"{i} {' '.join(draw.choices(words, k=5))}"}).encode() for i in range(60)]
        ending = draw.choice(sorted(packers))
        pack = packers[ending]
        size = draw.choice([7, 60])  # lines in a member or frame
        raw = bytearray(b"".join(pack(b"\n".join(lines[i : i + size]) + b"\n") for i in range(0, 60, size)))
        kind = draw.choice(["cut", "cut", "flip", "head", "none", "rubbish"])
        if kind == "cut":
            del raw[draw.choice([draw.randrange(8), draw.randrange(len(raw))]) :]
            while unpacked(bytes(raw), ending)[1]:  # between two frames: nothing tells that there were more
                del raw[-1:]
        elif kind in ("flip", "head"):
            raw[draw.randrange(10 if kind == "head" else len(raw))] ^= 1 << draw.randrange(8)
        elif kind == "rubbish":
            raw += draw.choice([b"x", b"\0", b"\0" * 9, bytes(raw[:9])])
        (folder / f"{number:03}-{kind}.jsonl{ending}").write_bytes(raw)
    return folder


def test_of_damaged_packed_files_the_lines_before_the_damage_are_read(
    demo: Path, tokenizer: Tokenizer, damaged: Path, tmp_path: Path
) -> None:
    texts, faulty = [], []
    for path in sorted(damaged.iterdir()):
        reader, got = Reader(Reading()), []
        for batch in reader.read(describe(path), 0, None):
            got += batch.texts
        could, whole = unpacked(path.read_bytes(), path.suffix)
        theirs = [verdict(line, False) for line in could.split(b"\n")[:-1]]
        good = [text for kind, text in theirs if kind == "text"]
        kind = path.name[4:].split(".")[0]
        if kind == "cut":
            assert len(good) - 1 <= len(got) <= len(good)  # isal keeps the last byte back until more comes
        assert got == good[: len(got)], path
        if not reader.damage:
            assert len(got) == 60 and (whole or path.suffix == ".gz"), path
            assert kind in ("none", "head", "flip", "rubbish"), path
        else:
            assert kind != "none"
            faulty.append(str(path))
        texts += got
    written = []
    for part_bytes, workers in ((1200, 1), (4000, 2), (1 << 30, 1)):
        options = {"part_bytes": part_bytes, "workers": workers, "max_bad": 1.0, "key": "text", "keep_parts": True}
        meta = tokenize([damaged], demo, tmp_path / f"{part_bytes}", allow_damaged=True, **options)
        assert list(meta["damaged"]) == faulty and 200 < len(faulty) < 280
        assert meta["documents"] == len(texts) == meta["lines"] - meta["bad_lines"] - meta["blank_lines"]
        written.append(everything(tmp_path / f"{part_bytes}"))
    assert written[0] == written[1] == written[2]
    assert documents(tmp_path / "1200") == encoded(texts, tokenizer)
    with pytest.raises(UserError, match=rf"{len(faulty)} file.s. cannot be read to the end: {faulty[0]}: .*--allow"):
        tokenize([damaged], demo, tmp_path / "refused", max_bad=1.0)
    assert not list(tmp_path.glob("refused.*n")) and (tmp_path / "refused.parts").exists()


def test_each_damaged_file_alone_is_refused_by_name(demo: Path, damaged: Path, tmp_path: Path) -> None:
    for path in sorted(damaged.glob("*-cut*"))[:40]:
        with pytest.raises(UserError, match=re.escape(str(path))):
            tokenize([path], demo, tmp_path / "out", max_bad=1.0, engine="official")
        assert not (tmp_path / "out.bin").exists()


def test_a_file_that_lost_its_beginning_is_no_text(demo: Path, tmp_path: Path) -> None:
    """A few bad lines among thousands of good ones would hide that a whole file is gone."""
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(3000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(lines)  # unpacked by whoever fetched it
    for name, raw in {"c.jsonl.gz": b"", "d.jsonl.zst": b"(", "e.jsonl.gz": b"\0" + gzip.compress(lines)[1:]}.items():
        (tmp_path / name).write_bytes(raw)
    meta = tokenize([tmp_path], demo, tmp_path / "out", allow_damaged=True)
    assert [Path(path).name for path in meta["damaged"]] == ["c.jsonl.gz", "d.jsonl.zst", "e.jsonl.gz"]
    assert meta["documents"] == 6000 and meta["bad_lines"] == 0
    assert meta["damaged"][str(tmp_path / "c.jsonl.gz")].startswith("the file is empty")


# Parquet and text


def test_flipped_bytes_in_parquet_lose_no_row_in_silence(demo: Path, tmp_path: Path) -> None:
    draw, path = random.Random(6), tmp_path / "a.parquet"
    words, ends = words_of(demo), Counter[str]()
    texts = [f"{i} {' '.join(draw.choices(words, k=20))}" for i in range(600)]
    for codec in ("snappy", "none", "zstd", "gzip"):
        table = arrow.table({"text": texts, "n": range(len(texts))})
        parquet.write_table(table, path, row_group_size=90, compression=codec, write_page_checksum=True)
        raw = path.read_bytes()
        for _ in range(100):
            data = bytearray(raw)
            for _ in range(draw.choice([1, 1, 3, 30])):
                data[draw.randrange(draw.choice([0, len(data) - 2500]), len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
            file, reader, got, lines = describe(path), Reader(Reading("text")), [], 0
            try:
                group_sizes(file)
                for batch in reader.read(file, 0, None):
                    got += batch.texts
                    lines += batch.tally.lines
                    assert batch.tally.lines == len(batch.texts) + batch.tally.bad_lines
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                ends["refused"] += 1
                continue
            ends["damaged" if reader.damage else "read"] += 1
            assert got == texts[: len(got)] and (reader.damage or lines == len(texts))
    assert min(ends.values()) > 50 and len(ends) == 3
    path.write_bytes(raw[: len(raw) // 2] + b"xxxx" + raw[len(raw) // 2 + 4 :])
    with pytest.raises(UserError, match=rf"{path}: the Parquet data is damaged .*--allow-damaged"):
        tokenize([path], demo, tmp_path / "out")
    assert 90 <= tokenize([path], demo, tmp_path / "out", allow_damaged=True)["documents"] < 600


def test_a_parquet_file_without_the_others_column_is_bad_rows(demo: Path, tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"text": [str(i) for i in range(300)]}), tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"body": ["x", "y"]}), tmp_path / "b.parquet")
    meta = tokenize([tmp_path], demo, tmp_path / "out")
    assert meta["bad_causes"] == {"no key 'text'": 2} and meta["documents"] == 300


def test_mutated_text_files_line_by_line(demo: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    draw, words, lines = random.Random(7), words_of(demo), []
    for _ in range(2000):
        lines.append(mutated(draw, a_line(draw, words), a_line(draw, words)))
    path, data = tmp_path / "a.txt", b"\xef\xbb\xbf" + b"\n".join(lines)
    path.write_bytes(data)
    texts, bad, blank = [], [], 0
    for number, line in enumerate(lines_of(data), 1):
        bare = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).removesuffix(b"\r")
        try:
            if len(line) > MAX_LINE:
                bad.append((number, "line too long"))
            elif bare.strip(b" \t\r\v\f"):
                texts.append(bare.decode())
            else:
                blank += 1
        except UnicodeDecodeError:
            bad.append((number, "broken UTF-8"))
    for part_bytes in (20_000, 1 << 30):
        options = {"text_documents": "line", "max_line_bytes": MAX_LINE, "max_bad": 1.0, "part_bytes": part_bytes}
        meta = tokenize([path], demo, tmp_path / f"{part_bytes}", **options)
        log = [json.loads(line) for line in (tmp_path / f"{part_bytes}.rejected.jsonl").read_bytes().split(b"\n")[:-1]]
        assert [(entry["line"], entry["cause"]) for entry in log] == bad and meta["blank_lines"] == blank
        assert documents(tmp_path / f"{part_bytes}") == encoded(texts, tokenizer)


def test_texts_that_the_tokenizer_fails_on_are_logged_with_their_lines(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = engines.load_engine

    def poisoned(*arguments: Any, **options: Any) -> Any:
        engine: Any = load(*arguments, **options)
        encode = engine.encode_flat

        def fails(texts: list[str]) -> Any:
            if any("poison" in text for text in texts):
                raise ValueError("no")
            return encode(texts)

        engine.encode_flat = fails
        return engine

    monkeypatch.setattr("data_prep.work.engines.load_engine", poisoned)
    draw = random.Random(8)
    lines = [draw.choice(['{"text": "fine"}', '{"text": "fine"}', '{"text": "poison"}', "bad", ""]) for _ in range(900)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    wanted = [
        (number, "poison" in line) for number, line in enumerate(lines, 1) if line not in ('{"text": "fine"}', "")
    ]
    for part_bytes in (1000, 1 << 30):
        options = {"max_bad": 1.0, "engine": "official", "part_bytes": part_bytes}
        meta = tokenize([tmp_path / "a.jsonl"], demo, tmp_path / f"{part_bytes}", **options)
        log = [json.loads(line) for line in (tmp_path / f"{part_bytes}.rejected.jsonl").read_bytes().splitlines()]
        assert sorted((entry["line"], entry["cause"] == "the tokenizer failed") for entry in log) == wanted
        assert meta["lines"] == 900 == meta["documents"] + meta["bad_lines"] + meta["blank_lines"]
    (tmp_path / "b.txt").write_text("before")
    (tmp_path / "c.txt").write_text("many words\n" * 900 + "poison " + "many words\n" * 900)
    monkeypatch.setattr("data_prep.textfile.BLOCK_BYTES", 1000)
    with pytest.raises(UserError, match="the tokenizer failed within a large text"):
        tokenize(
            [tmp_path / "b.txt", tmp_path / "c.txt"], demo, tmp_path / "out", max_line_bytes=5000, engine="official"
        )
