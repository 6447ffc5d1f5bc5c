"""Token files: Megatron's `.bin` / `.idx` pair, read through a memory map and written byte for byte as Megatron does.

`PREFIX.bin` is nothing but token ids. `PREFIX.idx` says where each sequence lies and which sequences make a document;
its format is in index_format.py.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py; a test compares the bytes with megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from data_prep.errors import UserError
from data_prep.index_format import (
    CODES,
    HEADER,
    Header,
    broken_data,
    broken_index,
    check_lengths,
    falling,
    publish,
    read_header,
)

CHUNK = 1 << 22  # sequences checked at a time: 100 M of them need 64 MB of temporary memory instead of 2 GB


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The type Megatron stores ids of this vocabulary in: uint16 below 65,500 ids, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; they appear under their names only when the `with` block ends well.

        with IndexedWriter("data/corpus", token_dtype(32000)) as writer:
            writer.add_document([1, 5, 9, 2])

    Bytes go to PREFIX.bin.tmp and PREFIX.idx.tmp, are flushed to the disk and then renamed. An exception inside the
    block removes them and leaves an older pair of this name as it was. Raises UserError when the disk refuses.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike):
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise UserError(f"{self.prefix}: tokens of type {self.dtype} have no code in .idx; use uint16 or int32", 2)
        self.tokens = 0
        self._lengths = array("i")  # 4 bytes a sequence in memory
        self._documents = array("q", [0])
        self._aside = {kind: Path(f"{self.prefix}.{kind}.tmp") for kind in ("bin", "idx")}
        self._bin: BinaryIO | None = None

    def __enter__(self) -> IndexedWriter:
        with self._disk():
            self._aside["bin"].parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._aside["bin"].open("wb", buffering=1 << 20)
        return self

    def add_document(self, tokens: ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Add one document: one sequence, or as many as `lengths` has entries, whose sum is the number of tokens.

        A document without tokens is kept as a document with no sequence, as Megatron's preprocess_data.py does (NeMo
        skips it); no sample ever sees it. Raises UserError for an id that the dtype cannot hold.
        """
        ids = self._checked(tokens)
        parts = np.asarray([ids.size] if lengths is None and ids.size else lengths or [], dtype=np.int64)
        if parts.sum() != ids.size or (parts < 0).any():
            raise ValueError(f"lengths add up to {parts.sum()}, but the document has {ids.size} tokens")
        self._write(ids, parts)
        self._documents.append(len(self._lengths))

    def add_documents(self, tokens: ArrayLike, lengths: ArrayLike) -> None:
        """Add many one-sequence documents in one write: their tokens end to end, and each one's length (0: empty)."""
        ids, sizes = self._checked(tokens), np.asarray(lengths, dtype=np.int64)
        if sizes.sum() != ids.size or (sizes < 0).any():
            raise ValueError(f"lengths add up to {sizes.sum()}, but there are {ids.size} tokens")
        before = len(self._lengths)
        self._write(ids, sizes[sizes > 0])
        self._documents.frombytes((before + np.cumsum(sizes > 0, dtype=np.int64)).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._disk():
                    self._finish()
        finally:  # after success nothing is left to remove
            if self._bin is not None:
                with contextlib.suppress(OSError):
                    self._bin.close()
            for path in self._aside.values():
                path.unlink(missing_ok=True)

    def _checked(self, tokens: ArrayLike) -> NDArray[np.generic]:
        """The tokens as a flat array of the file's type; numpy alone would wrap 70000 to 4464 without a word."""
        ids = np.asarray(tokens).reshape(-1)
        if ids.size and ids.dtype != self.dtype:
            if ids.dtype.kind not in "iu" and self.dtype.kind in "iu":
                raise UserError(f"{self.prefix}: tokens must be integers, found {ids.dtype}")
            low, high = ids.min(), ids.max()
            if self.dtype.kind in "iu" and (low < np.iinfo(self.dtype).min or high > np.iinfo(self.dtype).max):
                raise UserError(
                    f"{self.prefix}: token ids {low}..{high} do not fit {self.dtype}; "
                    f"give the tokenizer's real vocabulary size, so that {token_dtype(int(high) + 1)} is chosen"
                )
        return np.ascontiguousarray(ids, dtype=self.dtype)

    def _write(self, ids: NDArray[np.generic], lengths: NDArray[np.int64]) -> None:
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"{self.prefix}: a sequence of {lengths.max()} tokens is too long for .idx; cut it")
        with self._disk():
            self._open_bin().write(ids.data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += ids.size

    def _open_bin(self) -> BinaryIO:
        if self._bin is None:
            raise ValueError("IndexedWriter is used outside its with block")
        return self._bin

    def _finish(self) -> None:
        """Flush the data, write the index, and put both in place."""
        data = self._open_bin()
        data.flush()
        os.fsync(data.fileno())
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.cumsum(lengths, dtype=np.int64) - lengths
        pointers *= self.dtype.itemsize
        with self._aside["idx"].open("wb") as index:
            index.write(Header(self.dtype, len(self._lengths), len(self._documents) - 1).pack())
            for part in (lengths.astype("<i4"), pointers.astype("<i8"), np.asarray(self._documents, dtype="<i8")):
                part.tofile(index)
            index.flush()
            os.fsync(index.fileno())
        publish(self.prefix)

    @contextlib.contextmanager
    def _disk(self):  # type: ignore[no-untyped-def]
        """Turn what the disk refuses into one line."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or self.prefix}: {error.strerror}; free space there, or write elsewhere"
            ) from error


class IndexedDataset:
    """A token file, memory-mapped. Item i is sequence i, a read-only view of its token ids.

    lengths: int32 (n,), tokens in each sequence. documents: int64 (documents + 1,), document j is the sequences
    documents[j] to documents[j + 1]. Opening checks header, sizes and every entry of the index (about a second for
    100 million sequences); raises UserError in one line that names the cause, the file and the remedy.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self._index, self._data = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for path in (self._index, self._data):
            if not path.is_file() and self.prefix.endswith((".bin", ".idx")):
                raise UserError(f"{path} does not exist; give the prefix alone, {self.prefix[:-4]}")
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist; check the path, or make it: herd prep tokenize TEXT.jsonl "
                    f"--tokenizer TOKENIZER --output {self.prefix}"
                )
        try:
            self._open()
        except OSError as error:
            raise UserError(f"{error.filename or self._index} cannot be read: {error.strerror}") from error

    def _open(self) -> None:
        self._map_index()
        self._map_data()

    def _map_index(self) -> None:
        self.header = header = read_header(self.prefix, self._index)
        self.dtype = header.dtype
        raw = np.memmap(self._index, dtype=np.uint8, mode="r")
        self.lengths: NDArray[np.int32] = np.frombuffer(raw, "<i4", header.sequences, HEADER.size)
        self.pointers: NDArray[np.int64] = np.frombuffer(raw, "<i8", header.sequences, header.pointers_at)
        self.documents: NDArray[np.int64] = np.frombuffer(raw, "<i8", header.documents + 1, header.documents_at)
        self._check_entries()

    def _map_data(self) -> None:
        actual, wanted = self._data.stat().st_size, self.tokens * self.dtype.itemsize
        if actual != wanted:
            raise broken_data(self.prefix, actual, wanted)
        # numpy cannot map a file of no bytes
        self._tokens = np.memmap(self._data, dtype=self.dtype, mode="r") if wanted else np.empty(0, self.dtype)

    def _check_entries(self) -> None:
        """Lengths not negative, pointers end to end, documents rising from 0 to the number of sequences."""
        self.tokens = 0
        for start in range(0, len(self.lengths), CHUNK):
            here = slice(start, start + CHUNK)
            self.tokens, cause = check_lengths(
                self.lengths[here], self.pointers[here], start, self.tokens, self.dtype.itemsize
            )
            if cause:
                raise broken_index(self.prefix, cause, self._index)
        falls = any(
            falling(self.documents[start : start + CHUNK + 1]).any() for start in range(0, len(self.documents), CHUNK)
        )
        if self.documents[0] != 0 or self.documents[-1] != len(self.lengths) or falls:
            cause = f"has documents that do not run from 0 to its {len(self.lengths)} sequences"
            raise broken_index(self.prefix, cause, self._index)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> NDArray[np.generic]:
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """Sequence i from token `offset` on, `length` tokens or all the rest: a view, in the file's type.

        Raises IndexError for what lies outside the sequence.
        """
        size = int(self.lengths[i])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"{self.prefix}: tokens {offset}..{stop} of sequence {i}, which has {size}")
        begin = int(self.pointers[i]) // self.dtype.itemsize
        return self._tokens[begin + offset : begin + stop]

    def document(self, number: int, limit: int | None = None) -> NDArray[np.generic]:
        """The tokens of a document, all its sequences end to end, or its first `limit`."""
        found: list[NDArray[np.generic]] = [np.empty(0, self.dtype)]
        left = np.iinfo(np.int64).max if limit is None else limit
        for i in range(int(self.documents[number]), int(self.documents[number + 1])):
            found.append(self.get(i, 0, min(left, int(self.lengths[i]))))
            left -= len(found[-1])
            if not left:
                break
        return np.concatenate(found)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Where bytes begin..end of the tokens lie: (file, offset, bytes), end to end."""
        yield f"{self.prefix}.bin", begin, end - begin

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over header, lengths, documents and the size of .bin; the same wherever the file lies.

        Pointers are left out because opening has checked that they follow from the lengths; token ids are not read.
        """
        digest = hashlib.blake2b(self.header.pack(), digest_size=16)
        for entries in (self.lengths, self.documents):
            digest.update(entries.view(np.uint8).data)
        digest.update(struct.pack("<Q", self.tokens * self.dtype.itemsize))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        """Pickled as its prefix: another process maps the file itself."""
        return IndexedDataset, (self.prefix,)
