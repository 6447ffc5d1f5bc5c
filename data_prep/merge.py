"""Many token files into one: sizes are known from the headers, so the result is laid out and filled in parallel.

First all indices are checked and written at their places, then data is copied by ranges, while this thread follows
and hashes what was written, in order: a set whose recorded digest does not come out is named, and the result's own
digest is known at the end. Memory is a few buffers a worker and a hundred bytes a set, whatever they hold. The bytes
are those of one writer that got all documents, and of megatron-core's IndexedDatasetBuilder.add_index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_prep.errors import UserError
from data_prep.index_format import HEADER, Header, broken_data, broken_index, check_lengths, read_header
from data_prep.parts_file import read_parts
from data_prep.ranges import TASK, RangeFile, disk_errors, hash_block, in_order
from data_prep.sized_pair import SizedPair, check_output

CHUNK = 1 << 20  # entries of an index read at a time: about 40 MB a worker

Digests = tuple[str | None, str | None]  # of .bin and of .idx, hexadecimal xxh3_128


@dataclass(frozen=True)
class Totals:
    """What a merged set holds. bin_xxh3, idx_xxh3: None where they were not asked for."""

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


class Placed(NamedTuple):
    """A set, and where it begins in the result: sequence, document, byte."""

    prefix: str
    header: Header
    data_bytes: int
    on_disk: int
    sequence: int = 0
    document: int = 0
    byte: int = 0
    digests: Digests = (None, None)


def place(
    prefixes: Sequence[str | Path], digests: Sequence[Digests] | None = None, workers: int = 1
) -> tuple[list[Placed], Header, int]:
    """Where each set goes, the result's header and its bytes of data; only headers and sizes are read.

    Raises UserError for what is missing, is no token file, or holds tokens of another type.
    """
    placed: list[Placed] = []
    sequence = document = byte = 0
    for number, (_, one) in enumerate(in_order(_read_sizes, prefixes, workers)):
        dtype = placed[0].header.dtype if placed else one.header.dtype
        if one.header.dtype != dtype:
            raise UserError(
                f"{placed[0].prefix} holds {dtype} tokens and {one.prefix} {one.header.dtype}; "
                f"merge files of one tokenizer",
                2,
            )
        told = digests[number] if digests else one.digests
        placed.append(one._replace(sequence=sequence, document=document, byte=byte, digests=told))
        sequence, document = sequence + one.header.sequences, document + one.header.documents
        byte += one.data_bytes
    if not placed:
        raise UserError("nothing to merge; name token files, or a folder that holds some", 2)
    return placed, Header(placed[0].header.dtype, sequence, document), byte


def _read_sizes(prefix: str | Path) -> Placed:
    data = Path(f"{prefix}.bin")
    try:
        header, stat = read_header(prefix), data.stat()
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; a token file is a pair of .bin and .idx", 2) from None
    except OSError as error:
        raise UserError(f"{error.filename or data}: {error.strerror}; check the path and its disk") from error
    if header.modes:
        raise UserError(f"{prefix}.idx is of a multimodal set, whose modes would be lost; merge sets of text", 2)
    return Placed(str(prefix), header, stat.st_size, min(stat.st_size, 512 * stat.st_blocks))


def write_indices(placed: Iterable[Placed], target: RangeFile, total: Header, workers: int) -> None:
    """Check the index of each set and write its entries where they belong in the result's.

    Raises UserError that names a set whose entries are wrong, do not fit its .bin, or are not those of its digest.
    """
    for _ in in_order(lambda one: _write_index(one, target, total), placed, workers):
        pass


def _write_index(one: Placed, target: RangeFile, total: Header) -> None:
    header, itemsize, tokens = one.header, one.header.dtype.itemsize, 0
    with RangeFile(f"{one.prefix}.idx") as source:
        if one.digests[1]:
            hasher = xxhash.xxh3_128()
            source.hash_into(hasher, 0, source.size)
            _compare(f"{one.prefix}.idx", hasher.hexdigest(), one.digests[1])
        for start in range(0, header.sequences, CHUNK):
            count = min(CHUNK, header.sequences - start)
            lengths = source.array("<i4", count, HEADER.size + 4 * start)
            pointers = source.array("<i8", count, header.pointers_at + 8 * start)
            tokens, cause = check_lengths(lengths, pointers, start, tokens, itemsize)
            if cause:
                raise broken_index(one.prefix, cause)
            pointers += one.byte
            target.write(lengths, HEADER.size + 4 * (one.sequence + start))
            target.write(pointers, total.pointers_at + 8 * (one.sequence + start))
        last = 0
        for start in range(0, header.documents + 1, CHUNK):
            entries = source.array("<i8", min(CHUNK, header.documents + 1 - start), header.documents_at + 8 * start)
            if (start == 0 and entries[0] != 0) or entries[0] < last or (np.diff(entries) < 0).any():
                raise broken_index(one.prefix, "has documents that do not rise from 0")
            last = int(entries[-1])
            entries += one.sequence
            skipped = int(start == 0)  # entry 0 is the end of the set before
            target.write(entries[skipped:], total.documents_at + 8 * (one.document + start + skipped))
        if last != header.sequences:
            raise broken_index(one.prefix, f"has documents that do not end with its {header.sequences} sequences")
    if tokens * itemsize != one.data_bytes:
        raise broken_data(one.prefix, one.data_bytes, tokens * itemsize)


class _Range(NamedTuple):
    """Bytes of a set's data that one task copies."""

    one: Placed
    begin: int
    end: int


def _ranges(placed: Iterable[Placed]) -> Iterator[_Range]:
    for one in placed:
        for begin in range(0, max(1, one.data_bytes), TASK):
            yield _Range(one, begin, min(begin + TASK, one.data_bytes))


def _compare(path: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise UserError(
            f"{path} is damaged: its xxh3 is {found}, recorded was {recorded}; copy it again from where it is whole, "
            f"or make this part anew with herd prep tokenize"
        )


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
            _compare(f"{one.prefix}.bin", own.hexdigest(), recorded)
            own.reset()
        yield task.end - task.begin


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
    sets = place(prefixes, digests, workers)
    return _merge(*sets, output, workers, overwrite, update, meta, record)


def _merge(
    placed: Sequence[Placed],
    total: Header,
    data_bytes: int,
    output: str | Path,
    workers: int,
    overwrite: bool,
    update: Callable[[int], None] | None,
    meta: dict[str, Any] | None,
    record: bool = True,
) -> Totals:
    mine = Path(f"{output}.bin").resolve()
    if any(Path(f"{one.prefix}.bin").resolve() == mine for one in placed):
        raise UserError(f"{output} is both an input and the output; choose another output", 2)
    on_disk = sum(one.on_disk for one in placed)
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
    prefix = parts.prefix if output is None else output
    check_output(prefix, overwrite)
    placed, total, data_bytes = place(parts.prefixes, parts.digests, workers)
    for part, one in zip(parts.parts, placed, strict=True):
        parts.check(part, one.header.documents, one.header.sequences, one.data_bytes)
    totals = _merge(placed, total, data_bytes, prefix, workers, overwrite, update, parts.meta)
    return parts.meta | totals.facts()
