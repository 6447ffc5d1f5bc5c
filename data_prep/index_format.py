"""The format of `.idx`: its header, what must hold of its entries, and how a finished pair is put in place.

Little-endian: "MMIDIDX" and two zero bytes | u64 version 1 | u8 dtype code | u64 sequences n | u64 documents+1 d |
i32 lengths[n] | i64 byte pointers[n] | i64 documents[d] | i8 modes[n], in multimodal files only, and not read here.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1: 34 bytes
DTYPES = {
    code: np.dtype(kind).newbyteorder("<")
    for code, kind in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}.items()
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Header(NamedTuple):
    """What the first 34 bytes of an index say, and where its sections begin (offsets in bytes)."""

    dtype: np.dtype[np.generic]
    sequences: int
    documents: int
    modes: bool = False  # a byte a sequence at the end: a multimodal file

    @property
    def pointers_at(self) -> int:
        return HEADER.size + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        return HEADER.size + 12 * self.sequences

    @property
    def size(self) -> int:
        """Bytes of the index, modes left out."""
        return self.documents_at + 8 * (self.documents + 1)

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.documents + 1)


def read_header(prefix: str | Path, index: Path | None = None) -> Header:
    """The header of PREFIX.idx (or of `index`), checked against the size of that file.

    Raises UserError for what is no index or is cut off, OSError for what cannot be read.
    """
    with (index or Path(f"{prefix}.idx")).open("rb") as stream:
        head, size = stream.read(HEADER.size), os.fstat(stream.fileno()).st_size
    if head[: len(MAGIC)] != MAGIC:
        raise broken_index(prefix, "is not a Megatron index: it does not start with MMIDIDX", index)
    if len(head) < HEADER.size:
        raise broken_index(prefix, f"is cut off inside its header ({len(head)} of {HEADER.size} bytes)", index)
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != VERSION:
        raise broken_index(prefix, f"has version {version}, and only version {VERSION} exists", index)
    if code not in DTYPES:
        raise broken_index(prefix, f"names token type {code}, and only 1 to 8 exist", index)
    header = Header(DTYPES[code], sequences, entries - 1)
    if entries < 1 or size not in (header.size, header.size + sequences):
        cut = "is cut off" if size < header.size else "does not match its header"
        raise broken_index(prefix, f"{cut}: {size} bytes, where its header promises {header.size}", index)
    return header._replace(modes=size != header.size)


def broken_index(prefix: str | Path, cause: str, index: Path | None = None) -> UserError:
    return UserError(
        f"{index or f'{prefix}.idx'} {cause}; copy {prefix}.bin and .idx again, "
        f"or make them anew with herd prep tokenize"
    )


def broken_data(prefix: str | Path, actual: int, wanted: int) -> UserError:
    return UserError(
        f"{prefix}.bin {'is cut off' if actual < wanted else 'is longer than its index'}: {actual} bytes, where "
        f"{Path(prefix).name}.idx promises {wanted}; copy both files again from one run, or make them anew with "
        f"herd prep tokenize"
    )


def check_lengths(
    lengths: NDArray[np.int32], pointers: NDArray[np.int64], first: int, before: int, itemsize: int
) -> tuple[int, str | None]:
    """Entries `first` and on of an index, with `before` tokens ahead of them: tokens up to their end, and what is wrong.

    Lengths are not negative, and each sequence lies right behind the one before it.
    """
    if not lengths.size:
        return before, None
    if lengths.min() < 0:
        return before, f"gives sequence {first + int(lengths.argmin())} a negative length"
    ends = np.cumsum(lengths, dtype=np.int64) + before
    wrong = pointers != (ends - lengths) * itemsize
    if wrong.any():
        at = first + int(wrong.argmax())
        return int(ends[-1]), f"points sequence {at} elsewhere than behind sequence {at - 1}"
    return int(ends[-1]), None


def falling(entries: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which entries are followed by a smaller one. Differences would overflow on damaged ones."""
    return entries[1:] < entries[:-1]


def publish(prefix: str | Path) -> None:
    """Put PREFIX.bin.tmp and .idx.tmp, already on the disk, in place: index gone, data renamed, index renamed.

    A kill between any two of these leaves no readable pair of old index and new data.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    index.unlink(missing_ok=True)
    Path(f"{data}.tmp").replace(data)
    Path(f"{index}.tmp").replace(index)
    sync_folder(index.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the bytes."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
