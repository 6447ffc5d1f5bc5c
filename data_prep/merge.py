"""Many token files into one: sizes are known from the headers, so the result is laid out and filled in parallel.

First all indices are checked and written at their places, then data is copied by ranges, while this thread follows
and hashes what was written, in order: a set whose recorded digest does not come out is named, and the result's own
digest is known at the end. Memory is a few buffers a worker and half a kilobyte a set, whatever they hold. The bytes
are those of one writer that got all documents, and of megatron-core's IndexedDatasetBuilder.add_index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_prep.errors import UserError
from data_prep.index_format import Header
from data_prep.parts_file import find_parts, read_meta, read_parts
from data_prep.placed import Digests, Placed, compare_digests, place, write_indices
from data_prep.ranges import TASK, RangeFile, disk_errors, hash_block, in_order
from data_prep.sets import combine_metas
from data_prep.sized_pair import SizedPair, check_output


@dataclass(frozen=True)
class Totals:
    """What a set holds. bin_xxh3, idx_xxh3: None where they were not asked for."""

    dtype: str
    documents: int
    sequences: int
    tokens: int
    bin_bytes: int
    bin_xxh3: str | None = None
    idx_xxh3: str | None = None

    def facts(self) -> dict[str, Any]:
        """As it stands in PREFIX.meta.json; what is not known is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Range(NamedTuple):
    """Bytes of a set's data that one task copies."""

    one: Placed
    begin: int
    end: int


def _ranges(placed: Iterable[Placed]) -> Iterator[_Range]:
    for one in placed:
        for begin in range(0, max(1, one.data_bytes), TASK):
            yield _Range(one, begin, min(begin + TASK, one.data_bytes))


def _copy_data(
    placed: Sequence[Placed], target: RangeFile, workers: int, hasher: xxhash.xxh3_128 | None
) -> Iterator[int]:
    """Copy all data, in parallel, and hash what came out, in order; yield the bytes of each range."""

    def copy(task: _Range) -> None:
        if task.end > task.begin:
            with RangeFile(f"{task.one.prefix}.bin") as source:
                source.copy_to(target, task.one.byte + task.begin, task.begin, task.end)

    own = xxhash.xxh3_128()
    for task, _ in in_order(copy, _ranges(placed), workers):
        one, recorded = task.one, task.one.digests[0]
        wanted = [each for each in (hasher, own if recorded else None) if each is not None]
        if wanted:
            for _, count, content in target.blocks(one.byte + task.begin, one.byte + task.end):
                for each in wanted:
                    hash_block(each, count, content)
        if recorded and task.end == one.data_bytes:
            compare_digests(f"{one.prefix}.bin", own.hexdigest(), recorded)
            own.reset()
        if task.end > task.begin:
            target.write_out(one.byte + task.begin, one.byte + task.end)
        yield task.end - task.begin


class Sets:
    """Sets that are to be merged, looked at and found to fit together.

    names: prefixes and folders of parts, in order. force: put sets of different tokenizers together.
    Raises UserError for what is missing, damaged, unfinished or does not fit.
    """

    def __init__(self, names: Sequence[str | Path], workers: int = 1, force: bool = False):
        prefixes: list[str] = []
        digests: list[Digests] = []
        metas: list[tuple[str, dict[str, Any] | None]] = []
        folders = {}
        for name in map(str, names):
            if (folder := find_parts(name)) is not None:
                parts = read_parts(folder)
                folders[len(prefixes)] = parts
                prefixes, digests = prefixes + parts.prefixes, digests + parts.digests
                metas.append((name, parts.meta))
            else:
                meta = read_meta(name)
                prefixes.append(name)
                digests.append(_digests(meta or {}))
                metas.append((name, meta))
        self.placed, self.total = place(prefixes, digests, workers)
        self.data_bytes = sum(one.data_bytes for one in self.placed)
        for first, parts in folders.items():
            for part, one in zip(parts.parts, self.placed[first:], strict=False):
                parts.check(part, one.header.documents, one.header.sequences, one.data_bytes)
        alone = len(metas) == 1 and bool(folders)
        self.own_name = folders[0].prefix if alone else None
        """The PREFIX of a lone PREFIX.parts."""
        self.unknown = [name for name, meta in metas if not meta]
        self.meta: dict[str, Any] = (metas[0][1] or {}) if alone else combine_metas(metas, force)

    def write(
        self,
        output: str | Path,
        *,
        workers: int = 1,
        overwrite: bool = False,
        update: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Merge into OUTPUT.bin, .idx and .meta.json; return what the last holds."""
        totals = merge_placed(self.placed, self.total, output, workers, overwrite, update, self.meta)
        return self.meta | totals.facts()


def _digests(meta: dict[str, Any]) -> Digests:
    told = [meta.get(f"{kind}_xxh3") for kind in ("bin", "idx")]
    return tuple(digest if isinstance(digest, str) else None for digest in told)  # type: ignore[return-value]


def merge(
    prefixes: Sequence[str | Path],
    output: str | Path,
    *,
    workers: int = 1,
    digests: Sequence[Digests] | None = None,
    overwrite: bool = False,
    update: Callable[[int], None] | None = None,
    meta: dict[str, Any] | None = None,
    record: bool = True,
) -> Totals:
    """Write the sets, in the order given, as one: OUTPUT.bin and OUTPUT.idx. The sources are only read.

    digests: what .bin and .idx of each set must hash to (xxh3_128), where known. update: called with the bytes copied
    since its last call. meta: becomes OUTPUT.meta.json, with the totals. record: hash the result.
    Raises UserError for a missing, damaged or unlike set, a full disk (before anything is copied), an existing output.
    """
    check_output(output, overwrite)
    placed, total = place(prefixes, digests, workers)
    return merge_placed(placed, total, output, workers, overwrite, update, meta, record)


def merge_placed(
    placed: Sequence[Placed],
    total: Header,
    output: str | Path,
    workers: int = 1,
    overwrite: bool = False,
    update: Callable[[int], None] | None = None,
    meta: dict[str, Any] | None = None,
    record: bool = True,
) -> Totals:
    """`merge` of sets that `place` has looked at."""
    mine = Path(f"{output}.bin").resolve()
    if any(Path(f"{one.prefix}.bin").resolve() == mine for one in placed):
        raise UserError(f"{output} is both an input and the output; choose another output", 2)
    data_bytes, on_disk = (sum(sizes) for sizes in zip(*((one.data_bytes, one.on_disk) for one in placed), strict=True))
    with SizedPair(output, total, data_bytes, overwrite, on_disk) as pair, disk_errors(output):
        write_indices(placed, pair.idx, total, workers)
        hasher = xxhash.xxh3_128()
        for count in _copy_data(placed, pair.bin, workers, hasher if record else None):
            if update is not None:
                update(count)
        tokens = data_bytes // total.dtype.itemsize
        totals = Totals(str(total.dtype), total.documents, total.sequences, tokens, data_bytes)
        if record:
            index = xxhash.xxh3_128()
            pair.idx.hash_into(index, 0, total.size)
            totals = replace(totals, bin_xxh3=hasher.hexdigest(), idx_xxh3=index.hexdigest())
        pair.finish(None if meta is None else meta | totals.facts())
    return totals


def merge_parts(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    update: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the parts of a folder as one set, each held to its digests; return what OUTPUT.meta.json holds.

    output: PREFIX of the folder PREFIX.parts when None. Raises UserError as `merge`, and for an unfinished folder.
    """
    parts = read_parts(folder)
    check_output(parts.prefix if output is None else output, overwrite)
    sets = Sets([folder], workers)
    return sets.write(output or parts.prefix, workers=workers, overwrite=overwrite, update=update)
