"""The checks of one token file: its index against itself and the data, every id, every document's end, digests.

Everything is read in blocks, by threads, through pread: a disk that fails is a fault with a place, and memory is a few
buffers a thread whatever the size. Faults are collected, the first ones in words.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.index_format import HEADER, Header, check_lengths, falling, read_header
from data_prep.placed import CHUNK, Digests
from data_prep.ranges import TASK, RangeFile, in_order

SHOWN = 20  # faults in words; the others are counted
HOLE = 1 << 26  # ids of a hole looked at together


class Rules(NamedTuple):
    """What must hold of the ids. None or False: not known, or not asked for.

    ends, begins: each document that has tokens ends with `eod`, begins with `bos`. plain: they stand nowhere else.
    """

    vocab_size: int | None = None
    eod: int | None = None
    bos: int | None = None
    ends: bool = False
    begins: bool = False
    plain: bool = False

    @classmethod
    def of(cls, meta: dict[str, Any], vocab_size: int | None = None) -> Rules:
        """The rules that a meta.json tells; `vocab_size` counts before its own."""
        noted, eod, bos = (
            value if type(value := meta.get(key)) is int else None for key in ("vocab_size", "eod", "bos")
        )
        return cls(
            noted if vocab_size is None else vocab_size,
            eod,
            bos,
            ends=eod is not None and meta.get("append_eod") is True,
            begins=bos is not None and meta.get("prepend_bos") is True,
            # In files of others, control ids may stand where they like.
            plain="append_eod" in meta and not meta.get("parse_special"),
        )


@dataclass
class Report:
    """What was found. faults: the first ones; fault_count: all. skipped: what could not be checked, and why."""

    prefix: str
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    checked: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0

    @property
    def ok(self) -> bool:
        return not self.fault_count

    def fault(self, text: str, count: int = 1) -> None:
        self.fault_count += count
        if count and len(self.faults) < SHOWN:
            self.faults.append(text)

    def add(self, other: Report) -> None:
        """The findings of a part."""
        self.documents, self.sequences = self.documents + other.documents, self.sequences + other.sequences
        self.tokens, self.fault_count = self.tokens + other.tokens, self.fault_count + other.fault_count
        self.faults += other.faults[: SHOWN - len(self.faults)]


class _Index:
    """A checked index, for finding what lies where: lists that are searched without being read."""

    def __init__(self, prefix: str, header: Header, tokens: int):
        raw = np.memmap(f"{prefix}.idx", dtype=np.uint8, mode="r")
        self.pointers: NDArray[np.int64] = np.frombuffer(raw, "<i8", header.sequences, header.pointers_at)
        self.documents: NDArray[np.int64] = np.frombuffer(raw, "<i8", header.documents + 1, header.documents_at)
        self.tokens, self.itemsize = tokens, header.dtype.itemsize

    def place(self, token: int) -> str:
        sequence = bisect_right(self.pointers, token * self.itemsize) - 1
        return f"sequence {sequence}, token {token - int(self.pointers[sequence]) // self.itemsize}"

    def borders(self, begin: int, end: int) -> NDArray[np.int64]:
        """Token numbers in begin..end, both included, where a document begins or the last one ends; rising.

        bisect, since numpy's searchsorted would copy all of an array that is not aligned, as those of .idx are not.
        """
        sequences = len(self.pointers)
        low = bisect_left(self.pointers, begin * self.itemsize)
        high = bisect_right(self.pointers, end * self.itemsize) + (end >= self.tokens)
        entries = np.unique(self.documents[bisect_left(self.documents, low) : bisect_left(self.documents, high)])
        inside = entries[entries < sequences]
        found = self.pointers[inside] // self.itemsize
        if len(inside) < len(entries):
            found = np.append(found, self.tokens)
        return np.unique(found)


def _check_index(prefix: str, header: Header, report: Report) -> int | None:
    """Every entry of the index; the tokens it tells of, or None where it cannot be relied on."""
    itemsize, tokens, before = header.dtype.itemsize, 0, report.fault_count
    with RangeFile(f"{prefix}.idx") as file:
        for start in range(0, header.sequences, CHUNK):
            count = min(CHUNK, header.sequences - start)
            lengths = file.array("<i4", count, HEADER.size + 4 * start)
            pointers = file.array("<i8", count, header.pointers_at + 8 * start)
            tokens, cause = check_lengths(lengths, pointers, start, tokens, itemsize)
            if cause:
                report.fault(f"{prefix}.idx {cause}")
                break  # the sum is wrong from here on
        last = 0
        for start in range(0, header.documents + 1, CHUNK):
            entries = file.array("<i8", min(CHUNK, header.documents + 1 - start), header.documents_at + 8 * start)
            falls = np.flatnonzero(falling(np.append(np.int64(last), entries)))
            if start == 0 and entries[0] != 0:
                report.fault(f"{prefix}.idx begins its documents at sequence {entries[0]}, and not at 0")
            elif falls.size:
                report.fault(f"{prefix}.idx ends document {start + int(falls[0]) - 1} before it begins", falls.size)
            last = int(entries[-1])
        if last != header.sequences:
            report.fault(f"{prefix}.idx ends its documents at sequence {last}, and it has {header.sequences}")
    return tokens if report.fault_count == before else None


class _Pair:
    """One token file and how it is checked."""

    def __init__(self, prefix: str, rules: Rules, digests: Digests, report: Report):
        self.prefix, self.rules, self.digests, self.report = prefix, rules, digests, report

    def check(self, workers: int, update: Callable[[int], None]) -> None:
        """All but the look at text. Raises UserError where the pair cannot be opened, OSError where not be read."""
        report = self.report
        self.header = header = read_header(self.prefix)
        report.documents, report.sequences = header.documents, header.sequences
        tokens = _check_index(self.prefix, header, report)
        if self.digests[1]:
            with RangeFile(f"{self.prefix}.idx") as file:
                hasher = xxhash.xxh3_128()
                file.hash_into(hasher, 0, file.size)
            self._compare("idx", hasher, self.digests[1])
        with RangeFile(f"{self.prefix}.bin") as self.file:
            size, itemsize = self.file.size, header.dtype.itemsize
            report.tokens = size // itemsize
            if tokens is not None and tokens * itemsize != size:
                report.fault(f"{self.prefix}.bin has {size:,} bytes, where its index promises {tokens * itemsize:,}")
                tokens = None
            self.index = None if tokens is None or not header.sequences else _Index(self.prefix, header, tokens)
            whole = xxhash.xxh3_128() if self.digests[0] else None
            step = max(1, TASK // itemsize) * itemsize
            tasks = ((at, min(at + step, size)) for at in range(0, size, step))
            for (begin, end), faults in in_order(self._check_range, tasks, workers):
                for fault in faults:
                    report.fault(*fault)
                if whole is not None:
                    self.file.hash_into(whole, begin, end)
                update(end - begin)
            if whole is not None:
                self._compare("bin", whole, self.digests[0])

    def _compare(self, kind: str, hasher: xxhash.xxh3_128, recorded: str | None) -> None:
        if (found := hasher.hexdigest()) != recorded:
            self.report.fault(f"{self.prefix}.{kind} is not what was written: its xxh3 is {found}, not {recorded}")

    def _check_range(self, task: tuple[int, int]) -> list[tuple[str, int]]:
        """Faults of bytes begin..end of the data, each with how often it is there."""
        dtype = self.header.dtype
        faults: list[tuple[str, int]] = []
        if dtype.kind not in "iu":
            return [(f"{self.prefix}.idx says that ids are of type {dtype}, which is for no vocabulary", 1)][task[0] :]
        # Blocks hold whole ids: where holes begin and end is a multiple of any id's size too.
        for at, count, content in self.file.blocks(*task):
            first, length = at // dtype.itemsize, count // dtype.itemsize
            if content is not None:
                faults += self._check_block(np.frombuffer(content, dtype, length), first)
            else:
                for begin in range(first, first + length, HOLE):
                    zeros = np.broadcast_to(np.zeros(1, dtype), min(HOLE, first + length - begin))
                    faults += self._check_block(zeros, begin)
        return faults

    def _check_block(self, ids: NDArray[Any], first: int) -> Iterator[tuple[str, int]]:
        """Faults of ids that begin with token `first`; those of a hole are one zero, repeated by a stride of 0."""
        rules, last = self.rules, first + len(ids)
        if not len(ids):
            return
        seen = ids if ids.strides[0] else ids[:1]
        if rules.vocab_size is not None and (int(seen.min()) < 0 or int(seen.max()) >= rules.vocab_size):
            wrong = np.flatnonzero((ids < 0) | (ids >= rules.vocab_size))
            told = f"holds id {ids[wrong[0]]}, outside 0..{rules.vocab_size - 1}"
            yield self._at(first + int(wrong[0]), told), len(wrong)
        if self.index is None or not (rules.ends or rules.begins or rules.plain):
            return
        borders = self.index.borders(first, last) - first
        yield from self._check_control(ids, first, borders[borders > 0] - 1, rules.eod, rules.ends, "end")
        yield from self._check_control(ids, first, borders[borders < len(ids)], rules.bos, rules.begins, "begin")

    def _check_control(
        self, ids: NDArray[Any], first: int, places: NDArray[np.int64], control: int | None, must: bool, what: str
    ) -> Iterator[tuple[str, int]]:
        """`control` stands at all `places` if it must, and nowhere else if text is plain."""
        if control is None:
            return
        if must:
            missing = places[ids[places] != control]
            if missing.size:
                told = f"{what}s a document with id {ids[missing[0]]}, and not with {control}"
                yield self._at(first + int(missing[0]), told), missing.size
        if not self.rules.plain or (not ids.strides[0] and ids[0] != control):
            return
        found = ids == control
        if must:
            found[places] = False
        if found.any():
            stray = np.flatnonzero(found)
            told = f"holds the control id {control} where no document {what}s"
            yield self._at(first + int(stray[0]), told), stray.size

    def _at(self, token: int, told: str) -> str:
        place = "" if self.index is None else f"{self.index.place(token)}, "
        return f"{self.prefix}.bin {told} ({place}byte {token * self.header.dtype.itemsize})"


def check_pair(
    prefix: str, rules: Rules, digests: Digests, workers: int = 1, update: Callable[[int], None] = lambda _: None
) -> Report:
    report = Report(prefix)
    try:
        _Pair(prefix, rules, digests, report).check(workers, update)
    except UserError as error:
        report.fault(str(error))
    except OSError as error:
        report.fault(f"{error.filename or prefix}: {error.strerror}")
    return report
