"""Where each of many token files goes in the one they make together, and that one's index, written in parallel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.errors import UserError
from data_prep.index_format import HEADER, Header, broken_data, broken_index, check_lengths, falling, read_header
from data_prep.ranges import RangeFile, in_order

CHUNK = 1 << 20  # entries of an index read at a time: about 40 MB a worker

Digests = tuple[str | None, str | None]  # of .bin and of .idx, hexadecimal xxh3_128


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
) -> tuple[list[Placed], Header]:
    """Where each set goes, and the result's header; only headers and sizes are read.

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
    return placed, Header(placed[0].header.dtype, sequence, document)


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
            compare_digests(f"{one.prefix}.idx", hasher.hexdigest(), one.digests[1])
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
            if (start == 0 and entries[0] != 0) or entries[0] < last or falling(entries).any():
                raise broken_index(one.prefix, "has documents that do not rise from 0")
            last = int(entries[-1])
            entries += one.sequence
            skipped = int(start == 0)  # entry 0 is the end of the set before
            target.write(entries[skipped:], total.documents_at + 8 * (one.document + start + skipped))
        if last != header.sequences:
            raise broken_index(one.prefix, f"has documents that do not end with its {header.sequences} sequences")
    if tokens * itemsize != one.data_bytes:
        raise broken_data(one.prefix, one.data_bytes, tokens * itemsize)


def compare_digests(path: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise UserError(
            f"{path} is damaged: its xxh3 is {found}, recorded was {recorded}; copy it again from where it is whole, "
            f"or make this set anew with herd prep tokenize"
        )
