"""Plain text files: a file is a document, of any size, or each line is one."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Iterator

from data_prep.readers import BLOCK_BYTES, BOM, Batch, Fault, Reading, Tally, finish, reject
from data_prep.streams import DamageError, Stream


def line_parser(how: Reading) -> Callable[[memoryview, int, int], Batch]:
    """A function from (block of whole lines, number of its first line, its offset) to a batch: a line is a document."""

    def parse(block: memoryview, number: int, offset: int) -> Batch:
        tally = Tally()
        texts: list[str] = []
        numbers: list[int] = []
        faults: list[Fault] = []
        lines = bytes(block).split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line_number, line in enumerate(lines, number):
            tally.lines += 1
            bare = (line.removeprefix(BOM) if offset == 0 else line).removesuffix(b"\r")
            if len(line) > how.max_line_bytes:
                reject(tally, faults, Fault(line_number, offset, "line too long", f"{len(line):,} bytes"), line)
            elif not bare or bare.isspace():
                tally.blank += 1
            else:
                try:
                    text = bare.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte 0x{bare[error.start]:02x} at column {error.start + 1}"
                    reject(tally, faults, Fault(line_number, offset, "broken UTF-8", where), line)
                else:
                    reason = how.filters.reject(text, None) if how.filters else None
                    if reason:
                        tally.filtered[reason] += 1
                    else:
                        texts.append(text)
                        numbers.append(line_number)
            offset += len(line) + 1
        return finish(texts, tally, len(block), faults, numbers)

    return parse


class WholeText:
    """Iterates over the batches of a text file that is one document.

    Up to `how.max_line_bytes` it is one text. A larger one comes in pieces, each cut where `last_cut` says that the
    pieces' ids are those of the whole; without last_cut, or where it finds no place to cut, the document is refused.
    """

    def __init__(self, stream: Stream, how: Reading, last_cut: Callable[[str], int] | None) -> None:
        self.stream, self.how, self.last_cut, self.damage = stream, how, last_cut, ""

    def __iter__(self) -> Iterator[Batch]:
        data = bytearray()
        try:
            while len(data) <= self.how.max_line_bytes and (block := self.stream.read()):
                data += block
        except DamageError as error:
            self.damage = str(error)
            yield _refused(Fault(1, 0, "file cut off", self.damage), len(data), False)
            return
        if len(data) > self.how.max_line_bytes:
            yield from self._pieces(data)
            return
        try:
            text = data.removeprefix(BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            yield _refused(Fault(1, error.start, "broken UTF-8", f"at byte {error.start + 1:,}"), len(data), False)
            return
        if not text or text.isspace():
            yield _refused(Fault(1, 0, "empty text"), len(data), False)
            return
        reason = self.how.filters.reject(text, None) if self.how.filters else None
        if reason:
            yield Batch([], Tally(lines=1, filtered=Counter([reason])), len(data), [], [])
        else:
            yield Batch([text], Tally(lines=1, documents=1), len(data), [], [1])

    def _pieces(self, data: bytearray) -> Iterator[Batch]:
        limit = f"{self.how.max_line_bytes:,} bytes"
        if self.last_cut is None or self.how.filters is not None:
            why = "filters see whole documents" if self.how.filters else "this tokenizer cannot be cut exactly"
            yield _refused(Fault(1, 0, "text file too large", f"over {limit}; {why}"), len(data), False)
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, begun, at = "", False, 0
        block = bytes(data.removeprefix(BOM))
        del data
        while True:
            try:
                for start in range(0, max(1, len(block)), BLOCK_BYTES):
                    text += decoder.decode(block[start : start + BLOCK_BYTES], final=not block)
                    cut = self.last_cut(text) if block else len(text)
                    if cut == 0 and len(text) > self.how.max_line_bytes:
                        fault = Fault(1, at, "text file too large", f"no place to cut it within {limit}")
                        yield _refused(fault, at, begun)
                        return
                    if cut or not block:
                        piece, text = text[:cut], text[cut:]
                        tally = Tally() if begun else Tally(lines=1, documents=1)
                        yield Batch([piece], tally, min(BLOCK_BYTES, len(block) - start), [], [1], begun, bool(block))
                        begun = True
                    at += len(block[start : start + BLOCK_BYTES])
                if not block:
                    return
                block = self.stream.read()
            except UnicodeDecodeError:
                yield _refused(Fault(1, at, "broken UTF-8", f"after byte {at:,}"), at, begun)
                return
            except DamageError as error:
                self.damage = str(error)
                yield _refused(Fault(1, at, "file cut off", self.damage), at, begun)
                return


def _refused(fault: Fault, text_bytes: int, begun: bool) -> Batch:
    """No document; where one was begun, its account is taken back."""
    tally = Tally(bad=Counter([fault.cause]), documents=-1 if begun else 0, lines=0 if begun else 1)
    return Batch([], tally, text_bytes, [fault], [], dropped=begun)
