"""A folder PREFIX.parts: many token files in order, as herd prep tokenize leaves them, and parts.json that lists them.

parts.json: {"herd_parts": 1, "dtype": "<u2", "parts": [{"name", "documents", "sequences", "tokens", "bin_xxh3",
"idx_xxh3"}, …], "meta": {…what becomes PREFIX.meta.json…}}. It is written last: a folder without it is not finished.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_prep.errors import UserError
from data_prep.index_format import CODES

NAME = "parts.json"
ENDING = ".parts"


class Part(NamedTuple):
    """A token file of the folder, its counts and the xxh3_128 of its two files."""

    name: str
    documents: int
    sequences: int
    tokens: int
    bin_xxh3: str | None
    idx_xxh3: str | None


@dataclass(frozen=True)
class Parts:
    """A finished folder. digest: of parts.json itself, which tells one state of the folder from another."""

    folder: Path
    dtype: np.dtype[np.generic]
    parts: list[Part]
    meta: dict[str, Any]
    digest: str

    @property
    def prefix(self) -> str:
        """What the merged set is called: the folder's name without .parts."""
        return str(self.folder).removesuffix(ENDING)

    @property
    def prefixes(self) -> list[str]:
        return [str(self.folder / part.name) for part in self.parts]

    @property
    def digests(self) -> list[tuple[str | None, str | None]]:
        return [(part.bin_xxh3, part.idx_xxh3) for part in self.parts]

    def check(self, part: Part, documents: int, sequences: int, data_bytes: int) -> None:
        """Raise UserError where a part's files do not hold what parts.json lists."""
        if (documents, sequences, data_bytes) != (part.documents, part.sequences, part.tokens * self.dtype.itemsize):
            raise UserError(
                f"{self.folder / part.name} holds {documents:,} documents, {sequences:,} sequences and {data_bytes:,} "
                f"bytes, where {NAME} lists {part.documents:,}, {part.sequences:,} and "
                f"{part.tokens * self.dtype.itemsize:,}; run herd prep tokenize again, which makes this part anew"
            )


def find_parts(path: str | Path) -> Path | None:
    """The folder of parts that a path means: itself, or PREFIX.parts where there is no PREFIX.idx; else None.

    Raises UserError for such a folder that is not finished.
    """
    folder = Path(path)
    if not folder.is_dir() or not (folder.name.endswith(ENDING) or (folder / NAME).exists()):
        folder = Path(f"{path}{ENDING}")
        if Path(f"{path}.idx").exists() or not folder.is_dir():
            return None
    if not (folder / NAME).is_file():
        raise UserError(
            f"{folder} has no {NAME}: it is not finished; run the same herd prep tokenize again, which goes on"
        )
    return folder


def read_meta(path: str | Path) -> dict[str, Any] | None:
    """What is noted about a token file or a folder of parts: PREFIX.meta.json, or "meta" of parts.json; None for files
    of others. Raises UserError when it is damaged."""
    folder = find_parts(path)
    if folder is not None:
        return read_parts(folder).meta
    meta = Path(f"{path}.meta.json")
    try:
        facts = json.loads(meta.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{meta}: cannot be read: {error}; remove it to do without it") from error
    if not isinstance(facts, dict):
        raise UserError(f"{meta}: is no JSON object; remove it to do without it")
    return facts


def read_parts(folder: str | Path) -> Parts:
    """Read a finished folder's parts.json. Raises UserError where it is missing or damaged."""
    path = Path(folder) / NAME
    try:
        data = path.read_bytes()
        facts = json.loads(data)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is no folder of parts, or is not finished") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; run the same herd prep tokenize again") from error
    try:
        if facts["herd_parts"] != 1:
            raise ValueError(f"version {facts['herd_parts']}, and this herd knows version 1")
        dtype = np.dtype(str(facts["dtype"])).newbyteorder("<")
        if dtype not in CODES:
            raise ValueError(f"no token file holds {dtype}")
        parts = [_part(entry) for entry in facts["parts"]]
        meta = dict(facts.get("meta") or {})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a list of parts: {error!r}; run the same herd prep tokenize again") from error
    return Parts(Path(folder), dtype, parts, meta, xxhash.xxh3_128(data).hexdigest())


def _part(entry: dict[str, Any]) -> Part:
    name, counts = entry["name"], [entry[kind] for kind in ("documents", "sequences", "tokens")]
    digests = [entry.get(kind) for kind in ("bin_xxh3", "idx_xxh3")]
    # A name stays inside the folder, whoever wrote the list.
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a part")
    if any(type(count) is not int or not 0 <= count < 2**62 for count in counts):
        raise ValueError(f"{name}: counts {counts}")
    if not all(digest is None or isinstance(digest, str) for digest in digests):
        raise ValueError(f"{name}: digests {digests}")
    return Part(name, *counts, *digests)
