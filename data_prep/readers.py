"""JSON Lines in: plain, gzip and zstd files, read in bounded memory, with every bad line counted and placed.

Two halves, so that many processes can share the work: `read_chunks` cuts files into blocks of whole lines (cheap; one
process), `parse_lines` turns a block into documents (dear; any process). `read_documents` is both in one process.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from data_prep.errors import UserError

KEYS = ("text", "content")  # looked for, in this order, when no key is given
SUFFIXES = tuple(kind + packing for kind in (".jsonl", ".json") for packing in ("", ".gz", ".zst"))
CHUNK_BYTES = 1 << 20  # text per task: large enough to hide a process hop, small enough for 128 tasks in memory
MAX_LINE_BYTES = 1 << 28  # a longer line is no document but a file without newlines; it is counted bad, not loaded
SHOWN = 5  # bad lines kept word for word in a Tally
PEEKED_LINES, PEEKED_FILES = 100, 8  # how far the search for the key goes
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Tally:
    """What became of every line. Tallies of consecutive chunks add up with `add`."""

    lines: int = 0
    documents: int = 0
    blank: int = 0  # lines of white space: no record, no fault
    repaired: int = 0  # documents kept after lone surrogates (half a character) became U+FFFD
    bad: Counter[str] = field(default_factory=Counter)  # cause -> lines
    examples: list[str] = field(default_factory=list)  # "file:line: cause", the first few

    def add(self, other: Tally) -> None:
        """Count `other`, whose lines come after ours."""
        self.lines += other.lines
        self.documents += other.documents
        self.blank += other.blank
        self.repaired += other.repaired
        self.bad.update(other.bad)
        self.examples = (self.examples + other.examples)[:SHOWN]

    def reject(self, location: str, cause: str, detail: str = "") -> None:
        """Count one bad line; keep its place if it is among the first."""
        self.bad[cause] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{location}: {cause}{f' ({detail})' if detail else ''}")

    @property
    def bad_lines(self) -> int:
        """Lines that gave no document though they were not blank."""
        return self.bad.total()

    def check(self, max_bad: float) -> None:
        """Raise UserError when more than `max_bad` (a share, 0 to 1) of the lines that are not blank were bad."""
        records = self.lines - self.blank
        if self.bad_lines and self.bad_lines > max_bad * records:
            causes = ", ".join(f"{count:,} × {cause}" for cause, count in self.bad.most_common())
            share = self.bad_lines / records
            raise UserError(
                f"{self.bad_lines:,} of {records:,} lines are bad ({share:.2%}; --max-bad allows {max_bad:.2%}):"
                f" {causes}."
                f" First: {'; '.join(self.examples)}. Repair the files, or allow it with"
                f" --max-bad {min(1.0, share + 5e-4):.3f}"
            )


@dataclass
class Chunk:
    """Whole lines of one file. `first_line` counts from 1; `position`: bytes of the file on disk read so far."""

    path: Path
    first_line: int
    data: bytes
    position: int = 0
    key: str = KEYS[0]
    overlong: tuple[int, int] | None = None  # (line, bytes) of a line dropped for its length, instead of data


@dataclass
class Document:
    """One text and where it came from, as file:line."""

    text: str
    location: str


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """Files named by files, folders (searched below for .jsonl/.json, .gz/.zst or not) and globs; sorted, each once.

    Sorted by path as text, so that neither the order of arguments nor the shell's locale changes the output.
    Raises UserError for an input that names nothing.
    """
    found: dict[Path, Path] = {}
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            files = [
                p
                for p in path.rglob("*")
                if p.name.endswith(SUFFIXES)
                and p.is_file()
                and not any(q.startswith(".") for q in p.relative_to(path).parts)
            ]
            if not files:
                raise UserError(
                    f"{item}: no {', '.join(SUFFIXES)} file in this folder; name the files, or another folder", 2
                )
        elif path.exists():
            files = [path]
        else:
            names = glob.glob(item, recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
            files = [Path(name) for name in names if Path(name).is_file()]
            if not files:
                raise UserError(f"{item}: no such file, folder or glob match; check the path", 2)
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError("no input; name JSONL files, folders or globs", 2)
    return sorted(found.values(), key=lambda p: p.as_posix())


def _blocks(file: BufferedReader) -> Iterator[bytes]:
    """The file's bytes, decompressed by content (not by name), in blocks of at most a few MiB.

    Raises EOFError or OSError on truncated or damaged compressed data.
    """
    magic = file.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        with gzip.open(file) as unpacked:
            while block := unpacked.read(1 << 20):
                yield block
    elif magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and 0x50 <= magic[0] <= 0x5F):
        import zstandard

        # Not stream_reader: it ends a truncated frame in silence. Small reads bound what one call may unpack.
        frame = None
        while block := file.read(1 << 14):
            while block:
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    unpacked_block = frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
                if unpacked_block:
                    yield unpacked_block
        if frame is not None:
            raise EOFError("the compressed data ends in the middle of a frame")
    else:
        while block := file.read(1 << 20):
            yield block


def read_chunks(path: Path, chunk_bytes: int = CHUNK_BYTES, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Chunk]:
    """Cut a file into blocks of whole lines of about `chunk_bytes` (more if one line is longer).

    A line over `max_line_bytes` is passed over in bounded memory and reported by a chunk's `overlong`.
    Raises UserError for a file that cannot be opened or whose compressed data is damaged.
    """
    line, rest, skipped = 1, bytearray(), 0
    searched = 0  # bytes of rest known to hold no newline, so that a long line is not searched again and again
    try:
        with path.open("rb") as file:
            for block in _blocks(file):
                if skipped:  # inside an overlong line
                    end = block.find(b"\n")
                    skipped += len(block) if end < 0 else end
                    if end < 0:
                        continue
                    yield Chunk(path, line, b"", file.tell(), overlong=(line, skipped))
                    line, skipped, block = line + 1, 0, block[end + 1 :]
                rest += block
                if len(rest) < chunk_bytes:
                    continue
                end = rest.rfind(b"\n", searched) + 1
                searched = 0 if end else len(rest)
                if end:
                    data = bytes(rest[:end])
                    del rest[:end]
                    yield Chunk(path, line, data, file.tell())
                    line += data.count(b"\n")
                elif len(rest) > max_line_bytes:
                    skipped, searched, rest = len(rest), 0, bytearray()
            if skipped:
                yield Chunk(path, line, b"", file.tell(), overlong=(line, skipped))
            elif rest:
                yield Chunk(path, line, bytes(rest), file.tell())
    except (EOFError, OSError, zlib.error) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{path}: cannot be read after line {line - 1:,}: {cause}; check the file or fetch it again"
        ) from error


def _record(line: bytes) -> object:
    """One line's JSON value. Raises UnicodeDecodeError, ValueError or RecursionError."""
    return json.loads(line.decode("utf-8"))


def parse_lines(chunk: Chunk) -> tuple[list[Document], Tally]:
    """Documents of a chunk in order, and the account of its lines. Never raises for what a line holds."""
    tally = Tally()
    documents: list[Document] = []
    if chunk.overlong:
        tally.lines = 1
        tally.reject(f"{chunk.path}:{chunk.overlong[0]}", "line too long", f"{chunk.overlong[1]:,} bytes")
        return documents, tally
    data = chunk.data.removeprefix(b"\xef\xbb\xbf") if chunk.first_line == 1 else chunk.data
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    tally.lines = len(lines)
    for number, line in enumerate(lines, chunk.first_line):
        if not line or line.isspace():
            tally.blank += 1
            continue
        location = f"{chunk.path}:{number}"
        try:
            record = _record(line)
        except UnicodeDecodeError as error:
            tally.reject(location, "broken UTF-8", f"byte 0x{line[error.start]:02x} at column {error.start + 1}")
            continue
        except json.JSONDecodeError as error:
            tally.reject(location, "broken JSON", f"{error.msg} at column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
            tally.reject(location, "broken JSON", str(error).split(";")[0])
            continue
        if not isinstance(record, dict):
            tally.reject(location, "not a JSON object", f"a {type(record).__name__}")
        elif chunk.key not in record:
            tally.reject(
                location, f"no key {chunk.key!r}", "has " + (", ".join(map(repr, list(record)[:6])) or "no key")
            )
        elif not isinstance(text := record[chunk.key], str):
            tally.reject(location, "text is not a string", type(text).__name__)
        elif not text:
            tally.reject(location, "empty text")
        else:
            if not text.isascii() and _SURROGATE.search(text):
                text = _SURROGATE.sub("\ufffd", text)
                tally.repaired += 1
            documents.append(Document(text, location))
    tally.documents = len(documents)
    return documents, tally


def _peek(path: Path) -> Iterator[dict[str, object]]:
    """The records among a file's first lines that parse."""
    chunk = next(read_chunks(path, chunk_bytes=1 << 16), None)
    for line in chunk.data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:PEEKED_LINES] if chunk else ():
        try:
            record = _record(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def find_keys(paths: Sequence[Path], key: str | None = None) -> Callable[[Path], str]:
    """A function from file to the key its text is under: `key` if given, else `text` or `content`, found file by file.

    Raises UserError, naming the keys that are there, when none of the first records of the first files has it:
    better now than after hours of counting bad lines.
    """
    wanted = (key,) if key else KEYS
    seen: Counter[str] = Counter()
    arrays: list[Path] = []
    for path in paths[:PEEKED_FILES]:
        records = list(_peek(path))
        if any(name in record for record in records for name in wanted):
            break
        for record in records:
            seen.update(record.keys())
        if not records and (chunk := next(read_chunks(path, 1 << 16), None)) and chunk.data.lstrip()[:1] == b"[":
            arrays.append(path)
    else:
        if seen:
            names = " or ".join(map(repr, wanted))
            there = ", ".join(repr(name) for name, _ in seen.most_common(8))
            raise UserError(
                f"{paths[0]}: no key {names} in the first records; keys there: {there}; name one with --key", 2
            )

        if arrays:
            raise UserError(
                f"{arrays[0]}: looks like one JSON array, not one record a line; rewrite it: jq -c '.[]' FILE > FILE.jsonl",
                2,
            )

    def of(path: Path) -> str:
        if key:
            return key
        strings = Counter(name for record in _peek(path) for name in KEYS if isinstance(record.get(name), str))
        return max(KEYS, key=lambda name: strings[name])  # the earlier of KEYS on a tie

    return of


def chunks_of(paths: Sequence[Path], key: str | None = None, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Chunks of all files in order, each with the key of its file."""
    key_of = find_keys(paths, key)
    for path in paths:
        name = key_of(path)
        for chunk in read_chunks(path, chunk_bytes):
            chunk.key = name
            yield chunk


def read_documents(
    inputs: Iterable[str | Path], key: str | None = None, max_bad: float = 0.01, tally: Tally | None = None
) -> Iterator[tuple[str, str]]:
    """(text, "file:line") of every good line, in one process. Pass a `tally` to see the account of the others.

    Raises UserError at the end when more than the share `max_bad` of the lines was bad, or for unreadable files.
    """
    total = tally if tally is not None else Tally()
    for chunk in chunks_of(expand_inputs(inputs), key):
        documents, counted = parse_lines(chunk)
        total.add(counted)
        for document in documents:
            yield document.text, document.location
    total.check(max_bad)
