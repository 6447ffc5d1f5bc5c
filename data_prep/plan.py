"""What there is to do, cut into parts in a fixed order: the same plan for any number of workers and nodes.

A part is one or several ranges of files, and a token file of its own. Its name holds a digest of what goes into it
(which bytes of which files, and every setting that may change the output), so a part that lies there under its name is
done, and one that something changed of has another name.

Plain files are cut by bytes, Parquet files by row groups; small files are put together. A large packed file is an open
row of parts: how many there are is known when its end was reached.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError
from data_prep.inputs import PARQUET, TEXT, File
from data_prep.streams import PLAIN, packing

SMALLEST, USUAL, LARGEST = 1 << 23, 1 << 25, 1 << 28  # bytes of a part; the last gives few enough files for 10 TB
FEW_PARTS = 64  # up to USUAL, half a second's work, parts grow before there are more: enough that workers end together
PART_NAME = re.compile(r"-\d{4,}-[0-9a-f]{20}$")
PARTS_WANTED = 4096  # beyond it, parts grow before there are more than this


@dataclass(frozen=True)
class Span:
    """What begins in [start, stop) of a file: unpacked bytes, or row groups of Parquet; stop None: all the rest."""

    file: File
    start: int
    stop: int | None


@dataclass(frozen=True)
class Part:
    """One unit of durable work. `size`: bytes on disk that reading it takes, as far as that is known."""

    name: str
    spans: tuple[Span, ...]
    size: int


class Unit:
    """One part, or the open row of parts of one packed file, told by `open_ended`."""

    def __init__(self, spans: tuple[Span, ...], size: int, settings: str, part_bytes: int | None = None) -> None:
        self._spans, self.size, self._settings, self._part_bytes = spans, size, settings, part_bytes

    @property
    def open_ended(self) -> bool:
        return self._part_bytes is not None

    def part(self, number: int) -> Part:
        """Part `number` of an open row; 0 where there is but one."""
        spans, size = self._spans, self.size
        if self._part_bytes is not None:
            start = number * self._part_bytes
            spans, size = (Span(spans[0].file, start, start + self._part_bytes),), 0
        facts = [[str(s.file.path), s.file.form, s.file.size, s.file.mtime_ns, s.start, s.stop] for s in spans]
        digest = hashlib.blake2b(json.dumps([self._settings, facts]).encode(), digest_size=10).hexdigest()
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", spans[0].file.path.name.split(".")[0])[:24] or "part"
        return Part(f"{stem}-{number:04d}-{digest}", spans, size)


def part_size(files: Sequence[File]) -> int:
    """Bytes of a part: a power of two that depends on the inputs' sizes alone."""
    total, size = sum(file.size for file in files), SMALLEST
    while size < LARGEST and total > (FEW_PARTS if size < USUAL else PARTS_WANTED) * size:
        size *= 2
    return size


def settings_digest(settings: dict[str, Any]) -> str:
    """Twenty hexadecimal digits of all that decides a part's bytes besides its input."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10).hexdigest()


def make_plan(files: Sequence[File], settings: str, part_bytes: int, whole_text: bool) -> list[Unit]:
    """Units in the order of the output. `whole_text`: a text file is one document and cannot be cut by bytes.

    Raises UserError for a file that cannot be read.
    """
    units: list[Unit] = []
    small: list[Span] = []
    held = 0

    def flush() -> None:
        nonlocal small, held
        if small:
            units.append(Unit(tuple(small), held, settings))
        small, held = [], 0

    for file in files:
        packed = file.form != PARQUET and file.size > part_bytes // 4 and _packing(file) != PLAIN
        if file.size <= part_bytes // 4 or (file.form == TEXT and whole_text):
            if held + file.size > part_bytes:
                flush()
            small.append(Span(file, 0, None))
            held += file.size
            continue
        flush()
        if packed:
            units.append(Unit((Span(file, 0, None),), file.size, settings, part_bytes))
        elif file.form == PARQUET:
            units += _row_groups(file, settings, part_bytes)
        else:
            for start in range(0, file.size, part_bytes):
                stop = min(file.size, start + part_bytes)
                span = Span(file, start, None if stop == file.size else stop)
                units.append(Unit((span,), stop - start, settings))
    flush()
    return units


def _packing(file: File) -> str:
    try:
        with file.path.open("rb") as stream:
            return packing(stream.read(4))
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}; check the path and its permissions") from error


def _row_groups(file: File, settings: str, part_bytes: int) -> list[Unit]:
    from data_prep.parquet import group_sizes

    sizes = group_sizes(file)
    share = file.size / max(1, sum(sizes))
    units, start, held = [], 0, 0
    for group, size in enumerate(sizes):
        if group > start and held + size > part_bytes:
            units.append(Unit((Span(file, start, group),), int(held * share), settings))
            start, held = group, 0
        held += size
    units.append(Unit((Span(file, start, len(sizes)),), int(held * share), settings))
    return units
