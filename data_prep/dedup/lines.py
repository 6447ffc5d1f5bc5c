"""Raw lines of JSONL files, plain, gzip or zstd (told by content), and the text of a line.

Lines are bytes as they stand in the decompressed file, with their line end, so that what is kept can be written byte
for byte. Memory is bounded by a block and the longest line that is taken.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from data_prep.errors import UserError

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 28  # a longer line is no document but a file without newlines: counted bad, never loaded
KEYS = ("text", "content")  # RedPajama's and OSCAR's, looked for in this order
PEEKED_LINES = 100
GZIP, ZSTD = "gzip", "zstd"
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Block:
    """Whole lines. `line`: number of the first, from 1 at the start of what is read; `offset`: its place in bytes."""

    data: bytes
    line: int
    offset: int
    count: int = 1
    overlong: int = 0  # bytes of a single line that was too long; data is empty then


class BadLineError(Exception):
    """Why a line is no document: a cause to count by, and a detail of this one."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(cause)
        self.cause, self.detail = cause, detail


def packing_of(path: Path) -> str:
    """gzip, zstd or "" by the first bytes. Raises UserError for a file that cannot be opened."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the file") from error
    if magic == b"PAR1":
        raise UserError(f"{path}: is Parquet; dedup reads JSON Lines, plain, .gz or .zst", 2)
    if magic[:2] == b"\x1f\x8b":
        return GZIP
    skippable = magic[1:] == b"\x2a\x4d\x18" and 0x50 <= magic[0] <= 0x5F
    return ZSTD if skippable or magic == b"\x28\xb5\x2f\xfd" else ""


def _unzstd(file: BufferedReader) -> Iterator[bytes]:
    """Decompressed bytes of all frames. zstandard's own stream reader takes a truncated frame for the end."""
    import zstandard

    frame = None
    while packed := file.read(1 << 16):
        while packed:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            data = frame.decompress(packed)
            packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if data:
                yield data
    if frame is not None:
        raise EOFError("the compressed data ends in the middle of a frame")


def _plain(file: BufferedReader, start: int) -> Iterator[bytes]:
    file.seek(start)
    while data := file.read(BLOCK_BYTES):
        yield data


def _ungzip(file: BufferedReader) -> Iterator[bytes]:
    from isal import igzip

    with igzip.IGzipFile(fileobj=file) as unpacked:
        while data := unpacked.read(BLOCK_BYTES):
            yield data


def read_blocks(
    path: Path, start: int = 0, end: int | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Block]:
    """Blocks of whole lines of about 1 MB. Of a plain file only the lines that begin in bytes [start, end).

    Raises UserError for a file that cannot be read or whose compressed data is damaged.
    """
    line = 1
    try:
        packing = packing_of(path)
        with path.open("rb") as file:
            readers = {"": _plain(file, max(0, start - 1)), GZIP: _ungzip(file), ZSTD: _unzstd(file)}
            source = readers[packing]
            for block in _cut(source, 0 if packing else start, None if packing else end, max_line_bytes):
                yield block
                line = block.line + block.count
    except UserError:
        raise
    except Exception as error:  # OSError, EOFError, and what the three decompressors call their own errors
        known = (OSError, EOFError, zlib.error)
        if not isinstance(error, known) and type(error).__name__ not in ("ZstdError", "IsalError"):
            raise
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{path}: cannot be read after line {line - 1:,}: {cause}; check the file or fetch it again"
        ) from error


def _cut(source: Iterator[bytes], start: int, end: int | None, max_line_bytes: int) -> Iterator[Block]:
    """Whole lines that begin in [start, end) of a source whose first byte is at start - 1 (at 0 if start is 0)."""
    line, offset = 1, start
    rest = bytearray()  # the beginning of a line
    skipping = 0  # bytes so far of a line that is too long
    aligned = start == 0
    for data in source:
        if not aligned:  # the line that runs into our range is the part's before us
            found = data.find(b"\n")
            offset += found if found >= 0 else len(data)
            if found < 0:
                continue
            data, aligned = data[found + 1 :], True
        if end is not None and not skipping and offset >= end:
            return
        if skipping:
            found = data.find(b"\n")
            skipping += len(data) if found < 0 else found + 1
            if found < 0:
                continue
            yield Block(b"", line, offset, overlong=skipping)
            line, offset, data, skipping = line + 1, offset + skipping, data[found + 1 :], 0
        stop = data.rfind(b"\n") + 1
        if not stop:
            rest += data
            if len(rest) > max_line_bytes:
                skipping, rest = len(rest), bytearray()
            continue
        whole = bytes(rest) + data[:stop] if rest else data[:stop]
        if end is not None and offset + len(whole) > end:
            if offset < end:  # our last line is the one that holds byte end - 1
                whole = whole[: whole.find(b"\n", end - offset - 1) + 1]
                yield Block(whole, line, offset, whole.count(b"\n"))
            return
        rest = bytearray(data[stop:])
        count = whole.count(b"\n")
        yield Block(whole, line, offset, count)
        line, offset = line + count, offset + len(whole)
    if skipping:
        yield Block(b"", line, offset, overlong=skipping)
    elif rest and (end is None or offset < end):
        yield Block(bytes(rest), line, offset)


def split(data: bytes) -> list[bytes]:
    """Lines of a block without their "\\n". (splitlines would also cut at a lone carriage return.)"""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def read_lines(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(line with its end, number, byte offset) one by one; an overlong line comes as b""."""
    for block in read_blocks(path, start, end):
        offset = block.offset
        if block.overlong:
            yield b"", block.line, offset
        for number, line in enumerate(split(block.data), block.line):
            ended = offset - block.offset + len(line) < len(block.data)
            yield line + b"\n" * ended, number, offset
            offset += len(line) + ended


def parse(line: bytes) -> Any:
    """A line's JSON value: by msgspec, or by json where that one is too strict (NaN, half characters, a BOM)."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(line.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        detail = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        raise BadLineError("broken UTF-8", detail) from None
    except json.JSONDecodeError as error:
        raise BadLineError("broken JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
        raise BadLineError("broken JSON", str(error).split(";")[0]) from None


@cache
def _decoder(key: str) -> Any:
    """Decodes only the text of a record and passes over the rest: three times the speed of whole records."""
    return msgspec.json.Decoder(msgspec.defstruct("Record", [("text", str)], rename={"text": key}))


def text_of(record: Any, key: str) -> str:
    """The text of a parsed record; half characters become U+FFFD. Raises BadLineError for what has none."""
    if not isinstance(record, dict):
        raise BadLineError("not a JSON object", f"a {type(record).__name__}")
    if key not in record:
        raise BadLineError(f"no key {key!r}", "has " + (", ".join(map(repr, list(record)[:6])) or "no key"))
    text = record[key]
    if not isinstance(text, str):
        raise BadLineError("text is not a string", type(text).__name__)
    if not text:
        raise BadLineError("empty text")
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def read_text(line: bytes, key: str) -> str:
    """The text of a line. Raises BadLineError."""
    try:
        text: str = _decoder(key).decode(line).text
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return text_of(parse(line), key)
    if not text:
        raise BadLineError("empty text")
    return text


def read_texts(block: Block, key: str) -> list[str] | None:
    """The texts of a block where every line has one; None where lines must be looked at one by one.

    msgspec takes values as they come, two on a line or one on two; not so where objects meet at each line end and are
    as many as the lines.
    """
    if block.data[:1] != b"{" or block.data.count(b"}\n{") != block.count - 1:
        return None
    try:
        texts = [record.text for record in _decoder(key).decode_lines(block.data)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return texts if len(texts) == block.count and all(texts) else None


def find_key(path: Path, key: str | None) -> str:
    """`key` if given, else the one of KEYS that more of the file's first records have; the first of them on a tie."""
    if key:
        return key
    counts = dict.fromkeys(KEYS, 0)
    for number, (line, _, _) in enumerate(read_lines(path)):
        if number == PEEKED_LINES:
            break
        try:
            record = parse(line)
        except BadLineError:
            continue
        for name in KEYS:
            counts[name] += isinstance(record, dict) and isinstance(record.get(name), str)
    return max(KEYS, key=lambda name: counts[name])
