"""Records in: JSON Lines, Parquet and plain text become batches of texts, with an account of every line.

A batch is made from a block of a fixed range of a file (data_prep/plan.py), so the same batches come whoever reads. The
fast path decodes a block of lines at once; a block that holds anything odd is gone through line by line, where each
fault gets its cause and place. What a line's verdict is never depends on the path taken.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data_prep.errors import UserError
from data_prep.filters import Filters
from data_prep.inputs import JSONL, TEXT, File, check_keys, describe, expand_inputs, key_of
from data_prep.streams import HEAD_BYTES, PLAIN, LineRange, Overlong, Stream

BLOCK_BYTES = 1 << 19  # of text parsed and encoded at a time: fits the processor's cache, hides the cost of a call
MAX_LINE_BYTES = 1 << 26  # a longer line is no document but a file without newlines; it is counted bad, not loaded
SHOWN = 5  # faults shown in a summary; the log has all
LOGGED_BYTES = HEAD_BYTES  # of a rejected line that go into the log
_SURROGATE = re.compile("[\ud800-\udfff]")
BOM = b"\xef\xbb\xbf"


@dataclass
class Fault:
    """A line that is no document (or was mended). `line` counts from 1 in its part of the file, until all are added."""

    line: int
    offset: int  # bytes into the unpacked file; for Parquet the row
    cause: str
    detail: str = ""
    excerpt: str = ""
    kept: bool = False  # mended rather than left out


@dataclass
class Tally:
    """What became of every line (Parquet: row; text file: document). Tallies of consecutive ranges add up."""

    lines: int = 0
    documents: int = 0
    blank: int = 0  # lines of white space: no record, no fault
    repaired: int = 0  # documents kept after a fault was mended
    bad: Counter[str] = field(default_factory=Counter)  # cause -> lines
    filtered: Counter[str] = field(default_factory=Counter)  # filter's reason -> documents it left out

    def add(self, other: Tally) -> None:
        self.lines += other.lines
        self.documents += other.documents
        self.blank += other.blank
        self.repaired += other.repaired
        self.bad.update(other.bad)
        self.filtered.update(other.filtered)

    @property
    def bad_lines(self) -> int:
        """Lines that gave no document though they were neither blank nor filtered out."""
        return self.bad.total()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "bad": dict(self.bad), "filtered": dict(self.filtered)}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Tally:
        return cls(**{**value, "bad": Counter(value["bad"]), "filtered": Counter(value["filtered"])})

    def check(self, max_bad: float, shown: Iterable[str] = ()) -> None:
        """Raise UserError when more than `max_bad` (a share, 0 to 1) of the lines that are not blank were bad."""
        records = self.lines - self.blank
        if self.bad_lines and self.bad_lines > max_bad * records:
            causes = ", ".join(f"{count:,} × {cause}" for cause, count in self.bad.most_common())
            share = self.bad_lines / records
            raise UserError(
                f"{self.bad_lines:,} of {records:,} lines are bad ({share:.2%}; --max-bad allows {max_bad:.2%}):"
                f" {causes}. First: {'; '.join(shown)}. Repair the files, or allow it with"
                f" --max-bad {min(1.0, share + 5e-4):.3f}"
            )


@dataclass
class Batch:
    """Texts of consecutive records."""

    texts: list[str]
    tally: Tally
    text_bytes: int  # of the input that they were made from, unpacked
    faults: list[Fault]
    lines: Sequence[int]  # of each text, numbered as faults are
    goes_on: bool = False  # its one text continues the document that the batch before began
    more: bool = False  # the document of its one text goes on in the next batch
    dropped: bool = False  # what was begun so turns out to be bad: nothing of it is kept


@dataclass(frozen=True)
class Reading:
    """How inputs are read; all of it may change the output."""

    key: str | None = None
    text_documents: str = "file"  # what a document is in a text file: file | line
    max_line_bytes: int = MAX_LINE_BYTES
    filters: Filters | None = None  # what leaves out good documents; None where nothing is asked


class Reader:
    """Reads ranges of files one after another, in one process; keeps a stream open, since the next range may follow.

    last_cut(text) -> index up to which a long text may be encoded by itself; needed for text files larger than
    max_line_bytes, which are refused without it.
    """

    def __init__(self, how: Reading, last_cut: Callable[[str], int] | None = None) -> None:
        self.how, self.last_cut = how, last_cut
        self._stream: Stream | None = None
        self._boundary: int | None = None  # where the range ended that left the stream at the first line behind it
        self._keys: dict[Path, str] = {}
        self.ended, self.damage = False, ""  # of the range read last
        self.disk = 0  # bytes on disk consumed by the range read last, so far

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._boundary = None

    def read(self, file: File, start: int, stop: int | None) -> Iterator[Batch]:
        """Batches of the records that begin in [start, stop): bytes of the unpacked file, or row groups of Parquet.

        Afterwards `ended` says whether nothing begins at or after `stop`; `damage` what kept it from being read.
        Raises UserError for a file that the disk does not give.
        """
        self.ended, self.damage, self.disk = False, "", 0
        try:
            if file.form not in (JSONL, TEXT):
                yield from self._parquet(file, start, stop)
                return
            stream = self._open(file.path, start)
            before = start if stream.packing == PLAIN else stream.disk if start else 0
            read = self._whole_text if file.form == TEXT and self.how.text_documents == "file" else self._lines
            for batch in read(file, stream, start, stop):
                self.disk = stream.disk - before
                yield batch
            if self.ended:
                self.close()
        except OSError as error:
            self.close()
            raise UserError(
                f"{file.path}: cannot be read: {error.strerror or error}; check the file and its disk"
            ) from error

    def _open(self, path: Path, start: int) -> Stream:
        """The stream left by an earlier range of this file that ended at or before `start`, or a new one."""
        stream, boundary = self._stream, self._boundary
        if stream is None or stream.path != path or boundary is None or boundary > start:
            self.close()
            stream = self._stream = Stream(path)
        self._boundary = None
        return stream

    def _key(self, file: File) -> str:
        if file.path not in self._keys:
            self._keys[file.path] = key_of(file, self.how.key)
        return self._keys[file.path]

    def _lines(self, file: File, stream: Stream, start: int, stop: int | None) -> Iterator[Batch]:
        lines = LineRange(stream, start, stop, BLOCK_BYTES, self.how.max_line_bytes)
        parse = parser(self._key(file), self.how) if file.form == JSONL else self._text_lines()
        number = 1
        for offset, block in lines:
            if isinstance(block, Overlong):
                batch = Batch([], Tally(lines=1), block.size, [], [])
                fault = Fault(number, offset, "line too long", f"{block.size:,} bytes")
                reject(batch.tally, batch.faults, fault, block.head)
            else:
                batch = parse(block, number, offset)
            number += batch.tally.lines
            yield batch
        self.ended, self.damage, self._boundary = lines.ended, lines.damage, stop
        if lines.cut_bytes:
            fault = Fault(number, -1, "line cut off", f"{lines.cut_bytes:,} bytes before {lines.damage}")
            yield Batch([], Tally(lines=1, bad=Counter([fault.cause])), lines.cut_bytes, [fault], [])

    def _text_lines(self) -> Callable[[memoryview, int, int], Batch]:
        from data_prep.textfile import line_parser

        return line_parser(self.how)

    def _whole_text(self, file: File, stream: Stream, start: int, stop: int | None) -> Iterator[Batch]:
        """A text file as one document; in pieces that can be encoded apart when it is large."""
        from data_prep.textfile import WholeText

        document = WholeText(stream, self.how, self.last_cut)
        yield from document
        self.ended, self.damage = True, document.damage

    def _parquet(self, file: File, start: int, stop: int | None) -> Iterator[Batch]:
        from data_prep.parquet import RowGroups

        groups = RowGroups(file, self._key(file), start, stop, self.how.filters)
        for batch in groups:
            self.disk = groups.disk
            yield batch
        self.ended, self.damage = groups.ended, groups.damage


def finish(texts: list[str], tally: Tally, text_bytes: int, faults: list[Fault], lines: Sequence[int]) -> Batch:
    """A batch whose tally counts its texts and what was mended."""
    tally.documents, tally.repaired = len(texts), sum(fault.kept for fault in faults)
    return Batch(texts, tally, text_bytes, faults, lines)


def reject(batch_tally: Tally, faults: list[Fault], fault: Fault, line: bytes = b"") -> None:
    """Count one bad line and keep its place and first bytes."""
    fault.excerpt = line[:LOGGED_BYTES].decode("utf-8", "backslashreplace")
    faults.append(fault)
    batch_tally.bad[fault.cause] += 1


@cache
def _decoder(key: str) -> msgspec.json.Decoder[Any]:
    """A decoder of records that keeps the text alone; everything else is skipped, not built."""
    record = msgspec.defstruct("Record", [("text", str, msgspec.field(name=key))], gc=False)
    return msgspec.json.Decoder(record)


def parser(key: str, how: Reading) -> Callable[[memoryview, int, int], Batch]:
    """A function from (block of whole lines, number of its first line, its offset) to a batch."""
    decoder, filters, max_line = _decoder(key), how.filters, how.max_line_bytes

    def parse(block: memoryview, number: int, offset: int) -> Batch:
        lines = _objects(block) if filters is None and len(block) <= max_line else 0
        if lines:
            try:
                records = decoder.decode_lines(block)
            except (ValueError, RecursionError):
                records = []
            # { at the begin and } at the end of each line: as many records as lines can only be one on each
            if len(records) == lines:
                texts = [record.text for record in records]
                if all(texts):
                    return finish(texts, Tally(lines=lines), len(block), [], range(number, number + lines))
        return _slowly(bytes(block), number, offset, key, decoder, filters, max_line)

    return parse


def _objects(block: memoryview) -> int:
    """The number of lines, if each begins with { and ends with } and nothing is around them; else 0.

    Then no record can span two lines: inside a value a } is never followed by white space and a {.
    """
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == 10)
    if not len(ends) or ends[-1] != len(data) - 1:
        ends = np.append(ends, len(data))
    if data[0] != 123 or ends[0] == 0 or (data[ends - 1] != 125).any() or (data[ends[:-1] + 1] != 123).any():
        return 0
    return len(ends)


def _slowly(
    block: bytes,
    number: int,
    offset: int,
    key: str,
    decoder: msgspec.json.Decoder[Any],
    filters: Filters | None,
    max_line: int,
) -> Batch:
    """A block line by line."""
    tally = Tally()
    texts: list[str] = []
    numbers: list[int] = []
    faults: list[Fault] = []
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line_number, line in enumerate(lines, number):
        tally.lines += 1
        found: str | Fault | None
        if len(line) > max_line:
            found = Fault(line_number, offset, "line too long", f"{len(line):,} bytes")
        elif not line or line.isspace():
            tally.blank += 1
            found = None
        else:
            found = _one_line(line, line_number, offset, key, decoder, faults)
        if isinstance(found, Fault):
            reject(tally, faults, found, line)
        elif found is not None:
            reason = None
            if filters is not None:
                reason = filters.reject(found, _loose(line) if filters.needs_record else None)
            if reason:
                tally.filtered[_SURROGATE.sub("\ufffd", reason)] += 1
            else:
                texts.append(found)
                numbers.append(line_number)
        offset += len(line) + 1
    return finish(texts, tally, len(block), faults, numbers)


def _loose(line: bytes) -> Any:
    """A record's JSON value, as forgiving as Python's json and more; None where even its other fields cannot be read."""
    try:
        return msgspec.json.decode(line.removeprefix(BOM))
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"), parse_int=float)
    except (ValueError, RecursionError):
        return None


def _one_line(
    line: bytes, number: int, offset: int, key: str, decoder: msgspec.json.Decoder[Any], mended: list[Fault]
) -> str | Fault:
    """The text of one line, or why there is none. What was mended is appended to `mended`."""
    try:
        text: object = decoder.decode(line).text
    except (ValueError, RecursionError):
        pass
    else:
        return text if isinstance(text, str) and text else Fault(number, offset, "empty text")

    def fault(cause: str, detail: str) -> Fault:
        return Fault(number, offset, cause, detail)

    # Python's json takes what msgspec refuses and Megatron's script takes: NaN, half characters; and it says more.
    bare = line.removeprefix(BOM) if offset == 0 else line
    try:
        record = json.loads(bare.decode("utf-8"))
    except UnicodeDecodeError as error:
        return fault("broken UTF-8", f"byte 0x{bare[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return fault("broken JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
        return fault("broken JSON", str(error).split(";")[0])
    if not isinstance(record, dict):
        return fault("not a JSON object", f"a {type(record).__name__}")
    if key not in record:
        return fault(f"no key {key!r}", "has " + (", ".join(map(repr, list(record)[:6])) or "no key"))
    if not isinstance(text := record[key], str):
        return fault("text is not a string", type(text).__name__)
    if not text:
        return fault("empty text", "")
    note = "byte order mark" if bare is not line else "not strict JSON (NaN or the like)"
    if not text.isascii() and _SURROGATE.search(text):
        text, note = _SURROGATE.sub("\ufffd", text), "half characters, now U+FFFD"
    mended.append(Fault(number, offset, note, kept=True))
    return text


def read_documents(
    inputs: Iterable[str | Path], key: str | None = None, max_bad: float = 0.01, tally: Tally | None = None
) -> Iterator[tuple[str, str]]:
    """(text, file) of every document, in one process. Pass a `tally` to see the account of all lines.

    Raises UserError at the end when more than the share `max_bad` of the lines was bad, or for unreadable files.
    """
    total = tally if tally is not None else Tally()
    files = [describe(path) for path in expand_inputs(inputs)]
    check_keys(files, key)
    reader = Reader(Reading(key))
    shown: list[str] = []
    for file in files:
        before = total.lines
        for batch in reader.read(file, 0, None):
            total.add(batch.tally)
            room = SHOWN - len(shown)
            shown += [f"{file.path}:{fault.line}: {fault.cause}" for fault in batch.faults if not fault.kept][:room]
            for text in batch.texts:
                yield text, str(file.path)
        if reader.damage:
            raise UserError(f"{file.path}: {reader.damage} after line {total.lines - before:,}; fetch the file again")
    reader.close()
    total.check(max_bad, shown)
