"""What can be asked of `tokenize`."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass, field

from data_prep.readers import Reading


@dataclass(frozen=True)
class Options:
    """What is asked of `tokenize` beside input, tokenizer and output.

    key: where a record's text is (None: text or content, found file by file). append_eod, prepend_bos: the tokenizer's
    end-of-document and begin-of-text ids around each document. parse_special: control tokens spelled in the text become
    control ids. text_documents: what a document is in a text file, file or line. engine: auto, official, or a fast
    one's name. workers: processes (None: all cores). max_bad: share of bad lines above which nothing is written.
    allow_damaged: take what can be read of damaged packed files. part_bytes: size of a part (None: from the input's).
    task: (index, count) of a node among several that work together; then nothing is merged. merge: write PREFIX.bin and
    .idx; else leave the folder of parts. keep_parts: leave it although it was merged.
    """

    reading: Reading = field(default_factory=Reading)
    append_eod: bool = True
    prepend_bos: bool = False
    parse_special: bool = False
    engine: str = "auto"
    workers: int | None = None
    max_bad: float = 0.01
    allow_damaged: bool = False
    part_bytes: int | None = None
    task: tuple[int, int] = (0, 1)
    merge: bool = True
    keep_parts: bool = False
    overwrite: bool = False
    progress: bool = False


DEFAULTS = Options()


def default_workers() -> int:
    """Cores this process may use (a Slurm job's share, not the whole node's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def herd_version() -> str:
    """The installed version, or "unknown" when herd runs from a bare checkout."""
    try:
        return importlib.metadata.version("herd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
