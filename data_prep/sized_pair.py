"""A token file whose size is known before: laid out first, then filled at any place by any thread, then published."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.index_format import Header, publish, sync_folder
from data_prep.ranges import FULL, RangeFile, disk_errors

SPARE = 1 << 24  # bytes that a disk should have left, for the index's own blocks and the folder


def check_output(prefix: str | Path, overwrite: bool) -> None:
    """Raise UserError where PREFIX is a folder, or files of its name must not be replaced."""
    name = str(prefix)
    if name.endswith(("/", os.sep)) or not Path(name).name:
        raise UserError(f"{name}: is a folder; name the files too, as in {name.rstrip('/')}/corpus", 2)
    existing = [path for end in ("idx", "bin", "meta.json") if (path := Path(f"{name}.{end}")).exists()]
    # The account of an unfinished publication stands there: what exists is half of what we are asked for.
    if existing and not overwrite and not Path(f"{name}.meta.json.new").exists():
        raise UserError(f"{existing[0]} exists; choose another --output, or --overwrite", 2)


class SizedPair:
    """PREFIX.bin.tmp and PREFIX.idx.tmp at their full size, open for writing as `bin` and `idx`.

    The header and the first entry of the documents are written. `finish` puts the pair in place; leaving the block
    without it removes what was written, and an older pair of this name stays as it was. A kill leaves the .tmp files,
    which the next one takes over. on_disk: bytes of data that will take disk, fewer than data_bytes for files with
    holes. Raises UserError for a disk without room, and for a second process that writes the same files.
    """

    def __init__(
        self, prefix: str | Path, header: Header, data_bytes: int, overwrite: bool = False, on_disk: int | None = None
    ):
        self.prefix, self.header, self.data_bytes = str(prefix), header, data_bytes
        self._overwrite, self._on_disk = overwrite, data_bytes if on_disk is None else min(data_bytes, on_disk)
        self._files: list[RangeFile] = []
        self._meta = Path(f"{self.prefix}.meta.json")

    def __enter__(self) -> SizedPair:
        check_output(self.prefix, self._overwrite)
        try:
            with disk_errors(self.prefix):
                folder = Path(self.prefix).parent
                folder.mkdir(parents=True, exist_ok=True)
                self.bin, self.idx = self._claim("bin"), self._claim("idx")
                needed, system = self._on_disk + self.header.size, os.statvfs(folder)
                free = system.f_bavail * system.f_frsize
                if free < needed + SPARE:
                    raise UserError(
                        f"{folder}: {self.prefix} needs {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free; "
                        f"free space there, or write elsewhere"
                    )
                for file, size in ((self.bin, self.data_bytes), (self.idx, self.header.size)):
                    os.ftruncate(file.fd, size)
                    if size and self._on_disk == self.data_bytes:
                        _reserve(file, size)
                self.idx.write(self.header.pack(), 0)
                self.idx.write(np.zeros(1, "<i8"), self.header.documents_at)
        except BaseException:
            self._drop()
            raise
        return self

    def finish(self, meta: dict[str, Any] | None = None) -> None:
        """Sync and rename; `meta` becomes PREFIX.meta.json, last of all. Without it an old one is removed."""
        aside = Path(f"{self._meta}.new")
        with disk_errors(self.prefix):
            os.fsync(self.bin.fd)
            os.fsync(self.idx.fd)
            if meta is not None:
                with aside.open("w", encoding="utf-8") as file:
                    json.dump(meta, file, ensure_ascii=False, indent=2)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
            self._meta.unlink(missing_ok=True)  # an old account must not stand beside new tokens
            publish(self.prefix)
            if meta is not None:
                aside.replace(self._meta)
                sync_folder(self._meta.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    def _claim(self, kind: str) -> RangeFile:
        """Open PREFIX.kind.tmp, empty, for this process alone, whatever a killed one left in it."""
        path = Path(f"{self.prefix}.{kind}.tmp")
        while True:
            file = RangeFile(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"{path}: another process is writing it; wait for it, or choose another output"
                ) from None
            except OSError:
                pass  # a file system without locks
            try:
                same = os.path.samestat(os.fstat(file.fd), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                self._files.append(file)
                os.ftruncate(file.fd, 0)
                return file
            file.close()  # it was renamed or removed by the process that held it

    def _drop(self) -> None:
        """Remove what is still aside, before letting go of the locks: after `finish` nothing of ours is."""
        for file in self._files:
            path = Path(file.path)
            if path.exists() and os.path.samestat(os.fstat(file.fd), path.stat()):
                path.unlink()
            file.close()
        self._files = []


def _reserve(file: RangeFile, size: int) -> None:
    """Take the disk blocks now, where the file system can (posix_fallocate would write each block where it cannot)."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(file.fd, 0, 0, size) and (code := ctypes.get_errno()) in FULL:
        raise OSError(code, os.strerror(code), file.path)
