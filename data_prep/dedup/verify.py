"""Third and fourth stage: sets of shingles of the candidates, and the exact comparison, in the order of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup import lines
from data_prep.dedup.candidates import catalogue, starts_of
from data_prep.dedup.plan import Piece, Plan
from data_prep.dedup.shingles import U64, flat_sets, jaccard
from data_prep.dedup.store import Reader, Writer, replacing, write_arrays

FLAGS = 1 << 20  # bytes of the table for the quick bound
FEW = 3  # candidates that are compared without the bound
AT_ONCE = 64  # candidates bounded in one go


def make_shingles(plan: Plan, task: int) -> None:
    """Write the sets of shingles of the part's candidates, end to end: value u64, start u64 (one more than sets).

    Only their lines are parsed; which ones they are is known.
    """
    members, known = Reader(plan.candidates / "members"), catalogue(plan)
    first, last = members["start"][task : task + 2].tolist()
    documents = members["candidate"][first:last].astype(np.int64)
    line_of = Reader(plan.candidates / "documents")["line"][documents].astype(np.int64)
    before = sum(len(pieces) for pieces in plan.tasks[:task])
    ends = np.searchsorted(documents, known.piece_first[before + 1 : before + 1 + len(plan.tasks[task])])
    sizes: list[int] = []
    with replacing(plan.shingle_file(task)) as file:
        writer = Writer(file)
        writer.add("value", np.empty(0, dtype=np.uint64))
        begin = 0
        for piece, end in zip(plan.tasks[task], ends.tolist(), strict=True):
            wanted, begin = line_of[begin:end], end
            for texts in _texts(plan, piece, wanted):
                values, counts = flat_sets(texts, plan.settings.ngram, plan.settings.unit)
                writer.add("value", values)
                sizes += counts.tolist()
        writer.add("start", starts_of(sizes))
        writer.end()


def _texts(plan: Plan, piece: Piece, wanted: NDArray[np.int64]) -> Iterator[list[str]]:
    """The texts of these lines of a piece, a block's at a time."""
    if not len(wanted):
        return
    path = plan.files[piece.file].path
    key = lines.find_key(path, plan.settings.key)
    for block in lines.read_blocks(path, piece.start, piece.end):
        a, b = np.searchsorted(wanted, [block.line, block.line + block.count]).tolist()
        if a < b:
            found = lines.split(block.data)
            yield [lines.read_text(found[i], key) for i in (wanted[a:b] - block.line).tolist()]
        if b == len(wanted):
            return


class Shingles:
    """The sets of shingles of some candidates (their places, ascending), mapped from the files of the parts."""

    def __init__(self, plan: Plan, places: NDArray[np.int64]):
        first = Reader(plan.candidates / "members")["start"].astype(np.int64)
        part_of = np.searchsorted(first, places, side="right") - 1
        begin, end = np.empty_like(places), np.empty_like(places)
        self._values: list[U64] = []
        self._part = np.empty_like(places)
        for number, part in enumerate(np.unique(part_of).tolist()):
            reader = _shingle_file(plan, part)
            own = np.flatnonzero(part_of == part)
            local = places[own] - first[part]
            start = reader["start"]
            begin[own], end[own], self._part[own] = start[local], start[local + 1], number
            self._values.append(reader["value"])
        self.sizes: list[int] = (end - begin).tolist()
        self._where = list(zip(self._part.tolist(), begin.tolist(), end.tolist(), strict=True))

    def __getitem__(self, index: int) -> U64:
        part, begin, end = self._where[index]
        return self._values[part][begin:end]


@lru_cache(maxsize=4096)
def _shingle_file(plan: Plan, part: int) -> Reader:
    return Reader(plan.shingle_file(part))


class Judge:
    """Compares a document with those that stay in its buckets."""

    def __init__(self, shingles: Shingles, threshold: float):
        self.shingles, self.threshold = shingles, threshold
        self._flags = np.zeros(FLAGS, dtype=np.uint8)
        self.compared = 0

    def __call__(self, index: int, buckets: list[list[int]]) -> tuple[int, float] | None:
        """Which document in these buckets is similar enough to the one at `index`, and how similar.

        The one that shares most bands is looked at first, being most likely; then all, the earliest first.
        """
        if not any(buckets):
            return None
        sizes = self.shingles.sizes
        size = sizes[index]
        low, high = size * self.threshold * (1 - 1e-12), size / self.threshold * (1 + 1e-12)
        shared = Counter(chain.from_iterable(buckets))
        fit = sorted(other for other in shared if low <= sizes[other] <= high)  # it is at most smaller over larger
        if not fit:
            return None
        own = self.shingles[index]
        likely = max(fit, key=shared.__getitem__)  # the earliest of equals
        if found := self._first(own, [likely]):
            return found
        fit.remove(likely)
        if len(fit) <= FEW:
            return self._first(own, fit)
        bits = own.view(np.int64) & (FLAGS - 1)
        self._flags[bits] = 1
        try:
            for at in range(0, len(fit), AT_ONCE):
                if found := self._first(own, self._possible(own, fit[at : at + AT_ONCE])):
                    return found
        finally:
            self._flags[bits] = 0
        return None

    def _first(self, own: U64, others: list[int]) -> tuple[int, float] | None:
        for other in others:
            self.compared += 1
            value = jaccard(own, self.shingles[other])
            if value >= self.threshold:
                return other, value
        return None

    def _possible(self, own: U64, others: list[int]) -> list[int]:
        """Those that may be similar: shared low 20 bits are at least as many as shared shingles, never fewer."""
        size = np.array([self.shingles.sizes[other] for other in others])
        flat = np.concatenate([self.shingles[other] for other in others])
        hits = self._flags[flat.view(np.int64) & (FLAGS - 1)]
        shared = np.minimum(np.add.reduceat(hits, starts_of(size)[:-1], dtype=np.int64), len(own))
        keep = shared >= self.threshold * (len(own) + size - shared) * (1 - 1e-12)
        return [other for other, may in zip(others, keep.tolist(), strict=True) if may]


def verify(plan: Plan, task: int) -> None:
    """Go through the task's documents in order: removed (candidate's place), kept, jaccard, where it is similar."""
    settings = plan.settings
    place, bucket = _memberships(plan, task)
    order = np.lexsort((bucket, place))
    place, bucket = place[order], bucket[order]
    begin = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
    places = place[begin]
    judge = Judge(Shingles(plan, places), settings.threshold)
    stays: list[list[int]] = [[] for _ in range(int(bucket.max()) + 1)]
    removed: list[tuple[int, int, float]] = []
    limited = 0
    for index, (a, b) in enumerate(zip(begin.tolist(), [*begin[1:].tolist(), len(place)], strict=True)):
        mine = bucket[a:b].tolist()
        if found := judge(index, [stays[number] for number in mine]):
            removed.append((index, *found))
            continue
        full = False
        for number in mine:
            if len(stays[number]) < settings.max_bucket:
                stays[number].append(index)
            else:
                full = True
        limited += full
    write_arrays(
        plan.verify_file(task),
        {"compared": judge.compared, "limited": limited},
        removed=places[np.array([one for one, _, _ in removed], dtype=np.int64)],
        kept=places[np.array([one for _, one, _ in removed], dtype=np.int64)],
        jaccard=np.array([value for _, _, value in removed], dtype=np.float64),
    )


def _memberships(plan: Plan, task: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(candidate's place, bucket) of the task, from all partitions."""
    documents, buckets, count = [], [], 0
    for partition in range(Reader(plan.candidates / "members").meta["partitions"]):
        reader = Reader(plan.candidates / f"buckets-{partition:06d}")
        groups, entries = (reader[name][task : task + 2].tolist() for name in ("groups", "entries"))
        size = reader["size"][groups[0] : groups[1]]
        documents.append(reader["member"][entries[0] : entries[1]].astype(np.int64))
        buckets.append(np.repeat(np.arange(count, count + len(size)), size))
        count += len(size)
    return np.concatenate(documents), np.concatenate(buckets)


def decide(plan: Plan, tasks: range) -> None:
    """All verify tasks together: removed, kept u64 (documents, ascending by removed), jaccard, exact (bool)."""
    candidate = Reader(plan.candidates / "members")["candidate"]
    first = Reader(plan.candidates / "documents")["first"]
    parts = [Reader(plan.verify_file(task)) for task in tasks]
    totals: Counter[str] = Counter()
    for part in parts:
        totals.update(part.meta)
    near = candidate[np.concatenate([part["removed"] for part in parts])] if parts else np.empty(0, np.uint64)
    kept = candidate[np.concatenate([part["kept"] for part in parts])] if parts else np.empty(0, np.uint64)
    value = np.concatenate([part["jaccard"] for part in parts]) if parts else np.empty(0, np.float64)
    order = np.argsort(near)
    near, kept, value = near[order], kept[order], value[order]
    copies = np.concatenate(
        [
            np.flatnonzero(first[a : a + (1 << 22)] != np.arange(a, min(len(first), a + (1 << 22)), dtype=np.uint64))
            + a
            for a in range(0, len(first), 1 << 22)
        ]
    ).astype(np.uint64)
    original = first[copies]
    # a copy of a text that went as a near duplicate is near to the same document
    at = np.searchsorted(near, original)
    went = np.zeros(len(original), dtype=bool)
    if len(near):
        at[at == len(near)] = 0
        went = near[at] == original
        original[went] = kept[at[went]]
    copy_value = np.ones(len(copies))
    copy_value[went] = value[at[went]]
    removed = np.concatenate([near, copies])
    order = np.argsort(removed)
    exact = np.concatenate([np.zeros(len(near), dtype=bool), ~went])
    write_arrays(
        plan.decisions,
        dict(totals),
        removed=removed[order],
        kept=np.concatenate([kept, original])[order],
        jaccard=np.concatenate([value, copy_value])[order],
        exact=exact[order],
        copy=np.concatenate([np.zeros(len(near), dtype=bool), np.ones(len(copies), dtype=bool)])[order],
    )
