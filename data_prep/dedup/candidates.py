"""Second stage: all hashes sorted, a range of them at a time: exact duplicates, buckets, and what hangs together.

Documents have numbers over the whole input. The folder of this stage, which appears whole, holds:

    documents       line u32 (number in the file's piece), first u64: the earlier document of the same text, or itself
    members         candidate u64: documents in a bucket, ascending; start u64: where each part's begin among them
    buckets-000000  groups of candidates that share a band: size, member i64 (candidate's place, ascending in a
                    group), ordered by the verify task they belong to; groups, entries: where a task's begin

Documents of buckets that share documents belong to one verify task: what one decides depends on the others. Memory is
that of one partition for each worker, and here a byte for each document and 40 for each one in a bucket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.plan import Plan
from data_prep.dedup.pool import Pool
from data_prep.dedup.shingles import U64
from data_prep.dedup.store import Reader, replacing, write_arrays
from data_prep.errors import UserError

TASK_ENTRIES = 1 << 19  # memberships of one verify task, unless more hang together
I64 = NDArray[np.int64]


class Catalogue:
    """All parts of the first stage together: counts, and which file, piece and line a document is."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.parts = [Reader(plan.signature_file(task)) for task in range(len(plan.tasks))]
        self.pieces: list[dict[str, Any]] = [piece for part in self.parts for piece in part.meta["pieces"]]
        self.part_first = starts_of([part.meta["documents"] for part in self.parts])
        self.piece_first = starts_of([piece["documents"] for piece in self.pieces])
        lines_of = np.zeros(len(plan.files) + 1, dtype=np.int64)
        before = []
        for piece in self.pieces:
            before.append(int(lines_of[piece["file"]]))
            lines_of[piece["file"]] += piece["lines"]
        self.lines_before = np.array(before, dtype=np.int64)  # of the file, before the piece
        self.piece_file = np.array([piece["file"] for piece in self.pieces], dtype=np.int64)
        self.documents = int(self.part_first[-1])

    def file_range(self, file: int) -> tuple[int, int]:
        """The documents of a file."""
        own = np.flatnonzero(self.piece_file == file)
        return int(self.piece_first[own[0]]), int(self.piece_first[own[-1] + 1])

    def place(self, documents: I64, line: NDArray[np.uint32]) -> tuple[I64, I64]:
        """File and line (from 1) of documents, whose lines within their pieces are `line`."""
        piece = np.searchsorted(self.piece_first, documents, side="right") - 1
        return self.piece_file[piece], self.lines_before[piece] + line

    def check_bad(self) -> None:
        """Raise UserError when too many lines are no documents."""
        lines = sum(piece["lines"] - piece["blank"] for piece in self.pieces)
        bad = sum(piece["bad"] for piece in self.pieces)
        allowed = self.plan.settings.max_bad
        if bad and bad > allowed * lines:
            causes: Counter[str] = Counter()
            for piece in self.pieces:
                causes.update(dict(piece["bad_causes"]))
            named = ", ".join(f"{count:,} × {cause}" for cause, count in causes.most_common())
            raise UserError(
                f"{bad:,} of {lines:,} lines are bad ({bad / lines:.2%}; --max-bad allows {allowed:.2%}): {named}. First:"
                f" {'; '.join(self.bad_examples())}. Repair the files, or allow it with"
                f" --max-bad {min(1.0, bad / lines + 5e-4):.3f}"
            )
        if not self.documents:
            raise UserError(
                f"{self.plan.files[0].path}: no document in {len(self.plan.files)} file(s); check the input"
            )

    def bad_examples(self, count: int = 5) -> list[str]:
        """The first bad lines as "file:line: cause"."""
        found = []
        for before, piece in zip(self.lines_before.tolist(), self.pieces, strict=True):
            path = self.plan.files[piece["file"]].path
            found += [f"{path}:{before + line}: {cause}" for line, cause in piece["examples"]]
            if len(found) >= count:
                break
        return found[:count]


@lru_cache(maxsize=1)
def catalogue(plan: Plan) -> Catalogue:
    """The catalogue, once in a process."""
    return Catalogue(plan)


def starts_of(sizes: Any) -> I64:
    """Where each of consecutive runs begins, and where the last ends."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(np.asarray(sizes, dtype=np.int64), out=starts[1:])
    return starts


def _partitions(entries: int, plan: Plan) -> int:
    return max(1, -(-entries // plan.settings.partition_entries))


def _slices(plan: Plan, hashes: str, owners: str, partition: int, partitions: int) -> tuple[U64, I64]:
    """Hashes of one of `partitions` equal ranges from all segments of all parts, and the documents they belong to."""
    low = partition * (1 << 64) // partitions
    high = (partition + 1) * (1 << 64) // partitions
    found_hashes, found_documents = [], []
    known = catalogue(plan)
    for part, first in zip(known.parts, known.part_first.tolist(), strict=False):
        for i in range(len(part.meta["segments"])):
            if f"{hashes}{i}" not in part:
                continue
            values = part[f"{hashes}{i}"]
            a = int(np.searchsorted(values, np.uint64(low)))
            b = len(values) if high >> 64 else int(np.searchsorted(values, np.uint64(high)))
            found_hashes.append(values[a:b])
            found_documents.append(part[f"{owners}{i}"][a:b].astype(np.int64) + first)
    if not found_hashes:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    return np.concatenate(found_hashes), np.concatenate(found_documents)


def find_exact(building: Path, plan: Plan, partition: int) -> None:
    """Later documents of equal text in a range of hashes: file exact-N of (document, first)."""
    known = catalogue(plan)
    low, document = _slices(plan, "key", "key_owner", partition, _partitions(known.documents, plan))
    order = np.argsort(low)
    low, document = low[order], document[order]
    twice = np.zeros(len(low), dtype=bool)
    twice[1:] = low[1:] == low[:-1]
    twice[:-1] |= twice[1:]
    low, document = low[twice], document[twice]
    high = _high(known, document)
    order = np.lexsort((document, high, low))
    low, high, document = low[order], high[order], document[order]
    begins = np.ones(len(low), dtype=bool)
    begins[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    first = document[begins][np.cumsum(begins) - 1] if len(low) else document
    write_arrays(building / f"exact-{partition:06d}", durable=False, document=document[~begins], first=first[~begins])


def _high(known: Catalogue, documents: I64) -> U64:
    """The upper half of the hash of each document's text."""
    result = np.empty(len(documents), dtype=np.uint64)
    part_of = np.searchsorted(known.part_first, documents, side="right") - 1
    for part in np.unique(part_of).tolist():
        own = np.flatnonzero(part_of == part)
        local = documents[own] - known.part_first[part]
        reader = known.parts[part]
        starts = starts_of(reader.meta["segments"])
        segment_of = np.searchsorted(starts, local, side="right") - 1
        for segment in np.unique(segment_of).tolist():
            chosen = segment_of == segment
            result[own[chosen]] = reader[f"high{segment}"][local[chosen] - starts[segment]]
    return result


def find_buckets(building: Path, plan: Plan, partition: int) -> None:
    """Groups of documents that share a band, in a range of hashes: file raw-N."""
    hashes, document = _slices(plan, "band", "owner", partition, _partitions(_band_entries(plan), plan))
    first = Reader(building / "documents")["first"]
    alive = first[document] == document.astype(np.uint64)
    hashes, document = hashes[alive], document[alive]
    order = np.argsort(hashes)
    hashes, document = hashes[order], document[order]
    begin = (
        np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.empty(0, np.int64)
    )
    size = np.diff(np.append(begin, len(hashes)))
    shared = np.repeat(size > 1, size)
    hashes, document = hashes[shared], document[shared]
    write_arrays(
        building / f"raw-{partition:06d}",
        durable=False,
        size=size[size > 1].astype(np.int64),
        member=document[np.lexsort((document, hashes))],
    )


def _band_entries(plan: Plan) -> int:
    known = catalogue(plan)
    return known.documents * plan.settings.bands if plan.settings.near else 0


def find_candidates(plan: Plan, pool: Pool) -> None:
    """The whole stage. Raises UserError when too many lines are bad."""
    known = catalogue(plan)
    known.check_bad()
    building = plan.candidates.with_name(f"{plan.candidates.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        partitions = range(_partitions(known.documents, plan))
        pool.run("exact", partial(find_exact, building), partitions)
        _write_documents(plan, known, building, partitions)
        partitions = range(_partitions(_band_entries(plan), plan)) if plan.settings.near else range(0)
        pool.run("buckets", partial(find_buckets, building), partitions)
        _join(plan, known, building, partitions)
        for path in [*building.glob("exact-*"), *building.glob("raw-*"), *building.glob("placed-*")]:
            path.unlink()
        with contextlib.suppress(OSError):  # another process has put its own, equal one there
            building.rename(plan.candidates)
        if not plan.candidates.is_dir():
            raise UserError(f"cannot write {plan.candidates}; free space there, or write elsewhere")
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_documents(plan: Plan, known: Catalogue, building: Path, partitions: range) -> None:
    """Line and first document of equal text, of every document; through a file map, not in memory."""
    path = building / "scratch"
    count = known.documents
    with replacing(path, durable=False) as file:
        file.truncate(count * 8)
    first = np.memmap(path, dtype=np.uint64, mode="r+", shape=(count,))
    for start in range(0, count, 1 << 20):
        first[start : start + (1 << 20)] = np.arange(start, min(count, start + (1 << 20)), dtype=np.uint64)
    for partition in partitions:
        found = Reader(building / f"exact-{partition:06d}")
        first[found["document"]] = found["first"]
    line = np.memmap(building / "scratch-line", dtype=np.uint32, mode="w+", shape=(count,))
    at = 0
    for part in known.parts:
        for i, size in enumerate(part.meta["segments"]):
            line[at : at + size] = part[f"line{i}"]
            at += size
    write_arrays(building / "documents", first=first, line=line)
    del first, line
    path.unlink()
    (building / "scratch-line").unlink()


def _join(plan: Plan, known: Catalogue, building: Path, partitions: range) -> None:
    """Number the candidates, find what hangs together, and order each partition's groups by verify task."""
    marked = np.zeros(known.documents, dtype=bool)
    for partition in partitions:
        marked[Reader(building / f"raw-{partition:06d}")["member"]] = True
    candidates = np.flatnonzero(marked).astype(np.uint64)
    del marked
    groups = []  # of each partition, mapped from the disk
    for partition in partitions:
        raw = Reader(building / f"raw-{partition:06d}")
        place = np.searchsorted(candidates, raw["member"].astype(np.uint64))
        write_arrays(building / f"placed-{partition:06d}", durable=False, member=place)
        groups.append((Reader(building / f"placed-{partition:06d}")["member"], raw["size"]))
    label = _components(len(candidates), groups)
    task_of, tasks = _spread(label, groups)
    for partition, (member, size) in zip(partitions, groups, strict=True):
        begin = starts_of(size)[:-1]
        task = task_of[member[begin]]
        order = np.argsort(task, kind="stable")
        sizes = size[order]
        index = np.repeat(begin[order] - starts_of(sizes)[:-1], sizes) + np.arange(int(sizes.sum()))
        cuts = np.searchsorted(task[order], np.arange(tasks + 1))
        write_arrays(
            building / f"buckets-{partition:06d}",
            size=sizes,
            member=member[index],
            groups=cuts,
            entries=starts_of(sizes)[cuts],
        )
    start = np.searchsorted(candidates, known.part_first.astype(np.uint64))
    meta = {"tasks": tasks, "partitions": len(partitions), "buckets": sum(len(size) for _, size in groups)}
    write_arrays(building / "members", meta, candidate=candidates, start=start)


def _components(count: int, groups: list[tuple[I64, I64]]) -> I64:
    """For each candidate the smallest one that it hangs together with, over groups (members end to end, sizes)."""
    label = np.arange(count, dtype=np.int64)
    changed = count > 0
    while changed:
        changed = False
        for member, size in groups:
            if not len(size):
                continue
            own = label[member]
            least = np.repeat(np.minimum.reduceat(own, starts_of(size)[:-1]), size)
            if (own != least).any():
                changed = True
                np.minimum.at(label, own, least)  # joins what the members hung together with before
                np.minimum.at(label, member, least)
        while True:
            next_label = label[label]
            if np.array_equal(next_label, label):
                break
            label = next_label
    return label


def _spread(label: I64, groups: list[tuple[I64, I64]]) -> tuple[I64, int]:
    """The verify task of each candidate, and how many tasks: whole components in order, up to a number of entries."""
    entries = np.zeros(len(label), dtype=np.int64)
    for member, _ in groups:
        entries += np.bincount(label[member], minlength=len(label))
    if not len(label):
        return label, 0
    before = np.cumsum(entries) - entries
    task = before // TASK_ENTRIES
    roots = label == np.arange(len(label))
    _, dense = np.unique(task[roots], return_inverse=True)
    task[roots] = dense
    return task[label], int(dense.max()) + 1
