"""A folder of parts: token files of their own, each with a sidecar that says what it was made from and what it holds.

NAME.bin, NAME.idx and, last of all, NAME.json: a part is done when its sidecar is there. NAME.log.jsonl lists its bad
lines. `parts.json`, written when all are done, names them in order; from then on the folder can be trained on, merged
and verified (data_prep/joined.py, merge.py, verify.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.claims import signature
from data_prep.errors import UserError
from data_prep.index_format import CODES, HEADER, MAGIC, VERSION, sync_folder

ENDINGS = (".bin", ".idx", ".json", ".log.jsonl")
LIST = "parts.json"
INDEX_BLOCK = 1 << 18  # documents whose index is laid out at a time
LONGEST = np.iinfo(np.int32).max  # tokens of one sequence that .idx can say


def disk_error(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; free space there, or write elsewhere")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file aside, flush it to the disk, rename. Raises UserError when the disk refuses."""
    aside = path.with_name(f".{path.name}.{signature()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} when it is not there or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class PartWriter:
    """Writes one part aside; `publish` puts it in place, which another thread may do while the next part begins.

    Files are called .NAME.SIGNATURE.* until then (data_prep/claims.py), so two processes never write into the same
    one. Raises UserError when the disk refuses.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype.newbyteorder("<")
        self.tokens = 0
        self._aside = folder / f".{name}.{signature()}"
        self._lengths = array("i")  # 4 bytes a document in memory
        self._log: BinaryIO | None = None
        self._hash: Any = xxhash.xxh3_128()
        try:
            self._bin = self._path(".bin").open("w+b", buffering=0)
        except OSError as error:
            raise disk_error(self._aside, error) from error

    def _path(self, ending: str) -> Path:
        return self._aside.with_name(self._aside.name + ending)

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64], goes_on: bool = False) -> None:
        """Documents, end to end, in the part's type, and the length of each; the first `goes_on` with the last one."""
        if goes_on and len(lengths):
            lengths = lengths.copy()
            lengths[0] += self._lengths.pop()
        if lengths.size and lengths.max() > LONGEST:
            raise UserError(f"a document of {lengths.max():,} tokens is longer than .idx can say; cut it")
        data = ids.view(np.uint8).data
        if self._hash is not None:
            self._hash.update(data)
        try:
            while data:
                data = data[self._bin.write(data) :]
        except OSError as error:
            raise disk_error(self._aside, error) from error
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(ids)

    def drop_last(self) -> None:
        """Take back the last document."""
        self.tokens -= self._lengths.pop()
        self._bin.truncate(self._bin.seek(self.tokens * self.dtype.itemsize))
        self._hash = None  # of what was taken back too; made anew at the end

    def log(self, line: dict[str, Any]) -> None:
        """One bad line; not held in memory, for a part may consist of nothing else."""
        try:
            if self._log is None:
                self._log = self._path(".log.jsonl").open("wb")
            self._log.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise disk_error(self._aside, error) from error

    def publish(self, sidecar: dict[str, Any]) -> dict[str, Any]:
        """Flush to the disk and rename; `sidecar` last, completed by counts and digests. Returns it so completed."""
        try:
            if self._hash is None:
                self._hash = xxhash.xxh3_128()
                self._bin.seek(0)
                while block := self._bin.read(1 << 22):
                    self._hash.update(block)
            os.fsync(self._bin.fileno())
            self._bin.close()
            if self._log is not None:
                with self._log as log:
                    log.flush()
                    os.fsync(log.fileno())
            index_hash = self._write_index()
            for ending in (".log.jsonl", ".idx", ".bin"):
                if self._path(ending).exists():
                    self._path(ending).replace(self.folder / f"{self.name}{ending}")
            sync_folder(self.folder)
        except OSError as error:
            raise disk_error(self.folder / self.name, error) from error
        counts = {"documents": len(self._lengths), "sequences": int(np.count_nonzero(self._lengths))}
        digests = {"bin_xxh3": self._hash.hexdigest(), "idx_xxh3": index_hash}
        full = {**sidecar, **counts, "tokens": self.tokens, "dtype": self.dtype.str, **digests}
        write_json(self.folder / f"{self.name}.json", full)
        return full

    def discard(self) -> None:
        """Remove what was written aside."""
        self._bin.close()
        if self._log is not None:
            with contextlib.suppress(OSError):  # of what a full disk did not take
                self._log.close()
        for ending in ENDINGS:
            with contextlib.suppress(OSError):
                self._path(ending).unlink(missing_ok=True)

    def _write_index(self) -> str:
        """Write .idx block by block, and return its digest: a part may hold a hundred million documents.

        A document without tokens is a document with no sequence, as Megatron writes it.
        """
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        digest, size = xxhash.xxh3_128(), self.dtype.itemsize
        blocks = [lengths[at : at + INDEX_BLOCK] for at in range(0, len(lengths), INDEX_BLOCK)]
        with self._path(".idx").open("wb") as file:

            def write(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], int(np.count_nonzero(lengths)), len(lengths) + 1))
            for block in blocks:
                write(block[block > 0].astype("<i4").tobytes())
            at = 0
            for block in blocks:
                ends = np.cumsum(block[block > 0], dtype="<i8")
                write(((ends - block[block > 0] + at) * size).astype("<i8").tobytes())
                at += int(ends[-1]) if len(ends) else 0
            count = 0
            write(np.zeros(1, "<i8").tobytes())
            for block in blocks:
                documents = np.cumsum(block > 0, dtype="<i8") + count
                write(documents.astype("<i8").tobytes())
                count = int(documents[-1])
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()


def read_sidecar(folder: Path, name: str) -> dict[str, Any] | None:
    """What a finished part's sidecar says; None when the part is not there or not whole (then it is done again)."""
    try:
        sidecar = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        size = sidecar["tokens"] * np.dtype(sidecar["dtype"]).itemsize
        whole = (folder / f"{name}.bin").stat().st_size == size and (folder / f"{name}.idx").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if whole else None


def part_is_whole(folder: Path, sidecar: dict[str, Any]) -> bool:
    """Do both files still have the digests that the sidecar records?"""
    for ending, wanted in ((".bin", sidecar["bin_xxh3"]), (".idx", sidecar["idx_xxh3"])):
        digest = xxhash.xxh3_128()
        with (folder / f"{sidecar['part']}{ending}").open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != wanted:
            return False
    return True


def remove_part(folder: Path, name: str) -> None:
    """Remove a part, its sidecar first."""
    for ending in (".json", ".idx", ".bin", ".log.jsonl"):
        (folder / f"{name}{ending}").unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove the parts: first from where others look, who may be writing this moment."""
    aside = folder.with_name(f".{folder.name}.{signature()}.done")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
