"""Files of named arrays: written in a stream, aside, synced, renamed; read through a memory map.

Layout: the arrays, each at a multiple of 64 bytes | JSON {"meta": ..., "arrays": {name: [dtype, count, offset]}} | u64
length of the JSON | 8 bytes of magic. The end comes last, so a file without it is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

MAGIC = b"herdarr1"
END = struct.Struct("<Q8s")
Array = NDArray[Any]


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place when the block ends well, and is gone when not.

    Its name aside is this process's own: two nodes may write the same part, and the later one wins with the same bytes.
    Without `durable`, for what this run alone reads, the disk is not waited for. Raises UserError when it refuses.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        aside.replace(path)
        if not durable:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space there, or write elsewhere"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


class Writer:
    """Adds arrays to a file one after the other."""

    def __init__(self, file: BinaryIO):
        self._file, self._arrays = file, dict[str, list[Any]]()
        self._at, self._last = 0, ""

    def add(self, name: str, array: Array) -> None:
        """Append an array of one dimension; to the one before it, if that has the same name."""
        data = np.ascontiguousarray(array)
        if name == self._last:
            self._arrays[name][1] += data.size
        else:
            padding = -self._at % 64
            self._file.write(bytes(padding))
            self._at += padding
            self._arrays[name] = [data.dtype.str, data.size, self._at]
            self._last = name
        self._file.write(data.data if data.size else b"")
        self._at += data.nbytes

    def end(self, meta: Any = None) -> None:
        """Close the file with what it holds and `meta`, any JSON value."""
        head = json.dumps({"meta": meta, "arrays": self._arrays}, ensure_ascii=False).encode("utf-8", "surrogateescape")
        self._file.write(head + END.pack(len(head), MAGIC))


def write_arrays(path: Path, meta: Any = None, durable: bool = True, **arrays: Array) -> None:
    """Write a file of arrays in one go; `durable` as in `replacing`."""
    with replacing(path, durable) as file:
        writer = Writer(file)
        for name, array in arrays.items():
            writer.add(name, array)
        writer.end(meta)


class Reader:
    """A file of arrays; each is mapped when it is asked for. Raises UserError for a file that is not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - END.size))
                length, magic = END.unpack(file.read(END.size))
                if magic != MAGIC:
                    raise ValueError("no end mark")
                file.seek(size - END.size - length)
                head = json.loads(file.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path}: is damaged or gone ({error}); remove it and run again") from error
        self.meta: Any = head["meta"]
        self._arrays = head["arrays"]
        self._map: Array | None = None

    def __getitem__(self, name: str) -> Array:
        dtype, count, offset = self._arrays[name]
        if not count:
            return np.empty(0, dtype=dtype)
        if self._map is None:
            self._map = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
        return self._map[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays
