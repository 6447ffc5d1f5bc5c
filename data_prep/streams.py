"""The bytes of an input file, decompressed, forward only, in bounded memory; and the lines that begin in a byte range.

gzip and zstd are told by content, not by name. Compressed bytes are fed to the decompressor in blocks of fixed size, so
what comes before a damage is the same bytes whoever reads, however often it is tried.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from types import TracebackType

PLAIN_BLOCK = 1 << 20  # the most that one read gives
HEAD_BYTES = 200  # of an overlong line that are kept to show
GZIP, ZSTD, PLAIN = "gzip", "zstd", ""
# Compressed bytes a call, which bounds what one call may unpack: 1,032 times as much, and 32,000 times (128 KiB from 4
# bytes). A file of one letter makes 16 and 64 MB of it.
PACKED_BLOCKS = {GZIP: 1 << 14, ZSTD: 1 << 11}
NAMED = (".gz", ".zst")


class DamageError(Exception):
    """Compressed data that cannot be read any further. The message is the cause alone."""


def packing(head: bytes) -> str:
    """GZIP, ZSTD or PLAIN, from a file's first four bytes."""
    if head[:2] == b"\x1f\x8b":
        return GZIP
    skippable = head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F
    return ZSTD if head[:4] == b"\x28\xb5\x2f\xfd" or skippable else PLAIN


def _plain(file: BufferedReader) -> Iterator[bytes]:
    while block := file.read(PLAIN_BLOCK):
        yield block


def _gzip(file: BufferedReader) -> Iterator[bytes]:
    from isal import isal_zlib
    from isal.igzip_lib import IsalError

    member, inside = None, False
    while block := file.read(PACKED_BLOCKS[GZIP]):
        while block:
            if member is None:
                if inside and not block.strip(b"\0"):
                    break  # members may be padded with zeros at the end of the file
                member, inside = isal_zlib.decompressobj(wbits=31), True
            try:
                data = member.decompress(block)
            except (IsalError, zlib.error, EOFError, OSError, ValueError) as error:  # type: ignore[misc]
                raise DamageError(f"the gzip data is damaged ({str(error) or type(error).__name__})") from error
            block = member.unused_data if member.eof else b""
            if member.eof:
                member = None
            if data:
                yield data
    if member is not None:
        raise DamageError("the gzip data ends in the middle")


def _zstd(file: BufferedReader) -> Iterator[bytes]:
    import zstandard

    frame = None
    while block := file.read(PACKED_BLOCKS[ZSTD]):
        while block:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                data = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise DamageError(f"the zstd data is damaged ({error})") from error
            block = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
            if data:
                yield data
    if frame is not None:
        raise DamageError("the zstd data ends in the middle")


def _unlike_its_name(head: bytes) -> bool:
    """Do these first bytes of a file that is named as packed, and is not, show that it is no text either?

    Plain text under such a name is what servers that unpack on the way leave. A file that has lost its first bytes, or
    all, must not pass for a few bad lines.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return len(head) < 4 or any(character < " " and character not in "\t\r\n" for character in text)


def _no_blocks(cause: str) -> Iterator[bytes]:
    raise DamageError(cause)
    yield b""


def _small(blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        if len(block) <= PLAIN_BLOCK:
            yield block
        else:
            yield from (block[at : at + PLAIN_BLOCK] for at in range(0, len(block), PLAIN_BLOCK))


class Stream:
    """An input file from some place on. `at`: offset, in unpacked bytes, of what `read` gives next.

    Use as a context manager, or close it. Raises OSError when the disk does, DamageError for compressed data.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self._file = path.open("rb")
        head = self._file.peek(4)[:4]
        self.packing = packing(head)
        unpack = {PLAIN: _plain, GZIP: _gzip, ZSTD: _zstd}[self.packing]
        self._blocks = _small(unpack(self._file))
        if self.packing == PLAIN and path.suffix in NAMED and _unlike_its_name(head):
            self._blocks = _no_blocks("the file is empty" if not head else f"no {path.suffix} file, and no text")
        self._pushed = b""  # read too far and put back

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def disk(self) -> int:
        """Bytes of the file on disk consumed so far."""
        return self._file.tell()

    def read(self) -> bytes:
        """The next block, of any size; b"" at the end."""
        block = self._pushed or next(self._blocks, b"")
        self._pushed = b""
        self.at += len(block)
        return block

    def push(self, block: bytes) -> None:
        """Put back the end of what was read."""
        self._pushed = block + self._pushed
        self.at -= len(block)

    def skip_to(self, offset: int) -> bool:
        """Go to an offset that is not behind; False when the file ends before it."""
        if self.packing == PLAIN and not self._pushed:
            self._file.seek(offset)
            self.at = offset
            return True
        while self.at < offset:
            block = self.read()
            if not block:
                return False
            if self.at > offset:
                self.push(block[len(block) - (self.at - offset) :])
        return True


class Overlong:
    """Stands for a line that was passed over because it is longer than allowed: its bytes, and the first of them."""

    def __init__(self, size: int, head: bytes = b"") -> None:
        self.size, self.head = size, head


class LineRange:
    """Iterates over whole lines that begin in [start, stop) of a stream, in blocks of about `block_bytes`.

    Gives (offset of the block, its whole lines, or Overlong for a single line over `max_line` bytes). A line
    belongs to the range that its first byte lies in, so ranges end to end give each line once. Afterwards `ended` says
    that no line of the file begins at or after `stop`, and `damage` why the file could not be read to there, with
    `cut_bytes`, the bytes of the line in which it broke off; the stream stands at the first line after the range.
    """

    def __init__(self, stream: Stream, start: int, stop: int | None, block_bytes: int, max_line: int) -> None:
        self.stream, self.start, self.stop = stream, start, stop
        self.block_bytes, self.max_line = block_bytes, max_line
        self.ended, self.damage, self.cut_bytes = False, "", 0

    def __iter__(self) -> Iterator[tuple[int, memoryview | Overlong]]:
        try:
            if self._find_first():
                yield from self._lines()
            else:
                self.ended = True
        except DamageError as error:
            self.ended, self.damage = True, str(error)

    def _find_first(self) -> bool:
        """Go to the first line that begins at or after `start`; False when there is none."""
        stream = self.stream
        if self.start == 0 or stream.at >= self.start:  # the latter: it read the range before, and stands at a line
            return True
        if not stream.skip_to(self.start - 1):
            return False
        while block := stream.read():
            if (end := block.find(b"\n")) >= 0:
                stream.push(block[end + 1 :])
                return True
        return False

    def _lines(self) -> Iterator[tuple[int, memoryview | Overlong]]:
        stream, stop = self.stream, self.stop
        pieces: list[bytes] = []  # read and not given yet; from `base`, the first byte of a line, on
        held, base, enough = 0, stream.at, self.block_bytes
        while stop is None or base < stop:
            try:
                block = stream.read()
            except DamageError as error:
                self.damage, block = str(error), b""
            if not block:
                self.ended = True
                data = b"".join(pieces)
                end = data.rfind(b"\n") + 1 if self.damage else held
                if end:
                    yield base, memoryview(data)[:end]
                if held - end > self.max_line:
                    yield base + end, Overlong(held - end, data[end : end + HEAD_BYTES])
                else:
                    self.cut_bytes = held - end
                return
            pieces.append(block)
            held += len(block)
            if held < enough and (stop is None or base + held < stop):
                continue
            data = b"".join(pieces) if len(pieces) > 1 else block
            end = data.rfind(b"\n") + 1
            if not end:
                pieces, enough = [data], 2 * held  # a long line is joined and searched a few times, not at each block
                if held > self.max_line:
                    size, tail = self._pass_over(held)
                    yield base, Overlong(size, data[:HEAD_BYTES])
                    pieces, held, enough, base = [], 0, self.block_bytes, base + size + 1
                    stream.push(tail)
                    if self.ended:
                        return
                continue
            enough = self.block_bytes
            if stop is not None and base + end > stop:  # the last line is the one that reaches beyond stop - 1
                end = data.index(b"\n", max(0, stop - 1 - base)) + 1
            yield base, memoryview(data)[:end]
            base, held = base + end, held - end
            pieces = [data[end:]] if held else []
        if held:
            stream.push(b"".join(pieces))
        if stop is not None:
            self._look_ahead()

    def _pass_over(self, size: int) -> tuple[int, bytes]:
        """Read to the end of an overlong line: its length, and what was read behind it."""
        while True:
            try:
                block = self.stream.read()
            except DamageError as error:
                self.damage, block = str(error), b""
            if not block:
                self.ended = True
                return size, b""
            end = block.find(b"\n")
            if end >= 0:
                return size + end, block[end + 1 :]
            size += len(block)

    def _look_ahead(self) -> None:
        """Is there anything behind the range?"""
        try:
            block = self.stream.read()
        except DamageError as error:
            self.ended, self.damage = True, str(error)
            return
        self.ended = not block
        self.stream.push(block)
