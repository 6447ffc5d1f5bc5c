"""What is to be done: settings, the parts of the input, and the names of the files that hold what is done.

A part's name holds a digest of all that its content depends on. So a changed input or setting makes new names for just
what it changes, every node of a Slurm array comes to the same plan by itself, and a rerun finds what is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_prep.dedup import lines
from data_prep.dedup.minhash import bands_for
from data_prep.dedup.shingles import Unit
from data_prep.errors import UserError
from data_prep.filters import Filters
from data_prep.inputs import JSON_NAMES, expand_inputs

VERSION = 1  # of the stages' files: another one makes all anew
SUFFIXES = tuple(kind + packing for kind in JSON_NAMES for packing in ("", ".gz", ".zst"))
ACCOUNTS = ("report.json", "removed.jsonl", "bad.jsonl", "filtered.jsonl", "examples.md")
MARKER = ".herd-accounts"  # names the ACCOUNTS of a folder, one a line, which are no documents


@dataclass(frozen=True)
class Settings:
    """What decides the output, besides the input.

    key: where the text is; None: text or content, found file by file.
    ngram, unit: what a shingle is, see shingles.py.
    threshold: Jaccard similarity from which a later document goes.
    bands, rows: of the signature; more bands find more, more rows compare less. recall: bands and rows from the
    threshold instead, so that a pair exactly at it is found with this probability.
    exact: what makes exact duplicates, the `text` itself or its `tokens` (case, spaces and punctuation do not count).
    near: whether to look for near duplicates at all.
    max_bucket: documents that stay which one bucket remembers.
    max_bad: share of lines (0 to 1) that may be no documents.
    """

    key: str | None = None
    ngram: int = 5
    unit: Unit = "auto"
    threshold: float = 0.7
    bands: int = 20
    rows: int = 6
    recall: float | None = None
    exact: Literal["text", "tokens"] = "text"
    near: bool = True
    max_bucket: int = 200
    max_bad: float = 0.01
    filters: Filters = field(default_factory=Filters)
    log_filtered: bool = False
    task_bytes: int | None = None  # of input for one part, see `_task_bytes`; does not change the output
    partition_entries: int = 4 << 20  # sorted at a time, about 100 bytes each; does not change the output
    examples: int = 10  # clusters shown in examples.md

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ngram", 1, 100), ("bands", 1, 1024), ("rows", 1, 64), ("max_bucket", 1, 1 << 30), ("threshold", 0.05, 1),
            ("max_bad", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high:,}", 2)
        if self.recall is not None:
            if not 0 < self.recall < 1:
                raise UserError(f"--recall {self.recall}: must be between 0 and 1, say 0.98", 2)
            bands, rows = bands_for(self.threshold, self.recall)
            object.__setattr__(self, "bands", bands)
            object.__setattr__(self, "rows", rows)


@dataclass(frozen=True)
class File:
    """An input: `name` is its path below the output folder; packing as in lines.py."""

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    packing: str


@dataclass(frozen=True)
class Piece:
    """A part of a file: of a plain one the lines that begin in [start, end), of a compressed one all."""

    file: int
    start: int
    end: int | None


def digest(*values: Any) -> str:
    """A short name for JSON values; equal values have equal names."""
    data = json.dumps(values, sort_keys=True, default=str).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Inputs and settings, cut into tasks of consecutive pieces. Equal on every node that sees the same files."""

    output: Path
    settings: Settings
    files: tuple[File, ...]
    tasks: tuple[tuple[Piece, ...], ...]

    @property
    def work(self) -> Path:
        return self.output / ".work"

    def target(self, file: File) -> Path:
        return self.output / file.name

    @cached_property
    def signature_keys(self) -> list[str]:
        s = self.settings
        common = [VERSION, unicodedata.unidata_version, s.key, s.ngram, s.unit, s.exact, s.near, s.bands, s.rows]
        common += [asdict(s.filters)]
        files = [[str(file.path.absolute()), file.bytes, file.mtime_ns] for file in self.files]
        return [digest(common, [[files[p.file], p.start, p.end] for p in pieces]) for pieces in self.tasks]

    @cached_property
    def candidates_key(self) -> str:
        return digest(self.signature_keys, self.settings.max_bad, self.settings.partition_entries)

    @cached_property
    def verify_key(self) -> str:
        s = self.settings
        return digest(self.candidates_key, s.threshold, s.max_bucket, s.examples, s.log_filtered)

    def signature_file(self, task: int) -> Path:
        return self.work / "signatures" / f"{task:06d}-{self.signature_keys[task]}"

    @property
    def candidates(self) -> Path:
        """The folder of the second stage's files."""
        return self.work / f"candidates-{self.candidates_key}"

    def shingle_file(self, task: int) -> Path:
        return self.work / "shingles" / f"{task:06d}-{self.candidates_key}"

    def verify_file(self, task: int) -> Path:
        return self.work / "verify" / f"{task:06d}-{self.verify_key}"

    @property
    def decisions(self) -> Path:
        return self.work / f"decisions-{self.verify_key}"

    def written(self, file: int) -> Path:
        """The mark that a file's output is whole."""
        return self.work / "written" / f"{file:06d}-{self.verify_key}"


def _names(paths: Sequence[Path]) -> list[str]:
    """Paths below the folder that all share, so that equal names in different folders stay apart."""
    full = [os.path.abspath(path) for path in paths]  # noqa: PTH100 (resolve would follow links to other names)
    root = os.path.commonpath([os.path.dirname(path) for path in full])  # noqa: PTH120
    return [os.path.relpath(path, root) for path in full]


def _task_bytes(total: int) -> int:
    """16 MB, and of large inputs so many that there are 1,024 parts at most. A power of two: one more file among many
    leaves the cuts, and so what is done, where they are."""
    return max(16 << 20, 1 << max(0, (total >> 10) - 1).bit_length())


def _pieces(files: Sequence[File], task_bytes: int) -> list[tuple[Piece, ...]]:
    """Tasks of about `task_bytes`: large plain files cut, small files together, a compressed file never cut."""
    tasks: list[tuple[Piece, ...]] = []
    open_task: list[Piece] = []
    room = task_bytes
    for number, file in enumerate(files):
        cuts = range(1) if file.packing else range(0, max(1, file.bytes), task_bytes)
        for start in cuts:
            end = min(start + task_bytes, file.bytes)
            size = file.bytes if file.packing else end - start
            if size > room and open_task:
                tasks.append(tuple(open_task))
                open_task, room = [], task_bytes
            open_task.append(Piece(number, 0, None) if file.packing else Piece(number, start, end))
            room -= size
    if open_task:
        tasks.append(tuple(open_task))
    return tasks


def _refuse_others(inputs: Sequence[str | Path], paths: Sequence[Path]) -> None:
    """A folder's Parquet and text files must not be left behind in silence."""
    folders = [item for item in inputs if Path(item).is_dir()]
    others = [path for path in (expand_inputs(folders) if folders else ()) if path not in set(paths)]
    if others:
        raise UserError(
            f"{others[0]}: neither Parquet nor text files are read by dedup, and there are {len(others)} in the folder; "
            f"name the JSON Lines alone, as '{Path(folders[0]) / '*.jsonl*'}'",
            2,
        )


def make_plan(inputs: Iterable[str | Path], output: str | Path, settings: Settings) -> Plan:
    """The plan for these inputs. Raises UserError for inputs that cannot be read or would be overwritten."""
    inputs, output = list(inputs), Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output", 2)
    inside = output.resolve()
    for item in inputs:
        if Path(item).is_dir() and inside.is_relative_to(Path(item).resolve()):
            raise UserError(f"{output}: lies in the input {item}; choose an --output outside of it", 2)
    files = []
    inputs = list(inputs)
    paths = expand_inputs(inputs, SUFFIXES)
    _refuse_others(inputs, paths)
    for path, name in zip(paths, _names(paths), strict=True):
        if path.resolve().is_relative_to(inside):
            raise UserError(f"{path}: is an input inside the output folder {output}; choose another --output", 2)
        if name in ACCOUNTS or name.startswith(".work" + os.sep):
            raise UserError(f"{path}: has the name of one of dedup's own files; rename it", 2)
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; check the file") from error
        files.append(File(path, name, stat.st_size, stat.st_mtime_ns, lines.packing_of(path)))
    return Plan(
        output,
        settings,
        tuple(files),
        tuple(_pieces(files, settings.task_bytes or _task_bytes(sum(file.bytes for file in files)))),
    )
