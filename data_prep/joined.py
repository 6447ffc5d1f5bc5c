"""Training straight from parts: the token files of a folder as one dataset, with nothing merged.

The joined index, byte for byte the index that a merge would write, is made once, beside the parts; so lengths,
documents and the fingerprint are those of the merged file, and a run may begin on the parts and go on with that. Token
ids stay in the parts' .bin files, which are mapped as they are read, a bounded number at a time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.index_format import broken_data
from data_prep.indexed import IndexedDataset
from data_prep.parts_file import Parts, find_parts, read_parts
from data_prep.placed import place, write_indices
from data_prep.ranges import RangeFile, disk_errors

OPENERS = 8  # threads that read indices: most of their time is waiting for a network's file system
# Each map holds a file open. A quarter of what a process may open leaves room for sockets, checkpoints and workers.
_OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAPS = 4096 if _OPEN_FILES == resource.RLIM_INFINITY else max(16, min(4096, _OPEN_FILES // 4))


def open_tokens(path: str | Path, thorough: bool = False) -> IndexedDataset:
    """The token file PREFIX, or the folder PREFIX.parts as one dataset; PREFIX alone means the folder where there is
    no PREFIX.idx.

    thorough: look at the size of every part now, and not when it is first read. Raises UserError as IndexedDataset.
    """
    folder = find_parts(path)
    return IndexedDataset(path) if folder is None else Joined(folder, thorough)


def write_joined_index(parts: Parts, path: str | Path) -> None:
    """Write the index that the parts would have when merged. Raises UserError for a part that is missing or damaged."""
    placed, total = place(parts.prefixes, None, OPENERS)
    for part, one in zip(parts.parts, placed, strict=True):
        parts.check(part, one.header.documents, one.header.sequences, one.data_bytes)
    with disk_errors(path), RangeFile(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
        os.ftruncate(file.fd, total.size)
        file.write(total.pack(), 0)
        file.write(np.zeros(1, "<i8"), total.documents_at)
        write_indices(placed, file, total, OPENERS)
        os.fsync(file.fd)


def joined_index(parts: Parts) -> Path:
    """Where the joined index of this state of the folder lies, or will: another state has another name."""
    return parts.folder / f"joined-{parts.digest[:16]}.idx"


def make_joined_index(parts: Parts) -> Path:
    """Write the joined index beside the parts, if it is not there, and remove older ones. Any number of processes may
    do so at once: each writes aside, and all write the same."""
    path = joined_index(parts)
    if not path.exists():
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=parts.folder)
        os.close(handle)
        try:
            write_joined_index(parts, aside)
            Path(aside).chmod(0o644)
            Path(aside).replace(path)
        finally:
            Path(aside).unlink(missing_ok=True)
        for old in parts.folder.glob("joined-*.idx"):
            if old != path:
                with contextlib.suppress(OSError):
                    old.unlink()
    return path


@functools.lru_cache(maxsize=MAPS)
def _mapped(path: str, dtype: str, tokens: int, state: str) -> NDArray[Any]:
    """A part's token ids; `state` keeps what was mapped before the part was made anew from being given out."""
    wanted = tokens * np.dtype(dtype).itemsize
    try:
        actual = Path(path).stat().st_size
        if actual != wanted:
            raise broken_data(path.removesuffix(".bin"), actual, wanted)
        return np.memmap(path, dtype=dtype, mode="r") if wanted else np.empty(0, dtype)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; run the same herd prep tokenize again, which makes missing "
            f"parts anew"
        ) from error


class Joined(IndexedDataset):
    """The parts of a folder as one token file; everything of IndexedDataset holds.

    `get` finds the part by binary search. Raises UserError for a folder that is not finished, a part that is missing
    or has another size; ids are not read.
    """

    def __init__(self, folder: str | Path, thorough: bool = False):
        self.prefix = str(folder)
        self.parts = read_parts(folder)
        present = {
            entry.name for entry in os.scandir(folder)
        }  # one request, where a stat of each part would be thousands
        for part in self.parts.parts:
            if f"{part.name}.bin" not in present:
                raise UserError(
                    f"{folder}/{part.name}.bin does not exist, and {folder}/parts.json lists it; run the same herd "
                    f"prep tokenize again, which makes missing parts anew"
                )
        counts = [(part.sequences, part.tokens) for part in self.parts.parts]
        ends = np.cumsum(np.array([(0, 0), *counts], dtype=np.int64), axis=0)
        self._first_sequence, self._first_token = ends[:, 0].copy(), ends[:, 1].copy()
        try:
            self._open_index()
        except UserError:  # cut off or rotten: it follows from the parts, so it is made again
            joined_index(self.parts).unlink(missing_ok=True)
            self._open_index()
        if thorough:
            for number in range(len(self.parts.parts)):
                self._check_size(number)

    def _open_index(self) -> None:
        path = joined_index(self.parts)
        if path.exists() or os.access(self.parts.folder, os.W_OK):
            self._index = make_joined_index(self.parts)
            self._map_joined()
            return
        with tempfile.TemporaryDirectory(prefix="herd-joined-") as folder:  # gone soon, but mapped
            self._index = Path(folder) / path.name
            write_joined_index(self.parts, self._index)
            self._map_joined()

    def _map_joined(self) -> None:
        """Map the joined index, and hold it to parts.json: each part begins where it should."""
        with disk_errors(self._index):
            self._map_index()
        first, at = self._first_sequence[:-1], self._first_token[:-1] * self.dtype.itemsize
        inside = first < len(self)
        counts = (len(self), self.tokens) == (self._first_sequence[-1], self._first_token[-1])
        if self.dtype != self.parts.dtype or not counts or (self.pointers[first[inside]] != at[inside]).any():
            raise UserError(f"{self._index} is not the index of {self.prefix}/parts.json; remove it")

    def _check_size(self, number: int) -> None:
        part = self.parts.parts[number]
        path = self.parts.folder / f"{part.name}.bin"
        with disk_errors(path):
            actual = path.stat().st_size
        if actual != part.tokens * self.dtype.itemsize:
            raise broken_data(str(path.with_suffix("")), actual, part.tokens * self.dtype.itemsize)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """As IndexedDataset.get."""
        if i < 0:
            i += len(self)
        size = int(self.lengths[i])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"{self.prefix}: tokens {offset}..{stop} of sequence {i}, which has {size}")
        # Of parts without sequences, which begin where the next one does, the last counts.
        number = int(np.searchsorted(self._first_sequence, i, side="right")) - 1
        begin = int(self.pointers[i]) // self.dtype.itemsize - int(self._first_token[number])
        return self._part(number)[begin + offset : begin + stop]

    def _part(self, number: int) -> NDArray[Any]:
        part = self.parts.parts[number]
        return _mapped(str(self.parts.folder / f"{part.name}.bin"), self.dtype.str, part.tokens, self.parts.digest)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
        """As IndexedDataset.pieces."""
        starts = self._first_token * self.dtype.itemsize
        number = int(np.searchsorted(starts, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(starts[number + 1]))
            if stop > begin:
                yield (
                    str(self.parts.folder / f"{self.parts.parts[number].name}.bin"),
                    begin - int(starts[number]),
                    stop - begin,
                )
            begin, number = max(begin, stop), number + 1

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return Joined, (self.prefix,)
