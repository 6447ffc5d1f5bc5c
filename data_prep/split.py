"""One token file into several, by whole documents: by shares, by equal numbers of tokens, or by a hash of the number.

Two passes over the index in chunks of documents: the first counts what each output gets of each chunk, so that all
sizes and places are known; the second fills the outputs in parallel. Memory is one chunk a worker.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.index_format import HEADER, Header
from data_prep.indexed import IndexedDataset
from data_prep.joined import open_tokens
from data_prep.parts_file import read_meta
from data_prep.ranges import BUFFER, RangeFile, disk_errors, in_order
from data_prep.sized_pair import SizedPair, check_output

CHUNK = 1 << 16  # documents of a task: with a thousand tokens each 128 MB are copied
MOST = 1000  # outputs: each is two open files
# What still holds of a part of the documents.
KEPT = (
    "herd_version", "tokenizer", "tokenizer_sha256", "tokenizer_kind", "engine", "vocab_size", "bos", "eod",
    "append_eod", "prepend_bos", "parse_special", "key",
)  # fmt: skip

Label = Callable[[int, int], NDArray[np.int64]]
"""Which output each of the documents begin..end goes to."""


def by_shares(documents: int, shares: Sequence[float], seed: int | None = None) -> Label:
    """Documents by shares: one run after another, rounded as Megatron's --split; or, with a seed, each by its hash.

    A hash keeps to the shares on average only, but does not change for a document when others are added behind it.
    """
    edges = np.cumsum(np.array(shares, np.float64) / np.sum(shares))
    if seed is None:
        cuts = np.array([round(edge * float(documents)) for edge in edges[:-1].tolist()], np.int64)
        return lambda begin, end: np.searchsorted(cuts, np.arange(begin, end), side="right")
    return lambda begin, end: np.searchsorted(edges[:-1], hashed(begin, end, seed), side="right")


def hashed(begin: int, end: int, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each of the numbers begin..end: splitmix64 (Steele, Lea, Flood 2014) of seed and number."""
    numbers = np.arange(begin, end, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = _splitmix(np.array([seed % 2**64], np.uint64)) + numbers
        mixed = _splitmix(mixed * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _splitmix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def by_tokens(data: IndexedDataset, count: int) -> Label:
    """`count` runs of documents with as equal numbers of tokens as whole documents allow."""
    found = [_document_at(data, data.tokens * part // count) for part in range(1, count)]
    cuts = np.array(found, np.int64)
    return lambda begin, end: np.searchsorted(cuts, np.arange(begin, end), side="right")


def _document_at(data: IndexedDataset, token: int) -> int:
    """The document border that is nearest to a token. bisect, since the index is not aligned (see token_checks)."""
    sequence = bisect_left(data.pointers, token * data.dtype.itemsize)
    after = bisect_left(data.documents, sequence)
    before = max(0, after - 1)
    ends = [_token_at(data, int(data.documents[border])) for border in (before, after)]
    return before if token - ends[0] < ends[1] - token else after


def _token_at(data: IndexedDataset, sequence: int) -> int:
    """The number of the first token of a sequence; all tokens for the one behind the last."""
    return data.tokens if sequence == len(data) else int(data.pointers[sequence]) // data.dtype.itemsize


class _Chunk(NamedTuple):
    """Documents begin..end, and what each output has got before them: (outputs, 3) documents, sequences, tokens."""

    begin: int
    end: int
    before: NDArray[np.int64]


class _Splitter:
    """The plan of a split, and how a chunk of it is written."""

    def __init__(self, data: IndexedDataset, label: Label, count: int, workers: int):
        self.data, self.label, self.count = data, label, count
        self.chunks: list[_Chunk] = []
        before = np.zeros((count, 3), np.int64)
        number = len(data.documents) - 1
        ranges = ((at, min(at + CHUNK, number)) for at in range(0, number, CHUNK))
        for (begin, end), totals in in_order(self._count, ranges, workers):
            self.chunks.append(_Chunk(begin, end, before))
            before = before + totals
        self.totals = before

    def _sizes(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of documents begin..end: output, sequences and first token; one more of the last, where the next begins."""
        entries = self.data.documents[begin : end + 1]
        inside = np.minimum(entries, len(self.data) - 1) if len(self.data) else entries[:0]
        tokens = self.data.pointers[inside] // self.data.dtype.itemsize if len(self.data) else np.zeros_like(entries)
        return self.label(begin, end), np.diff(entries), np.where(entries < len(self.data), tokens, self.data.tokens)

    def _count(self, task: tuple[int, int]) -> NDArray[np.int64]:
        labels, sequences, tokens = self._sizes(*task)
        totals = np.zeros((self.count, 3), np.int64)
        for column, amounts in enumerate((np.ones_like(sequences), sequences, np.diff(tokens))):
            np.add.at(totals[:, column], labels, amounts)  # bincount's weights are floats
        return totals

    def write(self, chunk: _Chunk, outputs: Sequence[SizedPair]) -> int:
        """Write a chunk's share of each output; the bytes of its data."""
        labels, sequences, borders = self._sizes(chunk.begin, chunk.end)
        first = int(self.data.documents[chunk.begin])
        lengths = np.array(self.data.lengths[first : int(self.data.documents[chunk.end])])
        owner = np.repeat(labels, sequences)
        for number in np.unique(labels).tolist():
            documents_before, sequences_before, tokens_before = chunk.before[number].tolist()
            pair, mine = outputs[number], lengths[owner == number]
            pointers = tokens_before + np.cumsum(mine, dtype=np.int64) - mine
            ends = sequences_before + np.cumsum(sequences[labels == number])
            pair.idx.write(mine.astype("<i4"), HEADER.size + 4 * sequences_before)
            pair.idx.write(pointers * self.data.dtype.itemsize, pair.header.pointers_at + 8 * sequences_before)
            pair.idx.write(ends.astype("<i8"), pair.header.documents_at + 8 * (documents_before + 1))
        self._write_data(labels, borders, chunk.before[:, 2].copy(), outputs)
        return int(borders[-1] - borders[0]) * self.data.dtype.itemsize

    def _write_data(
        self,
        labels: NDArray[np.int64],
        borders: NDArray[np.int64],
        at: NDArray[np.int64],
        outputs: Sequence[SizedPair],
    ) -> None:
        """Copy the documents' tokens, from `at` on in each output: whole where all go to one, else block by block."""
        itemsize, begin, end = self.data.dtype.itemsize, int(borders[0]), int(borders[-1])
        if (labels == labels[0]).all():
            shift = int(at[labels[0]]) * itemsize
            for path, offset, count in self.data.pieces(begin * itemsize, end * itemsize):
                with RangeFile(path) as source:
                    source.copy_to(outputs[labels[0]].bin, shift, offset, offset + count)
                shift += count
            return
        done = begin
        for path, offset, count in self.data.pieces(begin * itemsize, end * itemsize):
            with RangeFile(path) as source:
                for place in range(offset, offset + count, BUFFER):
                    ids = source.array(self.data.dtype, min(BUFFER, offset + count - place) // itemsize, place)
                    # How many of these ids belong to each document: what lies of it in this block.
                    clipped = np.clip(borders, done, done + len(ids))
                    inside: NDArray[np.int64] = clipped[1:] - clipped[:-1]
                    owner = np.repeat(labels, inside)
                    for number in np.unique(labels[inside > 0]).tolist():
                        mine = ids[owner == number]
                        outputs[number].bin.write(mine, int(at[number]) * itemsize)
                        at[number] += len(mine)
                    done += len(ids)


def split(
    prefix: str | Path,
    outputs: Sequence[str | Path],
    *,
    shares: Sequence[float] | None = None,
    seed: int | None = None,
    workers: int = 1,
    overwrite: bool = False,
    update: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write the documents of PREFIX, or of the folder PREFIX.parts, to one token file an output, each with its meta.json.

    shares: of the documents, one an output; None: equal numbers of tokens. seed: spread documents by a hash of their
    number instead of in runs; their order stays. update: called with the bytes copied since its last call. Returns
    what the meta.jsons hold. Raises UserError for a missing or damaged file, shares that cannot be, an existing output.
    """
    names = [str(output) for output in outputs]
    if not 1 <= len(names) <= MOST or len(set(names)) < len(names):
        raise UserError(f"{len(names)} outputs, some with the same name or more than {MOST}; name each once", 2)
    if shares is not None and (
        len(shares) != len(names) or not all(0 <= share < float("inf") for share in shares) or not sum(shares)
    ):
        raise UserError(
            f"shares {list(shares)} for {len(names)} outputs; give one for each, not negative, not all 0", 2
        )
    for name in names:
        check_output(name, overwrite)
        if Path(f"{name}.bin").resolve() == Path(f"{prefix}.bin").resolve():
            raise UserError(f"{name} is both the input and an output; choose another output", 2)
    data, noted = open_tokens(prefix), read_meta(prefix) or {}
    number = len(data.documents) - 1
    if shares is None:
        label = by_tokens(data, len(names)) if seed is None else by_shares(number, [1.0] * len(names), seed)
    else:
        label = by_shares(number, shares, seed)
    plan = _Splitter(data, label, len(names), workers)
    metas = []
    with ExitStack() as stack, disk_errors(prefix):
        pairs = []
        for name, (documents, sequences, tokens) in zip(names, plan.totals.tolist(), strict=True):
            header = Header(data.dtype, sequences, documents)
            pairs.append(stack.enter_context(SizedPair(name, header, tokens * data.dtype.itemsize, overwrite)))
            metas.append(
                {key: noted[key] for key in KEPT if key in noted}
                | {"dtype": str(data.dtype), "documents": documents, "sequences": sequences, "tokens": tokens}
                | {"split_of": str(prefix), "split_fingerprint": data.fingerprint, "split_seed": seed}
            )
        for _, count in in_order(lambda chunk: plan.write(chunk, pairs), plan.chunks, workers):
            if update is not None:
                update(count)
        for pair, meta in zip(pairs, metas, strict=True):
            pair.finish(meta)
    return metas
