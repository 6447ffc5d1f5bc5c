"""First stage: a part of the input to hashes of its texts and its documents' bands.

A part's file holds segments of up to 65,536 documents, so that memory does not grow with a compressed file's size:
line{i} u32 (number in its piece), low{i}, high{i} u64 (128-bit hash of the text), and by ascending hash, so that any
range of hashes is a slice, band{i} u64 with owner{i} u32 (document within the part), key{i} u64 (the low halves again)
with key_owner{i} u32. Meta: counts of each piece, causes and first examples of bad and filtered lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.dedup import lines, minhash, shingles
from data_prep.dedup.lines import BadLineError, Block
from data_prep.dedup.plan import Plan, Settings
from data_prep.dedup.store import Writer, replacing

SEGMENT = 1 << 16  # documents
SHOWN = 5  # bad lines kept word for word


class PieceReader:
    """Documents of one piece, block by block, and the account of its other lines."""

    def __init__(self, path: Path, key: str, settings: Settings):
        self.path, self.key, self.filters = path, key, settings.filters
        self.counts: dict[str, Any] = {"lines": 0, "documents": 0, "blank": 0, "text_bytes": 0}
        self.bad: list[tuple[int, str]] = []  # (line in the piece, cause)
        self.filtered: list[tuple[int, str]] = []
        self.examples: list[tuple[int, str]] = []

    def documents(self, block: Block) -> tuple[list[int], list[str]]:
        """(line in the piece, text) of a block's documents, as two lists."""
        numbers: list[int] = []
        texts: list[str] = []
        if block.overlong:
            self.counts["lines"] += 1
            self._reject(block.line, BadLineError("line too long", f"{block.overlong:,} bytes"))
            return numbers, texts
        self.counts["lines"] += block.count
        filters, key, read_text = self.filters, self.key, lines.read_text
        if not filters.active and (whole := lines.read_texts(block, key)):
            self.counts["documents"] += block.count
            return list(range(block.line, block.line + block.count)), whole
        found = lines.split(block.data)
        record: Any = None
        for number, line in enumerate(found, block.line):
            try:
                if filters.needs_record:
                    record = lines.parse(line)
                    text = lines.text_of(record, key)
                else:
                    text = read_text(line, key)
            except BadLineError as error:
                if not line or line.isspace():
                    self.counts["blank"] += 1
                else:
                    self._reject(number, error)
                continue
            if filters.active and (cause := filters.reject(text, record)):
                self.filtered.append((number, cause))
                continue
            numbers.append(number)
            texts.append(text)
        self.counts["documents"] += len(texts)
        return numbers, texts

    def _reject(self, number: int, error: BadLineError) -> None:
        self.bad.append((number, error.cause))
        if len(self.examples) < SHOWN:
            self.examples.append((number, f"{error.cause}{f' ({error.detail})' if error.detail else ''}"))


def read_piece(plan: Plan, task: int, index: int) -> Iterator[tuple[PieceReader, list[int], list[str]]]:
    """Blocks of a piece's documents, with the reader that counts them; at least one, which may be empty."""
    piece = plan.tasks[task][index]
    path = plan.files[piece.file].path
    reader = PieceReader(path, lines.find_key(path, plan.settings.key), plan.settings)
    yield reader, [], []
    for block in lines.read_blocks(path, piece.start, piece.end):
        yield reader, *reader.documents(block)


class _Segments:
    """Collects blocks of documents and writes a segment when there are enough."""

    def __init__(self, writer: Writer):
        self.writer, self.count, self.first = writer, 0, 0
        self.sizes: list[int] = []
        self._reset()

    def _reset(self) -> None:
        self.lines: list[int] = []
        self.texts: list[bytes] = []  # 16-byte hashes
        self.bands: list[shingles.U64] = []
        self.owners: list[Any] = []

    def flush(self) -> None:
        if not self.lines:
            return
        i, add = len(self.sizes), self.writer.add
        text = np.frombuffer(b"".join(self.texts), dtype="<u8").reshape(-1, 2)
        order = np.argsort(text[:, 0])
        add(f"line{i}", np.array(self.lines, dtype=np.uint32))
        add(f"low{i}", text[:, 0])
        add(f"high{i}", text[:, 1])
        add(f"key{i}", text[order, 0])
        add(f"key_owner{i}", (order + self.first).astype(np.uint32))
        if self.bands:
            bands, owners = np.concatenate(self.bands), np.concatenate(self.owners)
            order = np.argsort(bands)
            add(f"band{i}", bands[order])
            add(f"owner{i}", owners[order])
        self.sizes.append(len(self.lines))
        self.first += len(self.lines)
        self._reset()


def _text_hashes(texts: list[bytes], settings: Settings) -> list[bytes]:
    return [xxhash.xxh3_128_digest(t) for t in (shingles.token_streams(texts) if settings.exact == "tokens" else texts)]


def make_signatures(plan: Plan, task: int) -> None:
    """Write the part's file."""
    settings = plan.settings
    pieces: list[dict[str, Any]] = []
    with replacing(plan.signature_file(task)) as file:
        writer = Writer(file)
        segments = _Segments(writer)
        documents = 0
        for index, piece in enumerate(plan.tasks[task]):
            for reader, numbers, texts in read_piece(plan, task, index):  # noqa: B007
                if not texts:
                    continue
                segments.lines += numbers
                data = shingles.encoded(texts)
                segments.texts += _text_hashes(data, settings)
                if settings.near:
                    hashes, counts = shingles.shingle(data, settings.ngram, settings.unit)
                    signature = minhash.signatures(hashes, counts, settings.bands * settings.rows)
                    some = np.flatnonzero(counts)
                    bands = minhash.band_hashes(signature[some], settings.bands, settings.rows)
                    segments.bands.append(bands.reshape(-1))
                    segments.owners.append(np.repeat((some + documents).astype(np.uint32), settings.bands))
                documents += len(texts)
                if len(segments.lines) >= SEGMENT:
                    segments.flush()
            for kind, found in (("bad", reader.bad), ("filtered", reader.filtered)):
                causes = {cause: number for number, cause in enumerate(dict.fromkeys(c for _, c in found))}
                writer.add(f"{kind}_line{index}", np.array([line for line, _ in found], dtype=np.uint32))
                writer.add(f"{kind}_cause{index}", np.array([causes[cause] for _, cause in found], dtype=np.uint16))
                reader.counts[kind] = len(found)
                count = Counter(cause for _, cause in found)
                reader.counts[f"{kind}_causes"] = [[cause, count[cause]] for cause in causes]
            pieces.append({"file": piece.file, **reader.counts, "examples": reader.examples})
        segments.flush()
        writer.end({"pieces": pieces, "segments": segments.sizes, "documents": documents})
