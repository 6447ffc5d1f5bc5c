"""Third and fourth stage: sets of shingles of the candidates, and the exact comparison, in the order of documents."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup.candidates import catalogue, starts_of
from data_prep.dedup.plan import Plan
from data_prep.dedup.shingles import U64, jaccard, shingle_sets
from data_prep.dedup.signatures import read_piece
from data_prep.dedup.store import Reader, Writer, replacing, write_arrays

FLAGS = 1 << 20  # bytes of the table for the quick bound
FEW = 3  # candidates that are compared without the bound
AT_ONCE = 64  # candidates bounded in one go


def make_shingles(plan: Plan, task: int) -> None:
    """Write the sets of shingles of the part's candidates: value{i} u64, size{i} u32 for each block of documents."""
    members = Reader(plan.candidates / "members")
    start = members["start"]
    wanted = members["candidate"][start[task] : start[task + 1]].astype(np.int64) - catalogue(plan).part_first[task]
    blocks, at, document = 0, 0, 0
    with replacing(plan.shingle_file(task)) as file:
        writer = Writer(file)
        for index in range(len(plan.tasks[task])):
            if at == len(wanted):
                break
            for _, _, texts in read_piece(plan, task, index):
                end = int(np.searchsorted(wanted, document + len(texts)))
                chosen = [texts[i - document] for i in wanted[at:end].tolist()]
                document += len(texts)
                if not chosen:
                    continue
                at = end
                sets = shingle_sets(chosen, plan.settings.ngram, plan.settings.unit)
                writer.add(f"value{blocks}", np.concatenate(sets))
                writer.add(f"size{blocks}", np.array([len(one) for one in sets], dtype=np.uint32))
                blocks += 1
        writer.end({"blocks": blocks})


class Shingles:
    """The candidates' sets of shingles, mapped from the files of all parts."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.start = Reader(plan.candidates / "members")["start"].astype(np.int64)
        self._parts: dict[int, Any] = {}

    def __getitem__(self, candidate: int) -> U64:
        part = int(np.searchsorted(self.start, candidate, side="right")) - 1
        if part not in self._parts:
            reader = Reader(self.plan.shingle_file(part))
            blocks = range(reader.meta["blocks"])
            sizes = [reader[f"size{i}"] for i in blocks]
            ends = [starts_of(size) for size in sizes]
            self._parts[part] = starts_of([len(size) for size in sizes]), ends, [reader[f"value{i}"] for i in blocks]
        first, ends, values = self._parts[part]
        local = candidate - int(self.start[part])
        block = int(first.searchsorted(local, side="right")) - 1
        local -= int(first[block])
        found: U64 = values[block][ends[block][local] : ends[block][local + 1]]
        return found


@lru_cache(maxsize=1)
def _shingles(plan: Plan) -> Shingles:
    return Shingles(plan)


class Judge:
    """Finds the earliest of some kept candidates that is similar enough to a document."""

    def __init__(self, shingles: Shingles, threshold: float):
        self.shingles, self.threshold = shingles, threshold
        self._flags = np.zeros(FLAGS, dtype=np.uint8)
        self.compared = 0

    def __call__(self, own: U64, others: list[int]) -> tuple[int, float] | None:
        """The first of `others` (ascending) whose similarity is at least the threshold, with it."""
        if len(others) <= FEW:
            return self._first(own, others)
        bits = (own & np.uint64(FLAGS - 1)).astype(np.int64)
        self._flags[bits] = 1
        try:
            for at in range(0, len(others), AT_ONCE):
                few = others[at : at + AT_ONCE]
                if found := self._first(own, self._possible(own, few)):
                    return found
        finally:
            self._flags[bits] = 0
        return None

    def _first(self, own: U64, others: list[int]) -> tuple[int, float] | None:
        for other in others:
            theirs = self.shingles[other]
            if min(len(own), len(theirs)) < self.threshold * max(len(own), len(theirs)):
                continue  # similarity is at most the smaller over the larger
            self.compared += 1
            value = jaccard(own, theirs)
            if value >= self.threshold:
                return other, value
        return None

    def _possible(self, own: U64, others: list[int]) -> list[int]:
        """Those that may be similar: shared low 20 bits are at least as many as shared shingles, never fewer."""
        sets = [self.shingles[other] for other in others]
        size = np.array([len(one) for one in sets])
        flat = np.concatenate(sets)
        hits = self._flags[(flat & np.uint64(FLAGS - 1)).astype(np.int64)]
        shared = np.minimum(np.add.reduceat(hits, starts_of(size)[:-1], dtype=np.int64), len(own))
        keep = shared >= self.threshold * (len(own) + size - shared) * (1 - 1e-12)
        return [other for other, may in zip(others, keep.tolist(), strict=True) if may]


def verify(plan: Plan, task: int) -> None:
    """Go through the task's documents in order: removed (candidate's place), kept, jaccard, where it is similar."""
    settings = plan.settings
    document, bucket = _memberships(plan, task)
    order = np.lexsort((bucket, document))
    document, bucket = document[order], bucket[order]
    begin = np.flatnonzero(np.concatenate([[True], document[1:] != document[:-1]]))
    end = np.append(begin[1:], len(document))
    shingles = _shingles(plan)
    judge = Judge(shingles, settings.threshold)
    stays: list[list[int]] = [[] for _ in range(int(bucket.max()) + 1)]
    removed: list[tuple[int, int, float]] = []
    limited = 0
    for candidate, a, b in zip(document[begin].tolist(), begin.tolist(), end.tolist(), strict=True):
        mine = bucket[a:b].tolist()
        others = set[int]().union(*(stays[number] for number in mine))
        found = judge(shingles[candidate], sorted(others)) if others else None
        if found:
            removed.append((candidate, *found))
            continue
        full = False
        for number in mine:
            if len(stays[number]) < settings.max_bucket:
                stays[number].append(candidate)
            else:
                full = True
        limited += full
    write_arrays(
        plan.verify_file(task),
        {"compared": judge.compared, "limited": limited},
        removed=np.array([one for one, _, _ in removed], dtype=np.int64),
        kept=np.array([one for _, one, _ in removed], dtype=np.int64),
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
