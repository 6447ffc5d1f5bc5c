"""Joining parts while others are still being made, so that the disk writes them a second time while the cores work.

Parts are copied in the plan's order as they are finished, into a hidden file of the parts' folder. The merge takes that
file over, and copies only what is missing. It believes nothing: what stands there is held to the parts' digests like
everything that it copies itself (data_prep/merge.py).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from data_prep.claims import signature
from data_prep.parts import read_sidecar
from data_prep.plan import Unit
from data_prep.ranges import RangeFile

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Begun:
    """A file that holds the data of a merged set's first parts."""

    path: Path
    parts: tuple[tuple[str, str], ...]  # name and digest of each, in order


class Ahead(threading.Thread):
    """Copies parts of `folder` as they are finished, in the order of `units`, until the block is left.

    A disk that refuses ends it without a word: the merge, or the worker that needs the room, says what is wrong.
    """

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        super().__init__(daemon=True)
        self.folder, self._path = folder, folder / f".merged.{signature()}.bin"
        self._copied: list[tuple[str, str]] = []
        self._parts = self._finished(units)
        self._left = threading.Event()

    def __enter__(self) -> Ahead:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self.join()
        if kind is not None:
            self._path.unlink(missing_ok=True)

    @property
    def begun(self) -> Begun | None:
        """What the merge may take over, once the block is left."""
        return Begun(self._path, tuple(self._copied)) if self._copied else None

    def run(self) -> None:
        at = 0
        try:
            with RangeFile(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as target:
                while not self._left.wait(POLL_SECONDS):
                    for name, digest, size in self._parts:
                        if name is None:
                            break
                        with RangeFile(self.folder / f"{name}.bin") as source:
                            source.copy_to(target, at, 0, size)
                        os.ftruncate(target.fd, at := at + size)  # a part may end in a hole
                        os.fdatasync(target.fd)
                        self._copied.append((name, digest))
                        if self._left.is_set():
                            break
        except OSError:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._copied = []

    def _finished(self, units: Sequence[Unit]) -> Iterator[tuple[str | None, str, int]]:
        """Name, digest and bytes of each part; (None, "", 0) where the next one is not done yet."""
        for unit in units:
            number = 0
            while True:
                part = unit.part(number)
                while (sidecar := read_sidecar(self.folder, part.name)) is None:
                    yield None, "", 0
                yield part.name, sidecar["bin_xxh3"], (self.folder / f"{part.name}.bin").stat().st_size
                if sidecar["last"] or not unit.open_ended:
                    break
                number += 1
