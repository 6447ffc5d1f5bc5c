"""Ranges of large files: read, copied and hashed at offsets by any number of threads, in memory of a few buffers.

Threads are enough, since reading, copying, hashing and numpy all let go of Python's lock. Nothing is read through a
map: a disk that fails is then an OSError with the file's name, and not a signal that ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data_prep.errors import UserError

BUFFER = 1 << 22  # bytes read at a time
TASK = 1 << 27  # bytes of one task: some tenths of a second, so that an interrupt is soon obeyed
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ZEROS = bytes(BUFFER)

Task = TypeVar("Task")
Result = TypeVar("Result")


class Hasher(Protocol):
    """xxhash's and hashlib's objects."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class RangeFile:
    """A file that is read and written at offsets; every OSError carries its path."""

    def __init__(self, path: str | Path, flags: int = os.O_RDONLY):
        self.path = str(path)
        self.fd = os.open(self.path, flags | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> RangeFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def fill(self, buffer: memoryview, at: int) -> None:
        """Read exactly as many bytes as the buffer has."""
        done = 0
        while done < len(buffer):
            with self._named():
                count = os.preadv(self.fd, [buffer[done:]], at + done)
            if not count:
                raise OSError(errno.EIO, f"it ends at byte {at + done}, where more was promised", self.path)
            done += count

    def array(self, dtype: DTypeLike, count: int, at: int) -> NDArray[Any]:
        values = np.empty(count, dtype)
        self.fill(values.view(np.uint8).data, at)
        return values

    def write(self, data: NDArray[Any] | bytes | memoryview, at: int) -> None:
        view = np.ascontiguousarray(data).view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data)
        while len(view):
            with self._named():
                count = os.pwrite(self.fd, view, at)
            view, at = view[count:], at + count

    def extents(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """The range as (begin, end, holds data?); a hole reads as zeros and takes no disk."""
        if self.size < end:
            raise OSError(errno.EIO, f"it has {self.size} bytes, where {end} were promised", self.path)
        while begin < end:
            try:
                data = min(end, os.lseek(self.fd, begin, os.SEEK_DATA))
            except OSError as error:
                data = end if error.errno == errno.ENXIO else begin  # no data behind; or a file system that cannot tell
            if data > begin:
                yield begin, data, False
            stop = end
            if data < end:
                with contextlib.suppress(OSError):
                    stop = min(end, os.lseek(self.fd, data, os.SEEK_HOLE))
                yield data, stop, True
            begin = stop

    def blocks(self, begin: int, end: int, size: int = BUFFER) -> Iterator[tuple[int, int, memoryview | None]]:
        """The range as (offset, bytes, content), at most `size` of content at a time; a hole comes whole, as None.

        The next block is read into the same memory.
        """
        buffer: memoryview | None = None
        for first, stop, data in self.extents(begin, end):
            if not data:
                yield first, stop - first, None
                continue
            for at in range(first, stop, size):
                if buffer is None:
                    buffer = memoryview(bytearray(min(size, end - begin)))
                block = buffer[: min(size, stop - at)]
                self.fill(block, at)
                yield at, len(block), block

    def hash_into(self, hasher: Hasher, begin: int, end: int) -> None:
        for _, count, content in self.blocks(begin, end):
            hash_block(hasher, count, content)

    def copy_to(self, target: RangeFile, at: int, begin: int, end: int) -> None:
        """Copy bytes begin..end to `at` in the target, in the kernel where it can; holes stay holes.

        The target must read as zeros there.
        """
        for first, stop, data in self.extents(begin, end):
            if data:
                first = self._copy_in_kernel(target, at - begin, first, stop)
                for offset, _, content in self.blocks(first, stop):
                    if content is not None:
                        target.write(content, at + offset - begin)

    def write_out(self, begin: int, end: int) -> None:
        """Have the disk begin with what was written here, so that a later fsync finds little left to wait for."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # fsync tells what is wrong
                os.posix_fadvise(self.fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _copy_in_kernel(self, target: RangeFile, shift: int, begin: int, end: int) -> int:
        """How far the kernel came; it cannot between all file systems."""
        if not hasattr(os, "copy_file_range"):
            return begin
        while begin < end:
            try:
                count = os.copy_file_range(self.fd, target.fd, end - begin, begin, begin + shift)
            except OSError as error:
                if error.errno in FULL:
                    raise OSError(error.errno, error.strerror, target.path) from error
                break  # reading and writing finds out whose fault it is
            if not count:
                break
            begin += count
        return begin

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error


def hash_block(hasher: Hasher, count: int, content: memoryview | None) -> None:
    """Hash a block of `RangeFile.blocks`."""
    if content is not None:
        hasher.update(content)
        return
    while count:
        part = min(count, BUFFER)
        hasher.update(_ZEROS if part == BUFFER else _ZEROS[:part])
        count -= part


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[tuple[Task, Result], None, None]:
    """Each task with its result, in the order of the tasks, worked on by threads that run a little ahead."""
    if workers <= 1:
        for task in tasks:
            yield task, work(task)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ranges")
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(work, task)))
            if len(waiting) >= 2 * workers:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def disk_errors(place: str | Path) -> Iterator[None]:
    """Turn what a disk refuses into one line; `place` is named where the error names no file."""
    try:
        yield
    except OSError as error:
        remedy = "free space there, or write elsewhere" if error.errno in FULL else "check the path and its disk"
        raise UserError(f"{error.filename or place}: {error.strerror}; {remedy}") from error
