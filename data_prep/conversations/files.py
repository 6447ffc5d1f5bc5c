"""From files to raw records: JSON Lines, JSON arrays, TSV and Parquet, packed or not, each record with its place.

What a file holds is told from its content. Memory is bounded by the longest record allowed (RECORD_BYTES), for Parquet
by its row groups. A record that cannot be read becomes a Fault and reading goes on behind it; a file that is cut off or
damaged raises, because nobody can count what it has lost.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from data_prep.conversations.record import Location
from data_prep.errors import UserError
from data_prep.streams import DamageError, LineRange, Overlong, Stream

SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".json", ".ndjson", ".tsv") for packed in ("", ".gz", ".zst"))
SUFFIXES += (".parquet",)  # looked for in folders
BLOCK_BYTES = 1 << 20
RECORD_BYTES = 1 << 26  # longer is no conversation but a file without newlines or with a quote missing
DEPTH = 100  # brackets inside one another; deeper is an attack or a fault, and ends in Python's own limit
ROWS = 256  # of Parquet at a time
BOM = b"\xef\xbb\xbf"
COLA = ("source", "label", "star", "sentence")  # GLUE's CoLA comes without a header
_SURROGATE = re.compile("[\ud800-\udfff]")

Record = dict[str, Any]


class Fault(Exception):  # noqa: N818 (of the data, not of the program)
    """A record that is not understood: `cause` is what faults are counted by, `detail` is of this one."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def __str__(self) -> str:
        return f"{self.cause} ({self.detail})" if self.detail else self.cause


class Raw(NamedTuple):
    """One record as the file has it, or why there is none; `data` are its bytes, where it had any."""

    place: Location
    value: Record | Fault
    data: bytes = b""
    position: int = 0  # bytes of the file on disk read so far


def read_raw(path: Path, repairs: Counter[str]) -> Generator[Raw]:
    """Records of a file in their order. `repairs` counts what was mended. Raises UserError for a file that cannot be
    read, ends in the middle, or holds none of the four kinds."""
    try:
        with Stream(path) as stream:
            head = _head(stream)
            if head[:4] == b"PAR1":
                yield from _parquet(path, repairs)
                return
            text = head.removeprefix(BOM).lstrip()[:1]
            name = path.name.removesuffix(".gz").removesuffix(".zst")
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: UTF-16 text; turn it into UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW")
            if name.endswith(".parquet"):
                raise UserError(f"{path}: no Parquet file (it does not begin with PAR1); fetch it again")
            if text == b"[":
                yield from _array(stream, repairs)
            elif name.endswith(".tsv") or (text != b"{" and b"\t" in head.partition(b"\n")[0]):
                yield from _tsv(stream, repairs)
            else:
                yield from _lines(stream, repairs)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; check the path and the disk") from error
    except DamageError as error:
        raise UserError(f"{path}: cannot be read: {error}; fetch it again") from error


def _head(stream: Stream) -> bytes:
    """The first bytes, put back."""
    head = b""
    while len(head) < 1 << 12 and (block := stream.read()):
        head += block
    stream.push(head)
    return head[: 1 << 16]


def decode(data: bytes, repairs: Counter[str]) -> Record:
    """A JSON object. Raises Fault."""
    if data.count(b"[") + data.count(b"{") > DEPTH:
        check_depth(data)
    try:
        value = msgspec.json.decode(data)
    except UnicodeDecodeError as error:
        # msgspec counts from the string's begin
        raise _broken_utf8(data) or Fault("broken UTF-8", str(error)) from None
    except ValueError:
        value = _decode_slowly(data, repairs)
    if not isinstance(value, dict):
        raise Fault("not a JSON object", f"a {type(value).__name__}")
    return value


def _decode_slowly(data: bytes, repairs: Counter[str]) -> object:
    """What msgspec refuses and Python takes: half characters and NaN, mended here; else the cause in words."""
    if fault := _broken_utf8(data):
        raise fault
    try:
        value = json.loads(data.decode())
    except json.JSONDecodeError as error:
        raise Fault("broken JSON", f"{error.msg} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise Fault("broken JSON", str(error).split(";")[0]) from None
    found: set[str] = set()
    value = plain(value, found)
    repairs.update(found)
    return value


def _broken_utf8(data: bytes) -> Fault | None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return Fault("broken UTF-8", f"byte 0x{data[error.start]:02x} at column {error.start + 1}")
    return None


def check_depth(data: bytes) -> None:
    """Raise Fault for JSON nested deeper than DEPTH."""
    depth = 0
    for token in re.finditer(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', data, re.S):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > DEPTH:
            raise Fault("broken JSON", f"nested more than {DEPTH} deep")


def plain(value: Any, found: set[str]) -> Any:
    """The value as JSON can hold it; what had to be changed is added to `found`."""
    if isinstance(value, str):
        if value.isascii() or not _SURROGATE.search(value):
            return value
        found.add("half a character became U+FFFD")
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {plain(key, found): plain(inner, found) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, found) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        found.add("NaN or infinity became null")
        return None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return msgspec.to_builtins(value)  # dates, decimals, bytes of Parquet: as text


def _numbered(stream: Stream) -> Iterator[tuple[int, bytes | Overlong]]:
    """(number, bytes) of each line. Raises UserError where the file is damaged."""
    lines = LineRange(stream, 0, None, BLOCK_BYTES, RECORD_BYTES)
    number = 0
    for _, block in lines:
        if isinstance(block, Overlong):
            number += 1
            yield number, block
            continue
        for number, line in enumerate(bytes(block).removesuffix(b"\n").split(b"\n"), number + 1):  # noqa: B020
            yield number, line if len(line) <= RECORD_BYTES else Overlong(len(line))
    if lines.damage:
        raise UserError(f"{stream.path}: cannot be read after line {number:,}: {lines.damage}; fetch it again")


def _lines(stream: Stream, repairs: Counter[str]) -> Iterator[Raw]:
    path = str(stream.path)
    for number, line in _numbered(stream):
        place = Location(path, number)
        if isinstance(line, Overlong):
            yield Raw(place, Fault("record too long", f"{line.size:,} bytes"), b"", stream.disk)
            continue
        line = line.removeprefix(BOM)  # anywhere: files may have been put end to end
        if line and not line.isspace():
            yield Raw(place, _tried(line, repairs), line, stream.disk)


def _tried(data: bytes, repairs: Counter[str]) -> Record | Fault:
    try:
        return decode(data, repairs)
    except Fault as fault:
        return fault


def _tsv(stream: Stream, repairs: Counter[str]) -> Iterator[Raw]:
    """Rows under the names of the first line. Cells are unquoted, as GLUE's are."""
    path, header = str(stream.path), None
    for number, line in _numbered(stream):
        place = Location(path, number)
        if isinstance(line, Overlong):
            yield Raw(place, Fault("record too long", f"{line.size:,} bytes"), b"", stream.disk)
            continue
        if not (line := line.removeprefix(BOM).removesuffix(b"\r")):
            continue
        if fault := _broken_utf8(line):
            yield Raw(place, fault, line, stream.disk)
            continue
        cells = line.decode().split("\t")
        if header is None:
            if len(cells) != len(COLA) or cells[1] not in ("0", "1"):
                header = cells
                continue
            header = list(COLA)
        if len(cells) != len(header):
            fault = Fault("wrong number of columns", f"{len(cells)} where the header has {len(header)}")
            yield Raw(place, fault, line, stream.disk)
        else:
            yield Raw(place, dict(zip(header, cells, strict=True)), line, stream.disk)


def _parquet(path: Path, repairs: Counter[str]) -> Iterator[Raw]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(ROWS):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                    found: set[str] = set()
                    record = plain(row, found)
                    repairs.update(found)
                    yield Raw(Location(str(path), None, number), record, b"", size * number // total)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read after record {number:,}: {cause}; fetch it again") from error


def _array(stream: Stream, repairs: Counter[str]) -> Iterator[Raw]:
    path = str(stream.path)
    for number, (line, data) in enumerate(array_elements(stream), 1):
        place = Location(path, line, number)
        if isinstance(data, Overlong):
            yield Raw(place, Fault("record too long", f"{data.size:,} bytes"), b"", stream.disk)
        else:
            yield Raw(place, _tried(data, repairs), data, stream.disk)


# A run without a bracket outside a string; possessive, so that no match ever goes back or needs memory for it.
_INSIDE = re.compile(rb'(?:[^"\[\]{}]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[^"\[\]{}]*+', re.S)
_BETWEEN = re.compile(rb'[^",\[\]{}]*+')  # the same between two elements, where commas count
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.S)  # the rest of a string, its quote left out


def array_elements(stream: Stream, limit: int = RECORD_BYTES) -> Iterator[tuple[int, bytes | Overlong]]:
    """(line, bytes) of each element of a JSON array, or of several end to end; an element over `limit` is passed over.

    Only brackets, quotes and commas are looked at: what an element holds is left to whoever decodes it, so a broken one
    costs no other. Raises UserError for an array that does not end.
    """
    buffer, at, start = bytearray(), 0, 0  # at: looked at so far; start: where the element begins
    line, depth, quoted, dropped = 1, 0, False, 0

    def element(end: int, last: bool) -> Iterator[tuple[int, bytes | Overlong]]:
        nonlocal start, line, dropped
        data = bytes(buffer[start:end])
        first = line + data.count(b"\n", 0, len(data) - len(data.lstrip()))
        if dropped:
            yield line, Overlong(dropped + len(data))
        elif not last or data.strip():
            yield first, data.strip()
        line += data.count(b"\n")
        start, dropped = end + 1, 0

    while block := stream.read():
        buffer += block
        while at < len(buffer):
            if quoted:
                at = _end(_STRING, buffer, at)
                if at >= len(buffer) or buffer[at] != 0x22:  # the string, or an escape in it, goes on in the next block
                    break
                at, quoted = at + 1, False
                continue
            at = _end(_BETWEEN if depth < 2 else _INSIDE, buffer, at)
            if at >= len(buffer):
                break
            mark = buffer[at : at + 1]
            if depth == 0:
                if mark != b"[" or buffer[start:at].strip(b" \t\r\n" + BOM):
                    raise UserError(f"{stream.path}: text behind the JSON array, line {line}; remove it")
                line += buffer.count(b"\n", start, at)
                start, depth = at + 1, 1
            elif mark == b'"':
                quoted = True
            elif depth == 1 and mark in (b",", b"]"):
                yield from element(at, mark == b"]")
                depth = 0 if mark == b"]" else 1
            elif mark in (b"[", b"{"):
                depth += 1
            elif depth > 1:
                depth -= 1
            at += 1
        if depth and at - start > limit:
            dropped, line = dropped + at - start, line + buffer.count(b"\n", start, at)
            start = at
        del buffer[:start]
        at, start = at - start, 0
    if depth:
        raise UserError(f"{stream.path}:{line}: the JSON array ends in the middle, in the record here; fetch it again")
    if buffer.strip():
        raise UserError(f"{stream.path}: text behind the JSON array, line {line}; remove it")


def _end(pattern: re.Pattern[bytes], buffer: bytearray, at: int) -> int:
    """Where the match from `at` on ends; no match object is left to hold the buffer."""
    match = pattern.match(buffer, at)
    assert match is not None  # each pattern matches nothing, too
    return match.end()


def keys_of(records: Iterable[Record]) -> str:
    """The keys of some records in words."""
    names = dict.fromkeys(name for record in records for name in record)
    return ", ".join(map(repr, list(names)[:10])) or "none"
